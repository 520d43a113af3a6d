"""The names of LoRA tensors in the layouts that are in use, and back to layer paths.

    diffusers   unet.mid_block...to_q.lora_A.weight / .lora_B.weight                  no alpha: up @ down is the update
    PEFT        base_model.model.mid_block...to_q.lora_A.weight                       one model, without its name
    older       ...to_q.lora.down.weight, ...to_q_lora.down.weight, ...lora_linear_layer.down.weight
    kohya       lora_unet_mid_block_..._to_q.lora_down.weight / .lora_up.weight / .alpha     scaled by alpha / rank
                lora_unet_middle_block_1_..._to_q.lora_down.weight                the same by the original UNet's names (SDXL)

Paths in memory are canonical: `text_model.` exactly once inside a text encoder (see `lora.canonical`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import InputError, some
from ..lora import canonical

SIDES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def split(names: Iterable[str], file: str) -> dict[str, tuple[str, str]]:
    """Tensors' names -> (layer, "down" | "up" | "alpha") of each. Raises InputError where any is of no known layout."""
    found: dict[str, tuple[str, str]] = {}
    unknown = []
    for name in names:
        key = re.sub(r"(\.lora_[AB])\.\w+\.weight$", r"\1.weight", name)  # PEFT may name the adapter
        suffix = next((suffix for suffix in SIDES if key.endswith(suffix)), None)
        if suffix:
            found[name] = key[: -len(suffix)], SIDES[suffix]
        else:
            unknown.append(name)
    dora = [name for name in unknown if "dora" in name or "magnitude" in name]
    if dora:
        raise InputError(f"{file} is a DoRA ({some(dora)}): its magnitudes would be lost. Merge it into a plain LoRA first.")
    if unknown and not found and not any(mark in name for name in unknown for mark in ("lora", "hada", "lokr")):
        raise InputError(f"{file} is no LoRA: it holds {some(unknown)} (a whole checkpoint?). Name a LoRA file.")
    if unknown:
        raise InputError(
            f"{file}: {some(unknown)}: of no LoRA layout that is read here (diffusers, PEFT and kohya are). Convert it, or merge it into a plain LoRA."
        )
    return found


def to_path(layer: str) -> str:
    """A layer's name in a diffusers or PEFT file -> its canonical path."""
    layer = layer.removeprefix("base_model.model.")
    layer = layer.replace(".processor.", ".").replace("to_out_lora", "to_out.0")
    layer = re.sub(r"\.to_([qkv])_lora$", r".to_\1", layer)
    layer = re.sub(r"\.to_out$", ".to_out.0", layer)
    if "self_attn." in layer:  # a text encoder in the oldest files
        layer = re.sub(r"\.to_([qkv])$", r".\1_proj", layer).replace("to_out.0", "out_proj")
    component = layer.split(".")[0]
    if component in COMPONENTS:
        return canonical(layer)
    # PEFT saves one model without its name: a text encoder, a transformer, or a UNet
    if layer.startswith(("text_model.", "encoder.layers.")):
        return canonical(f"text_encoder.{layer}")
    return f"transformer.{layer}" if layer.startswith(("transformer_blocks.", "single_transformer_blocks.")) else f"unet.{layer}"


def kohya_name(path: str, *, two_text_encoders: bool) -> str:
    """A canonical path -> kohya's name: `lora_unet_...`; `lora_te_...`, or `lora_te1_...` and `lora_te2_...` of two encoders.

    Raises InputError for the layers of a transformer (SD 3, Flux): kohya names those by the original code, where query,
    key and value are one layer, so an update of one of them alone has no name there.
    """
    component, _, rest = canonical(path).partition(".")
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if two_text_encoders else "lora_te", "text_encoder_2": "lora_te2"}
    if component not in prefix:
        raise InputError(f"kohya's layout has no name for {path}. Write diffusers' layout, which ComfyUI opens for these bases.")
    return f"{prefix[component]}_{rest.replace('.', '_')}"


def check_layout(layout: str, components: Iterable[str]) -> None:
    """Raises InputError where a base of these components has no names in `layout`: before anything is trained."""
    if layout == "kohya" and "transformer" in components:
        kohya_name("transformer.transformer_blocks", two_text_encoders=True)


def kohya_paths(paths: Iterable[str]) -> dict[str, str]:
    """Every name that kohya's layout may give a base's layers -> canonical path."""
    known = [path for path in paths if path.split(".")[0] in ("unet", "text_encoder", "text_encoder_2")]
    resnets = [int(path.split(".")[4]) for path in known if re.fullmatch(r"unet\.down_blocks\.0\.resnets\.\d+", path)]
    names = {}
    for path in known:
        for name in (path, _original(path, 1 + max(resnets, default=1))):
            for two in (False, True):
                names[kohya_name(name, two_text_encoders=two)] = path
    return names


def _original(path: str, layers: int) -> str:
    """An attention layer of a diffusers UNet by its name in the original code, where all blocks are in one row.

    Args:
        layers: residual layers in each block of the way down (Stable Diffusion: 2); a downsampler or one more layer follows.
    """
    block = re.match(r"unet\.(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", path)
    if block:
        down, index = block[1] == "down", int(block[2]) * (layers + 1) + int(block[3])
        return f"unet.{'input' if down else 'output'}_blocks.{index + down}.1.{path[block.end() :]}"
    return path.replace("unet.mid_block.attentions.0.", "unet.middle_block.1.")


def is_kohya_flux(names: Iterable[str]) -> bool:
    """Whether a file has the names of kohya's Flux LoRAs, which are the original code's: query, key and value in one."""
    return any(name.startswith(("lora_unet_double_blocks_", "lora_unet_single_blocks_")) for name in names)
