"""Standard LoRA files: written in diffusers' or kohya's layout, read in any."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checkpoint import save_tensors
from ..errors import InputError
from ..lora import Lora, LoraSet, canonical
from . import keys
from .adapters import Adapter, read_adapters
from .keys import Names
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
    """Reads a plain LoRA in any spelling, of mixed ranks and alphas; 1 x 1 convolutions are linear layers too.

    Args:
        root: the base's components; many names can only be told apart with them. Without it they stay as they are.

    Raises InputError for a file that is no LoRA, for another base, damaged, or of a kind that is more than low-rank updates.
    """
    adapters, metadata = read_adapters(path, Names(root) if root is not None else None)
    layout = "kohya" if adapters[0].layer.startswith("lora_") else "diffusers"
    convolutions = {place.path for adapter in adapters for place in adapter.places if adapter.parts.get("down", torch.empty(0)).ndim == 4}
    loras = plain(path, adapters, "and only a plain LoRA of linear layers can be a person's. Use it as a style: generate --style FILE")
    return LoraFile(loras, metadata, layout, frozenset(convolutions))


def plain(path: str | Path, adapters: Sequence[Adapter], why: str) -> LoraSet:
    """Adapters as plain updates. Raises InputError, for the reason `why`, where one is more than that."""
    loras = LoraSet()
    for adapter in adapters:
        if adapter.kind:
            raise InputError(f"{path} is {adapter.kind} (in {adapter.layer}), {why}.")
        down, up = adapter.parts["down"].flatten(1), adapter.parts["up"].flatten(1) * adapter.scale
        for place in adapter.places:
            loras[place.path] = Lora(down, up[place.outputs(len(up))])
    return loras


def describe(path: str | Path) -> dict[str, Any]:
    """What is in a LoRA or token file, for people. Raises InputError where it is neither."""
    from .tokens import describe_tokens, is_tokens

    if is_tokens(path):
        return describe_tokens(path)
    adapters, metadata = read_adapters(path)
    if "modelspec.thumbnail" in metadata:  # thousands of letters of a picture
        thumbnail = metadata["modelspec.thumbnail"]
        metadata["modelspec.thumbnail"] = f"{thumbnail.split(',')[0]}, {len(thumbnail)} characters"
    kohya = adapters[0].layer.startswith("lora_")
    paths = [place.path for adapter in adapters for place in adapter.places]
    components = Counter("_".join(path.split("_")[:2]) if kohya else path.split(".")[0] for path in paths)
    kinds = sorted({adapter.kind for adapter in adapters} - {""})
    ranks = sorted({len(adapter.parts["down"]) for adapter in adapters if "down" in adapter.parts}) or [0]
    return {
        "file": str(path),
        "kind": f"{' and '.join(kinds) or 'LoRA'} ({'kohya' if kohya else 'diffusers'} layout)",
        "base": metadata.get("hyperdreambooth.base") or metadata.get("ss_sd_model_name") or "unknown",
        "rank": (ranks[0] or "unknown") if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "layers": len(adapters),
        "components": ", ".join(f"{name} {count}" for name, count in components.items()),
        "bytes": Path(path).stat().st_size,
        "trigger": metadata.get("modelspec.trigger_phrase", "unknown"),
        "fingerprint": "unknown" if kinds else fingerprint(plain(path, adapters, "")),
        "metadata": metadata,
    }
