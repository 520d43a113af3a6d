"""Describes token files and plain LoRAs for `info` without importing torch, which takes longer than everything else there."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from .errors import refusing

TOKENS = "hyperdreambooth.tokens"
"""The key in the header of a token file that marks it as one; its value is the format's version."""
Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Layer -> down (rank, in) and up (out, rank)."""


def describe(path: str | Path) -> dict[str, Any] | None:
    """The contents of a token file, or of a LoRA of linear layers by diffusers' names; None for any other file, valid or damaged.

    Raises InputError for a damaged token file.
    """
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            metadata, names = dict(file.metadata() or {}), list(file.keys())
            if TOKENS in metadata:
                return describe_tokens(path, {name: file.get_slice(name).get_shape() for name in names}, metadata)
            parts = [re.fullmatch(r"((?:unet|transformer|text_encoder)\w*\..+)\.lora_([AB])\.weight", name) for name in names]
            layers = sorted({part[1] for part in parts if part})
            if len(names) != 2 * len(layers) or not layers:
                return None
            found = {layer: (file.get_tensor(f"{layer}.lora_A.weight"), file.get_tensor(f"{layer}.lora_B.weight")) for layer in layers}
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError):  # the last two are for bfloat16 and fp8, which numpy lacks
        return None
    for down, up in found.values():
        if (down.ndim, up.ndim) != (2, 2) or len(down) != up.shape[1] or not (np.isfinite(down).all() and np.isfinite(up).all()):
            return None
    ranks = (len(down) for down, _ in found.values())
    return summary(path, "LoRA (diffusers layout)", [layer.split(".")[0] for layer in found], ranks, fingerprint(found), metadata)


def fingerprint(factors: Factors) -> str:
    """A hash of updates' contents, rounded to fp16 (as files have them by default)."""
    digest = hashlib.sha256()
    for path in sorted(factors):
        digest.update(path.encode())
        for matrix in factors[path]:
            digest.update(matrix.astype(np.float16).tobytes())
    return digest.hexdigest()[:16]


def summary(
    path: str | Path, kind: str, components: Iterable[str], ranks: Iterable[int], digest: str, metadata: dict[str, str]
) -> dict[str, Any]:
    """A LoRA file's contents as `info` prints them. `components` and `ranks`: of each layer; `digest`: the fingerprint."""
    if picture := metadata.get("modelspec.thumbnail"):  # a data URL of thousands of characters
        metadata["modelspec.thumbnail"] = f"{picture.split(',')[0]}, {len(picture)} characters"
    counts, known = Counter(components), sorted(set(ranks)) or [0]
    return {
        "file": str(path),
        "kind": kind,
        "base": metadata.get("hyperdreambooth.base") or metadata.get("ss_sd_model_name") or "unknown",
        "rank": (known[0] or "unknown") if len(known) == 1 else f"{known[0]} to {known[-1]}",
        "layers": counts.total(),
        "components": ", ".join(f"{name} {count}" for name, count in counts.items()),
        "bytes": Path(path).stat().st_size,
        "trigger": metadata.get("modelspec.trigger_phrase", "unknown"),
        "fingerprint": digest,
        "metadata": metadata,
    }


def describe_tokens(path: str | Path, shapes: Mapping[str, list[int]], header: dict[str, str]) -> dict[str, Any]:
    """A token file's contents as `info` prints them, from its tensors' shapes and its header. Raises InputError for a damaged header."""
    with refusing(f"{path} is damaged: the recipe in its header isn't a JSON object", TypeError, ValueError):
        rank = dict(json.loads(header.get("hyperdreambooth.recipe", "{}"))).get("rank", "unknown")
    return {
        "file": str(path),
        "kind": "tokens",
        "base": header.get("base", "unknown"),
        "rank": rank,
        "layers": len(shapes),
        "variables": sum(int(np.prod(shape)) for shape in shapes.values()),
        "bytes": Path(path).stat().st_size,
        "trigger": header.get("prompt", "unknown"),
        "fingerprint": header.get("hyperdreambooth.fingerprint", "unknown"),
        "metadata": header,
    }
