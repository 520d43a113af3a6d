"""How a base is opened, and which family it is of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .base import Backbone
from .flux import Flux
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL

FAMILIES: dict[str, Callable[[Any], Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}
"""diffusers' pipeline -> the family that it is of. A new family is a file of its own and a line here."""


def load_backbone(base: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """Opens a base: "toon" (shipped), a diffusers directory, a single .safetensors checkpoint of SD 1.x, SD 2.x or SDXL, or a hub id.

    What the pipeline is chooses the family.

    Raises InputError where it isn't a pipeline of a supported family.
    """
    import diffusers

    source = resolve_base(base)
    if Path(source).is_file():
        from .single_file import load_single_file

        return wrap(load_single_file(Path(source), dtype).to(device), source)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype, **absent(source))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{base} can't be opened as a base: {str(error).splitlines()[0]} "
            'Give "toon", a directory in diffusers\' layout (with model_index.json), a .safetensors checkpoint, or a hub id.'
        ) from error
    return wrap(pipe.to(device), str(base))


def absent(source: str) -> dict[str, None]:
    """The text encoders that a directory was saved without (SD 3 runs without any two): diffusers wants to be told."""
    index = Path(source) / "model_index.json"
    if not index.is_file():
        return {}
    parts = json.loads(index.read_text(encoding="utf-8"))
    text = {name: kind for name, kind in parts.items() if name.startswith(("text_encoder", "tokenizer"))}
    return {name: None for name, kind in text.items() if kind == [None, None] or not (index.parent / name).is_dir()}


def wrap(pipe: Any, name: str) -> Backbone:
    """The backbone of a loaded pipeline. Raises InputError for another kind of pipeline."""
    kind = type(pipe).__name__
    if kind not in FAMILIES:
        raise InputError(f"{name} is a {kind}; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[kind](pipe)


def resolve_base(base: str | Path) -> str:
    """The directory of a shipped base, or `base` as given."""
    from ..assets import toon

    if str(base) == "toon":
        return str(toon.directory("base"))
    path = Path(base)
    if path.suffix in (".safetensors", ".ckpt") and not path.exists():
        raise InputError(f"{base}: no such file.")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise InputError(f"{base} has no model_index.json, so it isn't a base in diffusers' layout.")
    return str(base)
