"""The pictures that the heads world trains on, drawn to disk in shards of uint8: `draw` once, `Pictures` ever after.

A person is a number and so is a context, so a shard needs no labels: its name and `EACH` tell who and what every picture shows.
Of each person there are two photos to be predicted from, one picture in a context that hypernetworks may train on (`is_seen`), and two
in any context at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import Context, Person, context, person, render

SIZE = 128
EACH = 5
"""Pictures a person: two photos, a seen context, two of any kind."""
PEOPLE = 800
"""People a shard."""
FIRST = {"train": 0, "validation": 1_000_000, "test": 2_000_000}
"""First person of each split: a split is a range, and nothing can leak."""
HELD_OUT = {
    "headwear": {"santa hat", "top hat", "headphones"},
    "light": {"backlight"},
    "background": {"snow", "starry sky", "flowers"},
    "style": {"oil"},
    "expression": {"wink", "kiss"},
}
"""What hypernetworks never train on; the base knows all of it."""


def is_seen(where: Context) -> bool:
    """Whether hypernetworks may train on a context."""
    return not any(getattr(where, kind) in values for kind, values in HELD_OUT.items())


def photo(seed: int) -> Context:
    """What somebody's photo shows: a face from the front in a friendly light, no hat, seldom glasses."""
    seed *= 1000
    while True:
        drawn = context(seed, style="photo", headwear="none")
        if is_seen(drawn) and drawn.light != "night" and drawn.eyewear != "sunglasses":
            break
        seed += 1
    eyewear = drawn.eyewear if seed % 2 else "none"
    return replace(drawn, yaw=float(np.clip(drawn.yaw, -15, 15)), pitch=float(np.clip(drawn.pitch, -6, 6)), eyewear=eyewear)


def seen(seed: int) -> Context:
    """The first seen context from `seed` on."""
    seed *= 1000
    while not is_seen(context(seed)):
        seed += 1
    return context(seed)


@lru_cache(maxsize=1 << 16)
def context_of(index: int) -> Context:
    """The context of picture `index` of the world: person `index // EACH`, picture `index % EACH`."""
    kind = index % EACH
    return photo(index) if kind < 2 else seen(index) if kind == 2 else context(index)


def shard_file(folder: Path, split: str, shard: int) -> Path:
    return folder / f"{split}-{shard:03d}.npy"


def draw(folder: Path, split: str, shard: int) -> Path:
    """Draws a shard, if it isn't there."""
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
    """A split's pictures, (N, 128, 128, 3) uint8 each shard, read from disk as they are asked for."""

    shards: list[np.ndarray]
    split: str

    @property
    def first(self) -> int:
        """The first person."""
        return FIRST[self.split]

    @staticmethod
    def load(folder: Path, split: str) -> Pictures:
        """All shards that are there, from the first on."""
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
