"""Standard LoRA files: written in diffusers' or kohya's layout, read in any, found in folders and on the hub, added to a base as a style.

A file's header describes it to UIs, by Stability's model metadata standard (`modelspec.*`) and kohya's keys (`ss_*`, `sshs_*`): A1111 and
Forge group LoRAs by `ss_base_model_version` and `ss_v2`, list them as `ss_output_name`, and show `ss_tag_frequency`; ComfyUI and SwarmUI
read `modelspec.*`, with the picture in `modelspec.thumbnail`. The header's entries are in assets/loras.json, with placeholders for values.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whatever HTTP library it uses
from PIL import Image
from torch import Tensor, nn

from .. import __version__, header
from ..checkpoint import escaped, save_tensors
from ..errors import InputError, fresh, refusing
from ..lora import Lora, LoraSet, applied, can_be_added_to, canonical
from . import keys
from .adapters import Adapter, read_adapters
from .keys import TABLES, Names

Layout = Literal["diffusers", "kohya"]
Style = str | Path | tuple[str | Path, float] | list[Any]
"""A LoRA: a file, a folder or a repository with one, or (one of these, strength), which may be a list, as from JSON."""

CARRIERS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # The components that a LoRA may change.
REPOSITORY = re.compile(r"(?:https?:/+(?:huggingface\.co|hf\.co)/)?([\w.-]*\w/[\w.-]+)(?:/(?:blob|resolve|tree)/([^/]+))?(?:/(.+))?")
OWN_WORDS = ("modelspec.title", "modelspec.description", "modelspec.tags", "modelspec.usage_hint", "ss_tag_frequency")
"""The header's entries that say in words what a LoRA is and how it is prompted, besides its trigger phrase."""
HUB_ERRORS = (HTTPError, OSError, ValueError)
"""What huggingface_hub raises for a hub that can't be reached, a refused token, an invalid name, and an invalid model card."""


@dataclass
class LoraFile:
    """A plain LoRA file's contents; the updates are one person's (no batch dimension), float32, by canonical path."""

    loras: LoraSet
    metadata: dict[str, str]
    layout: str
    convolutions: frozenset[str] = frozenset()  # Layers that are 1 x 1 convolutions in their base.


def public_name(name: str) -> str:
    """A base's or LoRA's name without its folders, where it is a path on this machine: those don't belong in a file that may leave it."""
    return Path(name).absolute().name if Path(name).exists() else name


def base_metadata(pipe: Any, base: str, resolution: int) -> dict[str, str]:
    """The header's entries about a LoRA's base. `base`: its path or hub id; `resolution`: the side of its pictures in pixels."""
    architecture, version = _architecture(pipe)
    values = {"architecture": architecture, "version": version, "second": version.startswith("sd_v2"), "side": resolution}
    values["name"] = public_name(base)
    metadata = {key: text.format(**values) for key, text in TABLES["header"]["base"].items()}
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(pipe.scheduler.config.get("prediction_type", ""))
    return metadata | ({"modelspec.prediction_type": prediction} if prediction else {})


def _architecture(pipe: Any) -> tuple[str, str]:
    """A pipeline's architecture by the standard, and kohya's name for its version."""
    kind = type(pipe).__name__
    if kind.startswith("Flux"):
        return ("flux-1-dev" if pipe.transformer.config.guidance_embeds else "flux-1-schnell"), "flux1"
    if kind.startswith("StableDiffusion3"):
        # 3 medium has 24 blocks, 3.5 medium too but with a second attention in some, 3.5 large has 38
        config = pipe.transformer.config
        size = "3.5-large" if config.num_layers > 24 else "3.5-medium" if config.dual_attention_layers else "3-medium"
        return f"stable-diffusion-{size}", "sd3"
    if kind.startswith("StableDiffusionXL"):
        return "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"
    velocity = pipe.scheduler.config.get("prediction_type") == "v_prediction"
    if pipe.unet.config.cross_attention_dim == 1024:  # OpenCLIP's width, which only the second version has
        return ("stable-diffusion-v2-768-v", "sd_v2_v") if velocity else ("stable-diffusion-v2-512", "sd_v2")
    return "stable-diffusion-v1", "sd_v1_v" if velocity else "sd_v1"


def standard_metadata(loras: LoraSet, *, title: str, trigger: str, identifier: str, **given: str | Image.Image | None) -> dict[str, str]:
    """The header's entries about a LoRA itself, to be joined with `base_metadata`. `given`: author, license, thumbnail."""
    rank = max(lora.rank for lora in loras.values())
    values = {"title": title, "trigger": trigger, "identifier": identifier, "rank": rank, "alpha": float(rank), "version": __version__}
    frequency, date = json.dumps({"hyperdreambooth": {trigger: 1}}), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    metadata = {key: text.format(**values, frequency=frequency, date=date) for key, text in TABLES["header"]["lora"].items()}
    for name, value in given.items():
        if isinstance(value, Image.Image):  # as a small JPEG in a data URL, of 256 pixels a side, as the standard recommends
            small, buffer = value.convert("RGB"), io.BytesIO()
            small.thumbnail((256, 256))
            small.save(buffer, "JPEG", quality=85)
            value = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        metadata |= {f"modelspec.{name}": value} if value else {}
    return metadata


def with_own_words(metadata: Mapping[str, str], loaded: Mapping[str, str]) -> dict[str, str]:
    """The header of a file that is written, with the words of the file that it was loaded from, where that has some.

    A title that was only the loaded file's name is left out, as the new file has a name of its own.
    """
    words = {key: loaded[key] for key in OWN_WORDS if loaded.get(key)}
    if words.get("modelspec.title") == loaded.get("ss_output_name"):
        words.pop("modelspec.title", None)
    return {**metadata, **words}


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which UIs look a LoRA up: of the tensors' bytes, and kohya's older one.

    The older one is of the 64 KB from 1 MB on, in a file whose only metadata are `ss_*` (so that editing other metadata doesn't
    change it). Of a smaller file it is the hash of no bytes.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = safetensors.torch.save(dict(tensors), training)
    start = 8 + int.from_bytes(content[:8], "little")
    whole = hashlib.sha256(content[start:]).hexdigest()
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return {"modelspec.hash_sha256": f"0x{whole}", "sshs_model_hash": whole, "sshs_legacy_hash": legacy}


def fingerprint(loras: LoraSet) -> str:
    """A hash of the updates' contents, rounded to fp16 (as files have them by default)."""
    halves = loras.map(lambda part: part.detach().cpu().half())
    return header.fingerprint({path: (lora.down.numpy(), lora.up.numpy()) for path, lora in halves.items()})


def save_lora(
    path: str | Path,
    loras: LoraSet,
    metadata: dict[str, str],
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype = torch.float16,
    convolutions: Collection[str] = (),
    overwrite: bool = False,
) -> Path:
    """Writes one person's updates, with `metadata`, a fingerprint and hashes in the header.

    Args:
        convolutions: layers that are 1 x 1 convolutions in their base; their matrices are written with two more dimensions of 1.

    Raises InputError where `path` exists, or a value would overflow `dtype`.
    """
    path = fresh(path, overwrite)
    if batched := [layer for layer, lora in loras.items() if lora.down.ndim != 2]:
        raise ValueError(f"{batched[0]}: a file holds one person's update, not a batch; select() one")
    two = metadata.get("ss_base_model_version", "").startswith("sdxl") or any(layer.startswith("text_encoder_2") for layer in loras)
    # one rank for all, as `ss_network_dim` is one number: diffusers' converter of kohya's layout loses the attention layers' own
    # alphas, and its older versions scale mixed ranks wrongly in their own layout too
    largest = max(lora.rank for lora in loras.values())
    tensors: dict[str, Tensor] = {}
    whole = LoraSet()
    for layer, lora in loras.items():
        fill = largest - lora.rank
        whole[layer] = Lora(nn.functional.pad(lora.down, (0, 0, 0, fill)), nn.functional.pad(lora.up, (0, fill)))
        down, up = (matrix.detach().to("cpu", dtype).contiguous() for matrix in (whole[layer].down, whole[layer].up))
        if not Lora(down, up).is_finite():
            raise InputError(f"{layer}: the update doesn't fit {dtype}. Write float32, or train with a lower learning rate.")
        if layer in convolutions:
            down, up = down[..., None, None], up[..., None, None]
        if layout == "diffusers":
            tensors |= {f"{canonical(layer)}.lora_A.weight": down, f"{canonical(layer)}.lora_B.weight": up}
        else:  # loaders scale by alpha / rank: alpha = rank leaves up @ down as it is
            name, alpha = keys.kohya_name(layer, two_text_encoders=two), torch.tensor(float(largest), dtype=dtype)
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    about = escaped({"format": "pt", **metadata, "hyperdreambooth.fingerprint": fingerprint(whole)})
    return save_tensors(path, tensors, about | hashes(tensors, about))


def read_lora(path: str | Path, root: nn.Module | None = None) -> LoraFile:
    """Reads a plain LoRA in any spelling, of mixed ranks and alphas; 1 x 1 convolutions are linear layers too.

    Args:
        root: the base's components. Without them names that are ambiguous, such as kohya's, stay as they are in the file.

    Raises InputError for a file that is no LoRA, for another base, damaged, or with adapters other than plain LoRA.
    """
    adapters, metadata = read_adapters(path, Names(root) if root is not None else None)
    layout = "kohya" if adapters[0].layer.startswith("lora_") else "diffusers"
    convolutions = {place.path for adapter in adapters for place in adapter.places if adapter.parts.get("down", torch.empty(0)).ndim == 4}
    loras = plain(path, adapters, "and only a plain LoRA of linear layers can be a person's. Use it as a style: generate --style FILE")
    return LoraFile(loras, metadata, layout, frozenset(convolutions))


def plain(path: str | Path, adapters: Sequence[Adapter], why: str) -> LoraSet:
    """Adapters as low-rank updates of linear layers. Raises InputError, which ends in `why`, for any other kind of adapter."""
    loras = LoraSet()
    for adapter in adapters:
        if adapter.kind:
            raise InputError(f"{path} is {adapter.kind} (in {adapter.layer}), {why}.")
        down, up = adapter.parts["down"].flatten(1), adapter.parts["up"].flatten(1) * adapter.scale
        for place in adapter.places:
            loras[place.path] = Lora(down, up[place.outputs(len(up))])
    return loras


def describe(path: str | Path) -> dict[str, Any]:
    """The contents of a LoRA or token file, as `info` prints them. Raises InputError where it is neither."""
    if plainly := header.describe(path):
        return plainly
    adapters, metadata = read_adapters(path)
    kohya = adapters[0].layer.startswith("lora_")
    paths = [place.path for adapter in adapters for place in adapter.places]
    components = ["_".join(path.split("_")[:2]) if kohya else path.split(".")[0] for path in paths]
    kinds = sorted({adapter.kind for adapter in adapters} - {""})
    ranks = (len(adapter.parts["down"]) for adapter in adapters if "down" in adapter.parts)
    kind = f"{' and '.join(kinds) or 'LoRA'} ({'kohya' if kohya else 'diffusers'} layout)"
    digest = "unknown" if kinds else fingerprint(plain(path, adapters, ""))
    return header.summary(path, kind, components, ranks, digest, metadata) | {"layers": len(adapters)}


def find_lora(name: str | Path) -> Path:
    """The LoRA file that `name` stands for: a file, the only one in a folder, or `user/repo[/file]` on the hub or its address (downloaded).

    Raises InputError where there is none, or several.
    """
    path, repository = Path(name), REPOSITORY.fullmatch(str(name))
    if path.is_dir():
        return path / _only([file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()], str(name))
    if path.exists() or not repository or repository[1].endswith((".safetensors", ".tokens")):
        return path
    with refusing(f"{name} is no file or folder here, and no LoRA on the hub that can be reached", *HUB_ERRORS):
        file, revision = repository[3], repository[2]
        if not file:
            about = HfApi().model_info(repository[1], revision=revision)
            file, revision = _only([one.rfilename for one in about.siblings or []], str(name)), about.sha
        beside = f"{file.rpartition('/')[0]}/adapter_config.json".lstrip("/")  # where PEFT keeps the scale
        folder = Path(snapshot_download(repository[1], revision=revision, allow_patterns=[file, beside]))
    if not (folder / file).is_file():
        raise InputError(f"{name}: there is no {file} in {repository[1]}.")
    return folder / file


def _only(files: list[str], where: str) -> str:
    """The LoRA among a folder's files: by a usual name, or the only candidate at the top, or else below. Raises InputError otherwise."""
    usual = [file for file in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors") if file in files]
    shown = [file for file in files if not file.rpartition("/")[2].startswith(".") and file.lower().endswith((".safetensors", ".sft"))]
    loras = sorted(file for file in shown if not re.search("scheduler|optimizer|checkpoint", file))
    loras = [file for file in loras if "/" not in file] or loras
    if not usual and len(loras) != 1:
        found = f"several LoRAs: {', '.join(loras)}. Name one, such as {where}/{loras[0]}" if loras else "no .safetensors file. Name a LoRA"
        raise InputError(f"{where} has {found}.")
    return (usual or loras)[0]


@contextmanager
@torch.no_grad()
def styled(pipe: Any, styles: Sequence[Style]) -> Iterator[None]:
    """Adds LoRAs of any kind to the pipeline's weights until the context closes.

    Afterwards, also after an error, the weights are what they were, bit for bit, at the same addresses. Several files add up: each one's
    change is computed from the original weights. Quantized weights, which nothing can be added to, take plain LoRAs by hooks.
    Raises InputError for a file that is no LoRA, or for another base.
    """
    if not styles:
        yield
        return
    root = nn.ModuleDict({name: part for name, part in pipe.components.items() if name in CARRIERS and part is not None})
    names = Names(root)
    pairs = [(find_lora(name), strength) for name, strength in (one if isinstance(one, (tuple, list)) else (one, 1.0) for one in styles)]
    opened = [(path, read_adapters(path, names)[0], strength) for path, strength in pairs]
    originals: dict[Tensor, Tensor] = {}

    def add(parameter: Tensor, change: Tensor) -> None:
        # kept on the CPU, since the memory of the base's device may be short
        originals.setdefault(parameter, parameter.to("cpu", copy=True))
        parameter.copy_(parameter.float() + change.to(parameter.device))

    with ExitStack() as stack:
        try:
            for path, adapters, strength in opened:
                modules = [names.modules[place.path] for adapter in adapters for place in adapter.places]
                if not all(can_be_added_to(module.weight) for module in modules):
                    why = "and to this base's quantized weights only plain LoRAs can be added. Open it with --dtype bfloat16"
                    stack.enter_context(applied(root, plain(path, adapters, why).scaled(strength)))
                    continue
                for adapter in adapters:
                    layers = [(names.modules[place.path], place) for place in adapter.places]
                    count, first = sum(len(layer.weight) for layer, _ in layers), layers[0][0].weight
                    whole = torch.empty(count, *first.shape[1:], device=first.device)
                    for layer, place in layers:
                        whole[place.outputs(count)] = originals.get(layer.weight, layer.weight).to(whole)
                    change, bias = adapter.delta(whole, strength), adapter.bias(strength)
                    for layer, place in layers:
                        own = place.outputs(count)
                        add(layer.weight, change[own])
                        if bias is not None:
                            add(layer.bias, bias[own])
            yield
        finally:
            for parameter, original in originals.items():
                parameter.copy_(original)
