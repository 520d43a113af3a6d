"""What a file is that isn't the LoRA that was expected, and what to do with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..checkpoint import read_tensors
from ..errors import InputError, some
from .keys import TABLES


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read_tensors`, but a file that is something else is called what it is."""
    try:
        tensors, metadata = read_tensors(path)
    except InputError as error:
        if not Path(path).is_file():
            raise
        with Path(path).open("rb") as file:
            start = file.read(64).decode("latin-1")
        for what in (what for mark, what in TABLES["files"].items() if re.match(mark, start, re.I)):
            raise InputError(f"{path} is not a whole safetensors file: it {what}") from error
        raise
    if not tensors:
        raise InputError(f"{path} holds no tensors.")
    return tensors, metadata


def refuse_names(path: str, unknown: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError for tensors' names that no LoRA has: what else the file is."""
    for mark, what in TABLES["kinds"].items():
        marked = [name for name in unknown if re.search(mark, name)]
        if marked and (len(unknown) == len(tensors) or "LoRA file" not in what):
            kind, _, advice = what.partition(". ")
            raise InputError(f"{path} {kind}: it holds {some(marked)}. {advice}.")
    if len(unknown) == len(tensors) <= 2 and all(tensor.ndim <= 2 and "." not in name for name, tensor in tensors.items()):
        raise InputError(f"{path} is a Textual Inversion embedding, no LoRA (it holds {some(unknown)}). Name a LoRA file.")
    raise InputError(
        f"{path}: {some(unknown)}: of no LoRA layout that diffusers, PEFT or ComfyUI read. Convert it, or merge it into a plain LoRA."
    )


def refuse_layers(path: str, absent: Sequence[str], count: int, metadata: Mapping[str, str], base: str) -> None:
    """Raises InputError for layers that a base doesn't have, of `count`: for which family the file is. `base`: its denoiser's class."""
    said = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    guessed = (name for mark, name in TABLES["families"].items() if any(re.search(mark, layer) for layer in absent))
    family = next(guessed, None)
    if "T5" not in (family or ""):
        family = said or ("of its kind, but larger" if len(absent) < count else family)
    kind = f"for another base ({family})" if family else "for another base, or names its layers as no tool reads them"
    raise InputError(f"{path} is a LoRA {kind}: of its {count} layers this one, a {base}, lacks {some(absent)}. Open its own base.")
