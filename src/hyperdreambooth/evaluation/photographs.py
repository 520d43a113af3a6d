"""Any base on anybody's photos: who is in a folder, what is asked for, and the figures that need no right answers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import assets, photos
from ..api import HyperDreamBooth
from ..checkpoint import read_json
from ..data import decoded
from ..errors import InputError
from ..folders import list_identities
from ..personal_lora import PLACEHOLDER
from ..progress import say
from . import metrics
from .evaluate import LOOKALIKES, rounded
from .harness import Bench
from .judges import Dlib, Embeds, Vision
from .methods import METHODS, Method

LISTS = read_json(Path(assets.__file__).parent / "prompts.json")
"""Prompts of papers, by the names that --prompts takes."""


def read_prompts(name: str) -> list[str]:
    """The prompts of a paper, or of a text file, one a line. Raises InputError for one that doesn't name the person."""
    if name in LISTS:
        return list(LISTS[name]["prompts"])
    try:
        lines = [line.strip() for line in Path(name).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name} is no list of prompts ({', '.join(LISTS)}), nor a UTF-8 text file with one a line ({error}).") from error
    without = [f"{name}, line {number}: {line!r}" for number, line in enumerate(lines, 1) if line and PLACEHOLDER not in line]
    if without or not any(lines):
        raise InputError(f"{(without or [name])[0]} doesn't name the person. Write {PLACEHOLDER} where the person belongs.")
    return [line for line in lines if line]


def read_people(folder: Path, size: int, judges: Mapping[str, Embeds]) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """The first photo of each of N people (N, 3, size, size) in -1..1, and by name what each judge sees in all of theirs (k, D).

    They are cropped as `personalize` does. Who has fewer than two that can be read, or no face for a judge, is named and left out.
    Raises InputError where fewer than two people remain.
    """
    named = list_identities(folder)
    files = [(name, file) for name, group in named.items() for file in group]
    images: dict[str, list[Any]] = {name: [] for name in named}
    for some in decoded([file for _, file in files], size, "auto", 16):
        for index, image in some.items():
            images[files[index][0]].append(image)
    first, seen = [], {}
    for name, mine in images.items():
        pixels = photos.to_tensor(mine) if len(mine) > 1 else torch.zeros(0)
        found = {label: judge.embed(pixels) for label, judge in judges.items() if len(mine) > 1}
        blind = [label for label, vectors in found.items() if vectors[0].isnan().any() or vectors[1:].isnan().any(1).all()]
        if blind or len(mine) < 2:
            why = (
                f"{blind[0]} finds no face in the first, or in none of the others" if blind else "two photos are needed, one to personalize"
            )
            say(f"{name} is left out, with {len(mine)} that can be read: {why}.")
            continue
        first.append(pixels[0])
        seen[name] = found
    if len(seen) < 2:
        raise InputError(f"{folder}: {len(seen)} people are left, and two are needed to be told apart. Give each a folder of photos.")
    return torch.stack(first), seen


def lacks(method: Method, hdb: HyperDreamBooth, faithful: bool) -> str:
    """What a method would need on photos, or ""."""
    if method.kind in ("true", "reconstruction"):
        return "photos have no right answers"
    if method.kind in ("prediction", "relaxed") and not (faithful if method.faithful else hdb.source):
        return f"there is no such hypernetwork for {hdb.base}: name one with {'--faithful' if method.faithful else '--hypernetwork'}"
    full = method.kind == "full" and hdb.backbone.denoiser.dtype != torch.float32
    return "all weights are trained, which needs --dtype float32" if full else ""


@dataclass
class PhotoBench(Bench):
    """The bench of photos: each judge has figures of its own. A picture without a face is wrong, and is left out of means of likeness."""

    eyes: dict[str, Embeds] = field(kw_only=True)
    folk: dict[str, dict[str, Tensor]] = field(kw_only=True)  # What `read_people` gives.
    seen: dict[Path, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.references, self.gallery, self.nearness = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for label in self.eyes:
            mine = [found[label] for found in self.folk.values()]
            others = [vectors[1:][vectors[1:].isfinite().all(1)] for vectors in mine]
            self.references[label] = torch.stack([vectors[0] for vectors in mine])
            self.gallery[label] = nn.functional.normalize(torch.stack([rest.mean(0) for rest in others]), dim=-1)
            self.nearness[label] = torch.stack([(rest @ vectors[0]).mean() for rest, vectors in zip(others, mine, strict=True)])

    def vectors(self, name: str, method: Method, step: int, people: int) -> dict[str, Tensor]:
        """What each judge sees in the first people's pictures (people, prompts, count, D); "pixel": 16 x 16 thumbnails."""
        for person in range(people):
            if (file := self.file(name, method, step, person)) not in self.seen:
                drawn = self.pictures(name, method, step, person + 1, person)[0]
                small = nn.functional.adaptive_avg_pool2d(drawn.flatten(0, 1), 16).flatten(1)
                found = {"pixel": nn.functional.normalize(small - small.mean(1, keepdim=True), dim=-1)}
                found |= {label: eyes.embed(drawn.flatten(0, 1)) for label, eyes in self.eyes.items()}
                self.seen[file] = {label: vectors.unflatten(0, drawn.shape[:2]) for label, vectors in found.items()}
        each = [self.seen[self.file(name, method, step, person)] for person in range(people)]
        return {label: torch.stack([mine[label] for mine in each]) for label in each[0]}

    def alike_by(self, label: str, vectors: Tensor) -> Tensor:
        """Cosine of the first people's pictures (N, ..., D) to their other photos, as a judge sees it: (N, ...)."""
        return metrics.similarity(vectors, self.gallery[label][: len(vectors)])

    def likeness(self, name: str, method: Method, people: int) -> Tensor:
        label, found = next(iter(self.eyes)), self.vectors(name, method, self.steps(method), people)
        return self.alike_by(label, found[label][:, : len(self.atlas.prompts)]).flatten(1).nanmean(1).nan_to_num(-1.0)

    def figures(self, name: str, method: Method, step: int, people: int) -> dict[str, Any]:
        mine, base = (self.vectors(*one, people) for one in ((name, method, step), ("base", METHODS["base"], 0)))
        values, count = dict[str, Tensor](), len(self.atlas.prompts)
        for label, vectors in mine.items():
            asked, rest, before = vectors[:, :count], vectors[:, count:], base[label][:, count:]
            found, eyes = dict[str, Tensor](), self.eyes.get(label)
            if eyes:
                gallery, near = self.gallery[label], metrics.similarity(asked, self.references[label][:people])
                found["rank1"] = (metrics.ranks(asked, gallery) == 0).float()
                found["rank1_lookalikes"] = (metrics.lookalike_ranks(asked, gallery, LOOKALIKES) == 0).float()
                found |= {"auc": metrics.auc(asked, gallery), "similarity": self.alike_by(label, asked)}
                found["copying"] = near - self.nearness[label][:people, None, None]
            if isinstance(eyes, Dlib):
                found["no_face"] = asked.isnan().any(-1).float()
            if isinstance(eyes, Vision) and eyes.clip:
                texts = eyes.embed_texts([" ".join(prompt.replace(PLACEHOLDER, " ").split()) for prompt in self.atlas.prompts])
                found["prompt"] = (asked * (texts if asked.shape[1] == count else texts[::2])[:, None]).sum(-1)
            if eyes and rest.numel():
                found["leakage"] = self.alike_by(label, rest[:, :2]) - self.alike_by(label, before[:, :2])
            if rest.numel() and not isinstance(eyes, Dlib):  # it looks at nothing but faces
                found["prior_drift"] = (1 - (rest[:, :2] * before[:, :2]).sum(-1)).clamp(min=0)
                found["diversity"] = (1 - (rest[:, 2:3] * rest[:, 3:]).sum(-1)).clamp(min=0)
            values |= {f"{label}.{figure}": value for figure, value in found.items()}
        means = {key: value.flatten(1).double().nanmean(1) for key, value in values.items()}
        return rounded({key: mean[mean.isfinite()] for key, mean in means.items() if mean.isfinite().any()})

    def agreement(self, methods: Mapping[str, Method], people: int) -> dict[str, float | None]:
        """How far two judges order all pictures alike by their likeness to their people: Spearman's correlation."""
        drawn, count = [self.vectors(name, method, self.steps(method), people) for name, method in methods.items()], len(self.atlas.prompts)
        alike = {label: torch.cat([self.alike_by(label, found[label][:, :count]).flatten() for found in drawn]) for label in self.eyes}
        return {f"{one} / {other}": metrics.spearman(alike[one], alike[other]) for one, other in itertools.combinations(alike, 2)}

    def columns(self, rows: Mapping[str, Any], titles: Mapping[str, str]) -> list[tuple[str, str]]:
        """Each judge's figures, as far as there are such, and their titles; then those of none."""
        own = [(f"{judge}.{figure}", f"{judge} {title}") for judge in (*self.eyes, "pixel") for figure, title in titles.items()]
        return [(figure, title) for figure, title in (*own, *titles.items()) if any(figure in row for row in rows.values())]
