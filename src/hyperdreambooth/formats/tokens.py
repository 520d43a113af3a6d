"""The token file, a safetensors file by docs/token-file.md: a person in a few numbers per layer (some 120 KB for Stable Diffusion 1.5).

Tokens can only be expanded by the aux matrices that they were made with: the fingerprint in the header is that of the recipe (frozen
aux) or of the matrices (learned aux), and a file with another fingerprint is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import read_header, read_tensors, save_tensors
from ..errors import InputError, fresh, some
from ..header import TOKENS
from ..trainable_lora import LightweightLora

VERSION = "1"


def save_tokens(
    path: str | Path, tokens: Tensor, lightweight: LightweightLora, metadata: Mapping[str, str], *, overwrite: bool = False
) -> Path:
    """Writes tokens (layers, width), in the order of `lightweight`'s targets. Raises InputError where `path` exists."""
    path = fresh(path, overwrite)
    recipe = json.dumps({key: value for key, value in lightweight.recipe().items() if key != "targets"})
    header = {TOKENS: VERSION, "hyperdreambooth.fingerprint": lightweight.fingerprint(), "hyperdreambooth.recipe": recipe, **metadata}
    return save_tensors(path, dict(zip(lightweight.targets, tokens.float(), strict=True)), header)


def is_tokens(path: str | Path) -> bool:
    """Whether a file is a token file by its header; False for anything else, also for files that can't be read."""
    try:
        return TOKENS in read_header(path)[1]
    except InputError:
        return False


def read_tokens(path: str | Path, lightweight: LightweightLora) -> Tensor:
    """Reads tokens (layers, width) in the order of `lightweight`'s targets. Raises InputError for another kind, version or fingerprint."""
    tensors, header = read_tensors(path)
    if TOKENS not in header:
        raise InputError(f"{path} is no token file.")
    if header[TOKENS] != VERSION:
        raise InputError(f"{path} is a token file of version {header[TOKENS]}; this program reads version {VERSION}. Update it.")
    mine, theirs = lightweight.fingerprint(), header.get("hyperdreambooth.fingerprint")
    if theirs != mine:
        raise InputError(f"{path} belongs to another hypernetwork or aux recipe: its fingerprint is {theirs}, this one's is {mine}.")
    if missing := [layer for layer in lightweight.targets if layer not in tensors]:
        raise InputError(f"{path} lacks {some(missing)}. Is the file whole?")
    rows, width = [tensors[layer] for layer in lightweight.targets], lightweight.config.width
    if any(tuple(row.shape) != (width,) or not row.is_floating_point() or not row.float().isfinite().all() for row in rows):
        raise InputError(f"{path} is damaged: its tokens aren't {width} finite numbers a layer.")
    return torch.stack([row.float() for row in rows])
