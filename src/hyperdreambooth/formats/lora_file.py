"""Standard LoRA files: written in diffusers' or kohya's layout, read in any."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checkpoint import read_tensors, save_tensors
from ..errors import InputError, some
from ..lora import Lora, LoraSet, canonical, canonical_modules
from . import keys
from .metadata import hashes

Layout = Literal["diffusers", "kohya"]


@dataclass
class LoraFile:
    """What a LoRA file holds; updates are unbatched float32 by canonical path."""

    loras: LoraSet
    metadata: dict[str, str]
    layout: str
    convolutions: frozenset[str] = frozenset()
    """Layers that are 1 x 1 convolutions in their base."""


def fingerprint(loras: LoraSet) -> str:
    """A hash of the updates' contents (as fp16, as they are written)."""
    digest = hashlib.sha256()
    for path in sorted(loras):
        digest.update(path.encode())
        for tensor in (loras[path].down, loras[path].up):
            digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def filled(lora: Lora, rank: int) -> Lora:
    """The same update at a higher rank, filled up with zeros."""
    fill = rank - lora.rank
    return Lora(nn.functional.pad(lora.down, (0, 0, 0, fill)), nn.functional.pad(lora.up, (0, fill)))


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
    """Writes one person's updates, with hashes beside `metadata`.

    Args:
        convolutions: layers that are 1 x 1 convolutions in their base; their matrices are written as such.

    Raises InputError where `path` exists, or a value would overflow `dtype`.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists. Give --overwrite to replace it, or another path.")
    tensors: dict[str, Tensor] = {}
    sdxl = metadata.get("ss_base_model_version", "").startswith("sdxl")
    two = sdxl or any(layer.startswith("text_encoder_2") for layer in loras)
    batched = [layer for layer, lora in loras.items() if lora.down.ndim != 2]
    if batched:
        raise ValueError(f"{batched[0]}: a file holds one person's update, not a batch; select() one")
    largest = max(lora.rank for lora in loras.values())
    # one rank for all, as `ss_network_dim` is one number: diffusers' converter of kohya's layout loses the attention layers' own
    # alphas, and its older versions scale mixed ranks wrongly in their own layout too
    loras = LoraSet({layer: filled(lora, largest) for layer, lora in loras.items()})
    for layer, lora in loras.items():
        down, up = lora.down.to(dtype), lora.up.to(dtype)
        if not Lora(down, up).is_finite():
            raise InputError(f"{layer}: the update doesn't fit {dtype}. Write float32, or train with a lower learning rate.")
        if layer in convolutions:
            down, up = down[..., None, None], up[..., None, None]
        if layout == "diffusers":
            tensors |= {f"{canonical(layer)}.lora_A.weight": down, f"{canonical(layer)}.lora_B.weight": up}
        else:
            name = keys.kohya_name(layer, two_text_encoders=two)
            # loaders scale by alpha / rank: alpha = rank leaves up @ down as it is
            tensors |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(float(largest), dtype=dtype),
            }
    header = {"format": "pt", **metadata, "hyperdreambooth.fingerprint": fingerprint(loras)}
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save_tensors(path, ready, header | hashes(ready, header))


def read_lora(path: str | Path, root: nn.Module | None = None) -> LoraFile:
    """Reads a LoRA in diffusers', PEFT's or kohya's layout, of mixed ranks and alphas; 1 x 1 convolutions are matrices too.

    Args:
        root: the base's components; kohya's names can only be told apart with them. Without it they stay as they are.

    Raises InputError for a file that is no LoRA, a DoRA, unknown names, a missing half, a layer that comes twice, numbers that
    aren't finite, or larger convolutions.
    """
    tensors, metadata = read_tensors(path)
    if keys.is_kohya_flux(tensors):
        tensors = _from_kohya_flux(tensors, str(path))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, (layer, side) in keys.split(tensors, str(path)).items():
        parts.setdefault(layer, {})[side] = tensors[key]
    if not parts:
        raise InputError(f"{path} holds no tensors.")
    kohya = next(iter(parts)).startswith("lora_")
    config = _peft_config(Path(path), metadata)
    known = keys.kohya_paths(canonical_modules(root)) if kohya and root is not None else {}
    absent = [layer for layer in parts if layer not in known] if kohya and root is not None else []
    if absent:
        raise InputError(f"{path} is a LoRA for another base: of its {len(parts)} layers this one lacks {some(absent)}. Open its own base.")
    loras, convolutions = LoraSet(), set()
    for layer, sides in parts.items():
        if "down" not in sides or "up" not in sides:
            raise InputError(f"{path}: {layer} has no {'down' if 'up' in sides else 'up'} matrix. Is the file whole?")
        name = layer if kohya and root is None else known[layer] if kohya else keys.to_path(layer)
        down, up = (_matrix(sides[side], f"{path}: {layer}") for side in ("down", "up"))
        if down.shape[0] != up.shape[1]:
            raise InputError(f"{path}: {layer} is broken: rank {down.shape[0]} on its way down, {up.shape[1]} on its way up.")
        if not Lora(down, up).is_finite():
            raise InputError(f"{path}: {layer} holds numbers that aren't finite. Its training diverged, or the file is damaged.")
        if name in loras:
            raise InputError(f"{path}: {name} comes twice, the second time as {layer}.")
        if "alpha" in sides and sides["alpha"].numel() != 1:
            raise InputError(f"{path}: {layer}.alpha holds {sides['alpha'].numel()} numbers, expected one.")
        try:
            scale = sides["alpha"].float().item() / down.shape[0] if "alpha" in sides else _scale(config, name, down.shape[0])
        except (ArithmeticError, AttributeError, TypeError, ValueError, re.error) as error:
            raise InputError(
                f"{path}: PEFT's configuration gives {layer} no scale ({error}): lora_alpha or alpha_pattern is wrong."
            ) from error
        loras[name] = Lora(down, up * scale)
        if not loras[name].is_finite():
            raise InputError(f"{path}: {layer} has a scale of {scale:g}, with which it isn't finite: its alpha is damaged.")
        if sides["down"].ndim == 4:
            convolutions.add(name)
    return LoraFile(loras, metadata, "kohya" if kohya else "diffusers", frozenset(convolutions))


def _from_kohya_flux(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Kohya's Flux LoRA in diffusers' layout, by diffusers' own converter: query, key and value apart, alphas folded in."""
    from diffusers import FluxPipeline

    try:
        return dict(FluxPipeline.lora_state_dict(tensors))
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} is no Flux LoRA that diffusers can convert: {str(error).splitlines()[0]}") from error


def _peft_config(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """PEFT's configuration of a file without `.alpha`: its header's (where diffusers puts it) or adapter_config.json's (PEFT).

    It is taken out of the header: the scale is folded into `up`, and a copy that kept it would be scaled twice.
    """
    text, where = metadata.pop("lora_adapter_metadata", None), f"{path}: lora_adapter_metadata"
    beside = path.with_name("adapter_config.json")
    if text is None and path.name == "adapter_model.safetensors" and beside.is_file():
        text, where = beside.read_text(encoding="utf-8"), str(beside)
    try:
        return dict(json.loads(text or "{}"))
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} isn't a JSON object ({error}), so the LoRA's scale is unknown.") from error


def _scale(config: dict[str, Any], path: str, rank: int) -> float:
    """A layer's alpha / rank by PEFT's configuration (diffusers: one for each component); 1 without one."""
    component, _, rest = path.partition(".")
    alpha, patterns, rslora = (
        config.get(f"{component}.{name}", config.get(name)) for name in ("lora_alpha", "alpha_pattern", "use_rslora")
    )
    if alpha is None:
        return 1.0
    # PEFT's patterns are regular expressions of a path's end
    alpha = next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", rest)), alpha)
    return float(alpha) / (math.sqrt(rank) if rslora else rank)


def _matrix(tensor: Tensor, where: str) -> Tensor:
    """A weight as a float32 matrix; 1 x 1 convolutions are linear layers too."""
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    if tensor.ndim != 2:
        raise InputError(f"{where} is a LoRA of a convolution ({'x'.join(map(str, tensor.shape))}); only linear layers are supported.")
    return tensor.float()


def describe(path: str | Path) -> dict[str, Any]:
    """What is in a LoRA or token file, for people. Raises InputError where it is neither."""
    from .tokens import describe_tokens, is_tokens

    if is_tokens(path):
        return describe_tokens(path)
    file = read_lora(path)
    metadata = dict(file.metadata)
    if "modelspec.thumbnail" in metadata:  # thousands of letters of a picture
        metadata["modelspec.thumbnail"] = (
            f"{metadata['modelspec.thumbnail'].split(',')[0]}, {len(metadata['modelspec.thumbnail'])} characters"
        )
    components: dict[str, int] = {}
    for layer in file.loras:
        component = layer.split(".")[0] if file.layout == "diffusers" else "_".join(layer.split("_")[:2])
        components[component] = components.get(component, 0) + 1
    ranks = sorted({lora.rank for lora in file.loras.values()})
    return {
        "file": str(path),
        "kind": f"LoRA ({file.layout} layout)",
        "base": file.metadata.get("hyperdreambooth.base") or file.metadata.get("ss_sd_model_name") or "unknown",
        "rank": ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "layers": len(file.loras),
        "components": ", ".join(f"{name} {count}" for name, count in components.items()),
        "bytes": Path(path).stat().st_size,
        "trigger": file.metadata.get("modelspec.trigger_phrase", "unknown"),
        "fingerprint": fingerprint(file.loras),
        "metadata": metadata,
    }
