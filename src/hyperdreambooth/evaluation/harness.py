"""One way to draw, judge and keep: every method on the same people, prompts and seeds; its settings searched on other people first.

Pictures are kept by (method, person) beside the output, so that a run that was stopped goes on. People are done a few at a
time with all methods: whenever it ends, the figures are of the same people for all of them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import photos
from ..api import HyperDreamBooth
from ..checkpoint import read_tensors, save_tensors
from ..errors import InputError
from ..lora import LoraSet
from ..personal_lora import PLACEHOLDER
from ..progress import say
from ..sampling import generate
from ..settings import GenerateConfig
from ..stages.dreambooth import Subject, prior_latents
from . import metrics, report
from .evaluate import GUIDANCE, IDENTITY_GUIDANCE, Atlas, Judges, judge, predicted_loras, rounded
from .methods import LEVELS, METHODS, Method, train

PLAIN = "a face"  # Names nobody: whoever is seen in its pictures has leaked.
MARKS = (5, 10, 25, 50, 100, 200)  # Steps after which the curves' methods are looked at.
CURVES = ("DreamBooth", "DreamBooth-LoRA 4", "hypernetwork + fine-tuning")
SCORE = "perceptual_distance"  # What a search minimizes: the distance to the true render counts the person and the context alike.


@dataclass
class Bench:
    """What every method is measured on. `stamp` changes with the weights and pictures that figures depend on, `faithful_stamp` with
    the faithful hypernetwork's, which only its own pictures depend on."""

    hdb: HyperDreamBooth
    atlas: Atlas
    judges: Judges | None  # Of a world whose right answers are known.
    cache: Path
    stamp: str
    faithful: HyperDreamBooth | None = None
    faithful_stamp: str = ""
    count: int = 1  # Pictures a prompt.
    extras: bool = True  # Whether to draw nobody's face and the plain person too: a search doesn't need them.
    main: str = "similarity"  # The figure of the curves.
    drawn: GenerateConfig | None = None  # How pictures are drawn, where it isn't GUIDANCE.
    names: Sequence[str] = ()  # Of people on photos.
    texts: dict[tuple[int, bool], str] = field(default_factory=dict)
    tuned: dict[str, LoraSet] = field(default_factory=dict)  # The last people's updates: a guided row draws those of the row before it.

    @property
    def prompts(self) -> list[str]:
        """The atlas's prompts, then twice a face that is nobody's, then twice the person without more."""
        return [*self.atlas.prompts, *([PLAIN, PLAIN, self.hdb.prompt, self.hdb.prompt] if self.extras else [])]

    @cached_property
    def prior(self) -> Tensor:
        return prior_latents(self.hdb.backbone, PLAIN, 16, seed=0)

    def steps(self, method: Method) -> int:
        return method.steps or (self.hdb.personalize_config().steps if method.kind == "relaxed" else 0)

    def people(self, method: Method, who: Sequence[int]) -> tuple[Subject | None, LoraSet | None]:
        """The people's photos, where they are trained on, with what they show in words; and what the hypernetwork predicts of them.

        The base alone tells what a photo shows, unless the method begins with a prediction.
        """
        predicted, photo = None, self.atlas.references[list(who)]
        if helped := method.kind in ("prediction", "relaxed"):
            hdb = self.faithful if method.faithful and self.faithful else self.hdb
            predicted = predicted_loras(hdb, dataclasses.replace(self.atlas, references=photo))
        if not self.steps(method):
            return None, predicted
        latents = self.hdb.backbone.encode_images(photo).float()
        for index, person in enumerate(who):
            if (person, helped) not in self.texts:
                one = slice(index, index + 1)
                self.texts[person, helped] = self.hdb.describe(latents[one], predicted.select(one) if predicted else None)[0]
        texts = [[self.texts[person, helped]] for person in who]
        return Subject(latents[:, None], texts, prior=self.prior if method.prior else None), predicted

    def draw(self, who: Sequence[int], prompts: Sequence[int], loras: LoraSet | None, guided: bool = False) -> Tensor:
        """Pictures (people, prompts, count, 3, H, W), by the numbers of `prompts`; a seed follows from person, prompt and number alone.

        Raises InputError for pictures that aren't finite.
        """
        jobs = [(index, prompt, number) for index in range(len(who)) for prompt in prompts for number in range(self.count)]
        mine = loras.select(torch.tensor([index for index, _, _ in jobs], device=self.hdb.device)) if loras else None
        texts = [self.prompts[prompt].replace(PLACEHOLDER, self.hdb.identifier) for _, prompt, _ in jobs]
        config = self.drawn or dataclasses.replace(self.hdb.generate_config(), **(IDENTITY_GUIDANCE if guided else GUIDANCE), batch=40)
        seeds = [who[index] * 1000 + prompt * 10 + number for index, prompt, number in jobs]
        drawn = generate(self.hdb.backbone, texts, seeds, config, personal=mine)
        if not drawn.isfinite().all():
            raise InputError("some pictures hold values that aren't finite, so there is nothing to measure. Try --dtype float32.")
        return drawn.reshape(len(who), len(prompts), self.count, *drawn.shape[1:])

    def file(self, name: str, method: Method, step: int, person: int) -> Path:
        settings = {key: value for key, value in dataclasses.asdict(method).items() if key not in ("rates", "like")}
        depends = [settings, self.stamp, self.prompts, self.count, self.faithful_stamp * method.faithful]
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]
        return self.cache / f"{name.replace(' ', '-').replace(',', '')}-{key}" / f"{person:03d}-{step}.safetensors"

    def missing(self, name: str, method: Method, who: Sequence[int], steps: Sequence[int]) -> list[int]:
        """Those of the people whose pictures aren't kept yet."""
        if method.kind in ("true", "reconstruction"):
            return []
        return [person for person in who if not all(self.file(name, method, step, person).is_file() for step in steps)]

    def make(self, name: str, method: Method, who: Sequence[int], marks: Sequence[int] = ()) -> None:
        """Personalizes the people that aren't in the cache. Draws them at the end, and every second prompt after `marks` steps."""
        end, begins = self.steps(method), method.kind == "relaxed"
        wanted = [*sorted(mark for mark in marks if mark < end and (mark or begins)), end]
        missing = self.missing(name, method, who, wanted)
        if method.kind in ("full", "words") and len(missing) > 1:
            for person in missing:
                self.make(name, method, [person], marks)
            return
        if not missing:
            return
        say(f"{name}: people {missing[0] + 1} to {missing[-1] + 1}")
        same = f"{dataclasses.replace(method, guided=False)} {missing}"

        def keep(step: int, loras: LoraSet | None) -> None:
            shown = range(len(self.prompts)) if step == end or not self.extras else range(0, len(self.atlas.prompts), 2)
            drawn = ((self.draw(missing, shown, loras, method.guided).cpu() + 1) * 127.5).round().to(torch.uint8)
            for person, pictures in zip(missing, drawn, strict=True):
                save_tensors(self.file(name, method, step, person), {"pictures": pictures})
            self.tuned = {same: loras} if loras and step == end else {}

        if method.guided and same in self.tuned:
            keep(end, self.tuned[same])
            return
        subject, predicted = self.people(method, missing)
        if 0 in wanted:
            keep(0, predicted)
        if subject is not None:
            train(self.hdb, method, subject, predicted, wanted, keep)

    def pictures(self, name: str, method: Method, step: int, people: int, first: int = 0) -> Tensor:
        """What `make` drew of people from `first` to before `people`: (people, prompts, count, 3, H, W) in -1..1."""
        truths = self.atlas.truths[first:people, :, None]
        if method.kind == "true":
            return truths
        if method.kind == "reconstruction":
            backbone, flat = self.hdb.backbone, truths.flatten(0, 2)
            parts = [backbone.decode_images(backbone.encode_images(part)).cpu() for part in flat.split(64)]
            return torch.cat(parts).reshape(truths.shape)
        files = [self.file(name, method, step, person) for person in range(first, people)]
        return torch.stack([read_tensors(file)[0]["pictures"] for file in files]).float() / 127.5 - 1

    def alike(self, pictures: Tensor) -> Tensor:
        """Cosine of pictures (N, k, 3, H, W) to the first N people's gallery pictures: (N, k)."""
        assert self.judges is not None
        embedded = self.judges.recogniser.embed(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
        return metrics.similarity(embedded, self.judges.recogniser.embed(self.atlas.gallery[: len(pictures)]))

    def figures(self, name: str, method: Method, step: int, people: int) -> dict[str, Any]:
        """All figures of the first people, each as [mean, low, high] of a 95 % interval over people."""
        assert self.judges is not None
        pictures, count = self.pictures(name, method, step, people), len(self.atlas.prompts)
        atlas = self.atlas if pictures.shape[1] >= count else self.atlas.only(range(0, count, 2))
        found = judge(pictures[:, :count], atlas, self.judges)
        if pictures.shape[1] <= count:
            return found
        base = self.pictures("base", METHODS["base"], 0, people)[:, count : count + 2, 0]
        nobody, twice, distance = pictures[:, count : count + 2, 0], pictures[:, count + 2 :, 0], self.judges.classifier.distance
        values = {
            "leakage": self.alike(nobody) - self.alike(base),
            "prior_drift": distance(nobody.flatten(0, 1), base.flatten(0, 1)).unflatten(0, (people, 2)),
            "diversity": distance(twice[:, 0], twice[:, 1]),
        }
        return found | rounded(values)

    def likeness(self, name: str, method: Method, people: int) -> Tensor:
        """How alike the first people and their own pictures are: (people,)."""
        drawn = self.pictures(name, method, self.steps(method), people)
        return self.alike(drawn[:, : len(self.atlas.prompts), 0]).mean(1)

    def worst(self, methods: Mapping[str, Method], people: int, count: int = 3) -> dict[str, tuple[list[list[str]], list[str]]]:
        """Every method's pictures of the people whom the last of them hits worst, as grids for the report."""
        alike, grids = self.likeness(*list(methods.items())[-1], people), {}
        for person in alike.argsort()[:count].tolist():
            rows = {"reference": self.atlas.references[[person]]}
            for name, method in methods.items():
                rows[name] = self.pictures(name, method, self.steps(method), person + 1, person)[0, : len(self.atlas.prompts), 0]
            shown = [[name, *map(report.embedded, photos.to_images(row))] for name, row in rows.items()]
            grids[f"{self.names[person] if self.names else f'Person {person + 1}'}, similarity {alike[person]:.2f}"] = (
                shown,
                ["", *self.atlas.prompts],
            )
        return grids


def timed(bench: Bench, methods: Mapping[str, Method], rounds: int = 2, steps: int = 5) -> dict[str, dict[str, float]]:
    """What one person alone costs: seconds of a step (the shortest of the rounds, in which methods take turns), trained numbers."""
    found: dict[str, dict[str, float]] = {}
    for name, method in [one for _ in range(rounds) for one in methods.items()]:
        subject, predicted = bench.people(method, [0])
        if subject is not None:
            made: dict[int, LoraSet | None] = {}
            short = dataclasses.replace(method, steps=steps)
            seconds, numbers = train(bench.hdb, short, subject, predicted, (steps,), made.__setitem__)
            found[name] = {"step": min(seconds, found.get(name, {}).get("step", seconds)), "numbers": numbers}
            predicted = made[steps]
        if bench.names:
            ours = found.setdefault(name, {"step": 0.0, "numbers": 0})
            ours["bytes"] = 2 * (sum(t.numel() for lora in (predicted or {}).values() for t in (lora.down, lora.up)) or ours["numbers"])
    return found


def compare(
    bench: Bench, methods: Mapping[str, Method], timings: Mapping[str, Mapping[str, float]], everyone: int, together: int = 4
) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """Every method on every person: rows, curves, and how many people they are of, after each few of them.

    Args:
        everyone: how many of the atlas's people are personalized; the others fill the gallery up.
        together: people who are trained side by side.
    """
    for start in range(0, everyone, together):
        people = min(start + together, everyone)
        for name, method in {"base": METHODS["base"], **methods}.items():
            bench.make(name, method, range(start, people), (0, *MARKS) if name in CURVES else ())

        def point(name: str, method: Method, step: int, people: int = people) -> dict[str, Any]:
            cost = timings.get(name, {"step": 0.0, "numbers": 0})
            spent = {"steps": step, "seconds": round(step * cost["step"], 2), "numbers": int(cost["numbers"])}
            spent |= {"bytes": int(cost["bytes"])} if "bytes" in cost else {}
            return {**spent, **bench.figures(name, method, step, people)}

        curves = {}
        for name in [name for name in methods if name in CURVES]:
            end, first = bench.steps(methods[name]), [0] if methods[name].kind == "relaxed" else []
            curves[name] = [point(name, methods[name], step) for step in [*first, *(mark for mark in MARKS if mark < end), end]]
        yield {name: point(name, method, bench.steps(method)) for name, method in methods.items()}, curves, people


def search(bench: Bench, method: Method, name: str, people: int) -> dict[str, Any]:
    """The learning rate, noise levels and steps at which a method is best: every rate first, then other levels at the best one.

    Returns all that was tried, and the best of it: {"tried": [...], "best": {...}}.
    """
    tried: list[dict[str, Any]] = []

    def best() -> dict[str, Any]:
        return min(tried, key=lambda one: one[SCORE][0])

    for rate, levels in [*((rate, method.levels) for rate in method.rates), *((None, other) for other in LEVELS if other != method.levels)]:
        changed = dataclasses.replace(method, rate=rate or best()["rate"], levels=levels)
        marks = [changed.steps // 4, changed.steps // 2] if changed.steps >= 60 else []
        bench.make(name, changed, range(people), marks)
        for step in [*marks, changed.steps]:
            found = bench.figures(name, changed, step, people)
            figures = {key: found[key] for key in (SCORE, "similarity", "rank1", "context")}
            tried.append({"rate": changed.rate, "levels": levels, "steps": step, **figures})
            say(f"  rate {changed.rate:g}, {levels} levels, {step} steps: {SCORE} {found[SCORE][0]:.3f}")
    return {"tried": tried, "best": best()}


def with_settings(methods: Mapping[str, Method], found: Mapping[str, Any]) -> dict[str, Method]:
    """The methods with what a search found best for them, or for the method that they are `like`."""
    changed = {}
    for name, method in methods.items():
        best, taken = found.get(method.like or name, {}).get("best", {}), {"rate", "levels", *(() if method.like else ("steps",))}
        changed[name] = dataclasses.replace(method, **{key: best[key] for key in taken & best.keys()})
    return changed
