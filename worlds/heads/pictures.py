"""Training pictures of the heads world: `draw` writes them to disk once, in shards of uint8, and `Pictures` reads them.

People and contexts are numbers, so a shard needs no labels: its name and `EACH` determine the person and context of every picture.
Each person has two photos to be predicted from, one picture in a context that hypernetworks may train on (`is_seen`), and two in any
context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import Context, Person, context, person, render

SIZE = 128
EACH = 5
"""Pictures per person: two photos, one in a seen context, two in any context."""
PEOPLE = 800
"""People per shard."""
FIRST = {"train": 0, "validation": 1_000_000, "test": 2_000_000}
"""First person of each split: splits are separate ranges, so nothing can leak between them."""
HELD_OUT = {
    "headwear": {"santa hat", "top hat", "headphones"},
    "light": {"backlight"},
    "background": {"snow", "starry sky", "flowers"},
    "style": {"oil"},
    "expression": {"wink", "kiss"},
}
"""Contexts that hypernetworks never train on; the base is trained on all contexts."""


def is_seen(where: Context) -> bool:
    """Whether hypernetworks may train on a context."""
    return not any(getattr(where, kind) in values for kind, values in HELD_OUT.items())


def photo(seed: int) -> Context:
    """The context of a photo: a roughly frontal view in a seen context, not at night, without a hat and mostly without glasses."""
    seed *= 1000
    while True:
        drawn = context(seed, style="photo", headwear="none")
        if is_seen(drawn) and drawn.light != "night" and drawn.eyewear != "sunglasses":
            break
        seed += 1
    eyewear = drawn.eyewear if seed % 2 else "none"
    return replace(drawn, yaw=float(np.clip(drawn.yaw, -15, 15)), pitch=float(np.clip(drawn.pitch, -6, 6)), eyewear=eyewear)


def seen(seed: int) -> Context:
    """The first seen context whose number is at least 1,000 times `seed`."""
    seed *= 1000
    while not is_seen(context(seed)):
        seed += 1
    return context(seed)


@lru_cache(maxsize=1 << 16)
def context_of(index: int) -> Context:
    """The context of picture `index` of the world, which is picture `index % EACH` of person `index // EACH`."""
    kind = index % EACH
    return photo(index) if kind < 2 else seen(index) if kind == 2 else context(index)


def shard_file(folder: Path, split: str, shard: int) -> Path:
    return folder / f"{split}-{shard:03d}.npy"


def draw(folder: Path, split: str, shard: int) -> Path:
    """Draws a shard unless its file exists; returns the file."""
    file = shard_file(folder, split, shard)
    if not file.is_file():
        first = FIRST[split] + shard * PEOPLE
        pictures = np.empty((PEOPLE * EACH, SIZE, SIZE, 3), np.uint8)
        for k in range(len(pictures)):
            pictures[k] = render(person(first + k // EACH), context_of(first * EACH + k), SIZE)
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        with partial.open("wb") as stream:
            np.save(stream, pictures)
        partial.replace(file)
    return file


@dataclass
class Pictures:
    """A split's pictures, one (N, 128, 128, 3) uint8 array per shard, memory-mapped and read from disk on access."""

    shards: list[np.ndarray]
    split: str

    @property
    def first(self) -> int:
        """The first person."""
        return FIRST[self.split]

    @staticmethod
    def load(folder: Path, split: str) -> Pictures:
        """Opens all consecutive shards that exist, from the first on; raises SystemExit if there are none."""
        shards = []
        while (file := shard_file(folder, split, len(shards))).is_file():
            shards.append(np.load(file, mmap_mode="r"))
        if not shards:
            raise SystemExit(f"{folder} holds no pictures of {split}: python -m worlds.heads.train pictures")
        return Pictures(shards, split)

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Pictures (len(indices), 128, 128, 3) uint8."""
        size = len(self.shards[0])
        return np.stack([self.shards[i // size][i % size] for i in np.asarray(indices).tolist()])

    def person(self, index: int) -> Person:
        return person(self.first + index // EACH)

    def context(self, index: int) -> Context:
        return context_of(self.first * EACH + index)
