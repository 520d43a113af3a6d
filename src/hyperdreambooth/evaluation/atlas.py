"""References, gallery and right answers of people who were never trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError


@dataclass
class Atlas:
    """N people and P prompts; pictures are (…, 3, H, W) in -1..1."""

    references: Tensor
    """(N, 3, H, W): the one photo that is given."""
    gallery: Tensor
    """(N, 3, H, W): another plain picture of each, to be recognized by."""
    truths: Tensor
    """(N, P, 3, H, W): each person as each prompt asks for."""
    prompts: list[str]
    asked: list[dict[str, str]]
    """What each prompt asks for, by kind of context."""
    seen: list[bool]
    """Whether hypernetworks trained on a prompt's context, or it was held out."""
    people: list[int]

    def first(self, count: int | None) -> Atlas:
        """Only the first people."""
        few: dict[str, Any] = {name: getattr(self, name)[:count] for name in ("references", "gallery", "truths", "people")}
        return dataclasses.replace(self, **few)

    def only(self, prompts: Sequence[int]) -> Atlas:
        """Only these prompts, by number."""
        few: dict[str, Any] = {name: [getattr(self, name)[prompt] for prompt in prompts] for name in ("prompts", "asked", "seen")}
        return dataclasses.replace(self, truths=self.truths[:, list(prompts)], **few)


def load_atlas(folder: str | Path, split: str) -> Atlas:
    """Reads `split`.webp and `split`.json. Raises InputError where they are missing."""
    sheet, about = Path(folder) / f"{split}.webp", Path(folder) / f"{split}.json"
    if not sheet.is_file() or not about.is_file():
        raise InputError(f"{sheet} or {about} is missing: the evaluation runs in a checkout of the repository, or name one with --atlas.")
    values = json.loads(about.read_text(encoding="utf-8"))
    side, people = values["size"], values["people"]
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    cells = pixels.reshape(len(people), side, -1, side, 3).transpose(0, 2, 4, 1, 3)
    tensor = torch.from_numpy(cells.copy()).float() / 127.5 - 1
    return Atlas(tensor[:, 0], tensor[:, 1], tensor[:, 2:], values["prompts"], values["asked"], values["seen"], people)
