"""Standard LoRA files: written in diffusers' or kohya's layout, read in any."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoint import read_tensors, save_tensors
from ..errors import InputError
from ..lora import Lora, LoraSet, Shape, canonical_modules
from . import keys

Layout = Literal["diffusers", "kohya"]


@dataclass
class LoraFile:
    """What a LoRA file holds; updates are unbatched float32 by canonical path."""

    loras: LoraSet
    metadata: dict[str, str]
    layout: str

    def shapes(self) -> dict[str, Shape]:
        """Layer -> (inputs, outputs)."""
        return {path: Shape(lora.down.shape[1], lora.up.shape[0]) for path, lora in self.loras.items()}


def fingerprint(loras: LoraSet) -> str:
    """A hash of the updates' contents (as fp16, as they are written)."""
    digest = hashlib.sha256()
    for path in sorted(loras):
        digest.update(path.encode())
        for tensor in (loras[path].down, loras[path].up):
            digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def standard_metadata(
    loras: LoraSet, *, title: str, base: str, trigger: str, identifier: str, resolution: int | None = None
) -> dict[str, str]:
    """The header that UIs read: `modelspec.*` (Stability's model metadata standard) and kohya's `ss_*`."""
    rank = max(lora.rank for lora in loras.values())
    architecture = (
        "stable-diffusion-xl-v1-base/lora" if any(path.startswith("text_encoder_2") for path in loras) else "stable-diffusion-v1/lora"
    )
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": f"weight 1.0, prompt: {trigger}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_base_model_version": architecture.split("/")[0],
        "ss_sd_model_name": base,
        "ss_output_name": title,
        "ss_tag_frequency": json.dumps({"hyperdreambooth": {trigger: 1}}),
        "hyperdreambooth.version": __version__,
        "hyperdreambooth.base": base,
        "hyperdreambooth.identifier": identifier,
        "hyperdreambooth.fingerprint": fingerprint(loras),
    }
    if resolution:
        metadata["modelspec.resolution"] = f"{resolution}x{resolution}"
    return metadata


def save_lora(
    path: str | Path,
    loras: LoraSet,
    metadata: dict[str, str],
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
) -> Path:
    """Writes one person's updates. Raises InputError where `path` exists, or a value would overflow `dtype`."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists. Give --overwrite to replace it, or another path.")
    tensors: dict[str, Tensor] = {}
    two = any(layer.startswith("text_encoder_2") for layer in loras)
    for layer, lora in loras.items():
        if lora.down.ndim != 2:
            raise ValueError(f"{layer}: a file holds one person's update, not a batch; select() one")
        down, up = lora.down.to(dtype), lora.up.to(dtype)
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise InputError(f"{layer}: the update doesn't fit {dtype}. Write float32, or train with a lower learning rate.")
        if layout == "diffusers":
            tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        else:
            name = keys.kohya_name(layer, two_text_encoders=two)
            # loaders scale by alpha / rank: alpha = rank leaves up @ down as it is
            tensors |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(float(lora.rank), dtype=dtype),
            }
    return save_tensors(path, tensors, {"format": "pt", **metadata})


def read_lora(path: str | Path, root: nn.Module | None = None) -> LoraFile:
    """Reads a LoRA in diffusers', PEFT's or kohya's layout, of mixed ranks and alphas.

    Args:
        root: the base's components; kohya's names can only be told apart with them. Without it they stay as they are.

    Raises InputError for a file that is no LoRA, a DoRA, unknown names, a missing half, or convolutions.
    """
    tensors, metadata = read_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, side = keys.split(key, str(path))
        parts.setdefault(layer, {})[side] = value
    if not parts:
        raise InputError(f"{path} holds no tensors.")
    kohya = next(iter(parts)).startswith("lora_")
    known = keys.kohya_paths(canonical_modules(root)) if kohya and root is not None else {}
    loras = LoraSet()
    for layer, sides in parts.items():
        if "down" not in sides or "up" not in sides:
            raise InputError(f"{path}: {layer} has no {'down' if 'up' in sides else 'up'} matrix. Is the file whole?")
        if kohya and root is not None and layer not in known:
            raise InputError(f"{path} is a LoRA for another base: {layer} isn't in this one.")
        name = layer if kohya and root is None else known[layer] if kohya else keys.to_path(layer)
        down, up = (_matrix(sides[side], f"{path}: {layer}") for side in ("down", "up"))
        if "alpha" in sides:
            up = up * (sides["alpha"].float().item() / down.shape[0])
        loras[name] = Lora(down, up)
    return LoraFile(loras, metadata, "kohya" if kohya else "diffusers")


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
        "metadata": file.metadata,
    }
