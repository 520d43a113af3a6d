"""The protocol: the people who are measured, the prompts, and what makes two measurements comparable.

People of the embedded world come with the right answer to every prompt: a true render. People of a folder have photos alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from .. import __version__, assets, photos
from ..api import HyperDreamBooth
from ..assets import toon
from ..checkpoint import read_json, read_tensors
from ..data import decoded
from ..errors import InputError, refusing
from ..folders import list_identities
from ..personal_lora import PLACEHOLDER
from ..progress import say
from .judges import Embedder, Judge

GUIDANCE: dict[str, Any] = {"guidance": 2.0, "identity_guidance": "off", "context_guidance": 6.0, "context_until": 0.3}
"""How pictures of the embedded world's people are generated: the lowest prompt guidance at which the base adds no context unasked."""

IDENTITY_GUIDANCE: dict[str, Any] = {"identity_guidance": 1.5, "identity_until": 0.3}
"""What differs for methods with identity guidance."""

LISTS = read_json(Path(assets.__file__).parent / "prompts.json")
"""The papers' lists of prompts, by the names that --prompts takes."""


@dataclass
class Atlas:
    """N people who were never trained on, and P prompts; pictures are (..., 3, H, W) in -1..1. For people of a folder `gallery`, `truths`,
    `asked` and `seen` are empty."""

    references: Tensor  # (N, 3, H, W): each person's one photo that methods are given.
    gallery: Tensor  # (N, 3, H, W): another plain picture of each person, which recognition compares with.
    truths: Tensor  # (N, P, 3, H, W): the right answers, each person rendered as each prompt asks.
    prompts: list[str]
    asked: list[dict[str, str]]  # What each prompt asks for: kind of context -> value.
    seen: list[bool]  # Whether a prompt's context was in the training data, or was held out.
    people: Sequence[int | str]  # Numbers of the embedded world's people, or names of a folder's.

    def part(self, people: slice = slice(None), prompts: slice = slice(None)) -> Atlas:
        """The atlas of some of the people and prompts."""
        few: dict[str, Any] = {name: getattr(self, name)[people] for name in ("references", "gallery", "people")}
        few |= {name: getattr(self, name)[prompts] for name in ("prompts", "asked", "seen")}
        return dataclasses.replace(self, truths=self.truths[people, prompts], **few)


def load_atlas(folder: str | Path, split: str) -> Atlas:
    """Reads an atlas from `split`.webp and `split`.json in a folder. Raises InputError where they are missing."""
    sheet, about = Path(folder) / f"{split}.webp", Path(folder) / f"{split}.json"
    if not sheet.is_file() or not about.is_file():
        raise InputError(f"{sheet} or {about} is missing: the evaluation runs in a checkout of the repository, or name one with --atlas.")
    values = read_json(about)
    side, people = values["size"], values["people"]
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    cells = pixels.reshape(len(people), side, -1, side, 3).transpose(0, 2, 4, 1, 3)
    tensor = torch.from_numpy(cells.copy()).float() / 127.5 - 1
    return Atlas(tensor[:, 0], tensor[:, 1], tensor[:, 2:], values["prompts"], values["asked"], values["seen"], people)


@dataclass
class Judges:
    """The networks that measure. `training` (M, D) are embeddings of training people, `strangers` (K, D) of people added to the gallery."""

    embedders: Mapping[str, Embedder]  # They recognize people; by the prefix of their figures' names, "" for the embedded world's.
    classifier: Judge | None = None  # Of the embedded world's contexts.
    training: Tensor = field(default_factory=lambda: torch.zeros(0))
    strangers: Tensor = field(default_factory=lambda: torch.zeros(0))


def world_judges(folder: str | Path) -> Judges:
    """The embedded world's judges, with the embeddings of training people and strangers that are in an atlas's folder."""
    files = {name: Path(folder) / f"{name}.safetensors" for name in ("training", "strangers")}
    known = {name: read_tensors(file)[0]["embeddings"].float() for name, file in files.items() if file.is_file()}
    recogniser, classifier = (Judge.from_pretrained(toon.directory(name)) for name in ("recogniser", "classifier"))
    return Judges({"": recogniser}, classifier, **known)


def read_prompts(name: str) -> list[str]:
    """The prompts of a paper's list, or of a text file with one a line. Raises InputError for a prompt without [V]."""
    if name in LISTS:
        return list(LISTS[name]["prompts"])
    what = f"{name} is no list of prompts ({', '.join(LISTS)}), nor a UTF-8 text file with one a line"
    with refusing(what, OSError, UnicodeDecodeError):
        lines = [line.strip() for line in Path(name).read_text("utf-8-sig").splitlines()]
    without = [f"{name}, line {number}: {line!r}" for number, line in enumerate(lines, 1) if line and PLACEHOLDER not in line]
    if without or not any(lines):
        raise InputError(f"{(without or [name])[0]} doesn't name the person. Write {PLACEHOLDER} where the person belongs.")
    return [line for line in lines if line]


def list_people(folder: Path) -> dict[str, list[Path]]:
    """Each person's photos, by name. Raises InputError where fewer than two people have at least two."""
    named = list_identities(folder)
    if (able := sum(len(files) > 1 for files in named.values())) < 2:
        raise InputError(f"{folder}: {able} of its people have two photos or more, and two such people are needed. Give each a folder.")
    return named


def read_people(
    files: Mapping[str, Sequence[Path]], size: int, judges: Mapping[str, Embedder]
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """The first photo of each of N people (N, 3, size, size) in -1..1, and by name and judge the embeddings (k, D) of a person's k photos.

    Photos are cropped as `personalize` does. A person is named and left out with fewer than two photos that can be read, or where a judge
    finds no face in the first one or in all others. Raises InputError where fewer than two people remain.
    """
    owners = [name for name, group in files.items() for _ in group]
    images: dict[str, list[Any]] = {name: [] for name in files}
    for some in decoded([file for group in files.values() for file in group], size, "auto", 16):
        for index, image in some.items():
            images[owners[index]].append(image)
    first, seen = [], {}
    for name, mine in images.items():
        pixels = photos.to_tensor(mine) if len(mine) > 1 else torch.zeros(0)
        found = {label: judge.embed(pixels) for label, judge in judges.items() if len(mine) > 1}
        blind = [label for label, vectors in found.items() if vectors[0].isnan().any() or vectors[1:].isnan().any(1).all()]
        if blind or len(mine) < 2:
            faceless = f"{''.join(blind[:1])} finds no face in the first, or in none of the others"
            why = faceless if blind else "two photos are needed, one to personalize"
            say(f"{name} is left out, with {len(mine)} that can be read: {why}.")
            continue
        first.append(pixels[0])
        seen[name] = found
    if len(seen) < 2:
        raise InputError(f"{len(seen)} people are left, and two are needed to be told apart. Give more people two photos that can be read.")
    return torch.stack(first), seen


def fingerprint(hdb: HyperDreamBooth, atlas: Atlas, judges: Judges) -> str:
    """A hash of all weights and pictures that figures depend on: figures of different weights must never share a table."""
    digest, world = hashlib.sha256(), judges.classifier is not None
    measuring = [*judges.embedders.values(), judges.classifier] if world else []  # on photos the judges' names are saved instead
    modules: list[Any] = [hdb.backbone.components, hdb.backbone.pipe.vae, *measuring, *([hdb.source] if hdb.source is not None else [])]
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    tensors += [atlas.references, atlas.gallery, atlas.truths, judges.training, judges.strangers]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def environment(hdb: HyperDreamBooth) -> dict[str, Any]:
    """Versions and device, which are saved beside the figures."""
    return {
        "versions": {"hyperdreambooth": __version__} | {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
        "device": str(hdb.device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
