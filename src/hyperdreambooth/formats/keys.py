"""The names of LoRA tensors in the layouts that are in use, and back to layer paths.

    diffusers   unet.mid_block...to_q.lora_A.weight / .lora_B.weight                  no alpha: up @ down is the update
    PEFT        base_model.model.mid_block...to_q.lora_A.weight                       one model, without its name
    older       ...to_q.lora.down.weight, ...to_q_lora.down.weight, ...lora_linear_layer.down.weight
    kohya       lora_unet_mid_block_..._to_q.lora_down.weight / .lora_up.weight / .alpha     scaled by alpha / rank

Paths in memory are canonical: `text_model.` exactly once inside a text encoder (see `lora.canonical`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import InputError
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


def split(key: str, file: str) -> tuple[str, str]:
    """A tensor's name -> (layer, "down" | "up" | "alpha"). Raises InputError for a name of no known layout."""
    given, key = key, re.sub(r"(\.lora_[AB])\.\w+\.weight$", r"\1.weight", key)  # PEFT may name the adapter
    for suffix, side in SIDES.items():
        if key.endswith(suffix):
            return key[: -len(suffix)], side
    if "dora" in key or "magnitude" in key:
        raise InputError(f"{file} is a DoRA ({given}): its magnitudes would be lost. Merge it into a plain LoRA first.")
    if "lora" in key or "hada" in key or "lokr" in key:
        raise InputError(f"{file}: {key} is of no LoRA layout that is read here (diffusers, PEFT and kohya are).")
    raise InputError(f"{file} is no LoRA: {key} is a tensor of something else (a whole checkpoint?).")


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
    # PEFT saves one model without its name: a denoiser, or a text encoder
    return canonical(f"text_encoder.{layer}" if layer.startswith(("text_model.", "encoder.layers.")) else f"unet.{layer}")


def kohya_name(path: str, *, two_text_encoders: bool) -> str:
    """A canonical path -> kohya's name: `lora_unet_...`; `lora_te_...`, or `lora_te1_...` and `lora_te2_...` of two encoders."""
    component, _, rest = canonical(path).partition(".")
    prefix = {
        "unet": "lora_unet",
        "transformer": "lora_transformer",
        "text_encoder": "lora_te1" if two_text_encoders else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    if component not in prefix:
        raise InputError(f"kohya's layout has no name for {component}.")
    return f"{prefix[component]}_{rest.replace('.', '_')}"


def kohya_paths(paths: Iterable[str]) -> dict[str, str]:
    """Every name that kohya's layout may give a base's layers -> canonical path."""
    names = {}
    for path in paths:
        if path.split(".")[0] in ("unet", "transformer", "text_encoder", "text_encoder_2"):
            for two in (False, True):
                names[kohya_name(path, two_text_encoders=two)] = path
    return names
