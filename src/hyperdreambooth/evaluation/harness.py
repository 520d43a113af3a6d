"""The comparison: every method on the same people, prompts and seeds; its settings searched on other people first.

Pictures are kept by (method, person) beside the output, so that a run that was stopped goes on. People are done a few at a
time with all methods: whenever it ends, the figures are of the same people for all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import HyperDreamBooth
from ..checkpoint import read_tensors, save_tensors
from ..lora import LoraSet
from ..personal_lora import PLACEHOLDER
from ..progress import say
from ..stages.dreambooth import Subject, prior_latents
from ..stages.generate import generate
from . import metrics
from .atlas import Atlas
from .evaluate import GUIDANCE, Judges, judge, predicted_loras
from .methods import LEVELS, METHODS, Method, train

PLAIN = "a face"
"""Names nobody: whoever is seen in its pictures has leaked."""
MARKS = (5, 10, 25, 50, 100, 200)
"""Steps after which the curves' methods are looked at."""
CURVES = ("DreamBooth", "DreamBooth-LoRA 4", "hypernetwork + fine-tuning")
SCORE = "perceptual_distance"
"""What a search minimizes: the distance to the true render counts the person and the context alike."""
SETTINGS = ("rate", "levels", "steps")


@dataclass
class Bench:
    """What every method is measured on, and where its pictures are kept."""

    hdb: HyperDreamBooth
    atlas: Atlas
    judges: Judges
    cache: Path
    stamp: str
    """Changes with the weights and pictures that figures depend on."""
    faithful: HyperDreamBooth | None = None
    extras: bool = True
    texts: dict[tuple[int, bool], str] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """The atlas's prompts, then twice a face that is nobody's, then twice the person without more."""
        return [*self.atlas.prompts, *([PLAIN, PLAIN, self.hdb.prompt, self.hdb.prompt] if self.extras else [])]

    @cached_property
    def prior(self) -> Tensor:
        return prior_latents(self.hdb.backbone, PLAIN, 16, seed=0)

    def predicted(self, method: Method, who: Sequence[int]) -> LoraSet | None:
        if method.kind not in ("prediction", "relaxed"):
            return None
        hdb = self.faithful if method.faithful and self.faithful else self.hdb
        return predicted_loras(hdb, dataclasses.replace(self.atlas, references=self.atlas.references[list(who)]))

    def subject(self, method: Method, who: Sequence[int], predicted: LoraSet | None) -> Subject:
        """The people's photos, with what they show as the base tells it: for a hypernetwork's people beside its prediction."""
        latents = self.hdb.backbone.encode_images(self.atlas.references[list(who)]).float()
        helped = predicted is not None
        for index, person in enumerate(who):
            if (person, helped) not in self.texts:
                mine = predicted.select(slice(index, index + 1)) if predicted else None
                self.texts[person, helped] = self.hdb.describe(latents[index : index + 1], mine)[0]
        return Subject(latents[:, None], [[self.texts[person, helped]] for person in who], prior=self.prior if method.prior else None)

    def draw(self, who: Sequence[int], prompts: Sequence[int], loras: LoraSet | None) -> Tensor:
        """Pictures (people, prompts, 3, H, W), by the numbers of `prompts`; the seeds are the protocol's."""
        jobs = [(index, prompt) for index in range(len(who)) for prompt in prompts]
        mine = loras.select(torch.tensor([index for index, _ in jobs], device=self.hdb.device)) if loras else None
        texts = [self.prompts[prompt].replace(PLACEHOLDER, self.hdb.identifier) for _, prompt in jobs]
        seeds = [who[index] * 1000 + prompt * 10 for index, prompt in jobs]
        config = dataclasses.replace(self.hdb.generate_config(), **GUIDANCE, batch=24)
        return generate(self.hdb.backbone, texts, seeds, config, personal=mine).unflatten(0, (len(who), len(prompts)))

    def file(self, name: str, method: Method, step: int, person: int) -> Path:
        settings = {key: value for key, value in dataclasses.asdict(method).items() if key not in ("rates", "like")}
        key = hashlib.sha256(json.dumps([settings, self.stamp, self.prompts], sort_keys=True).encode()).hexdigest()[:8]
        return self.cache / f"{name.replace(' ', '-').replace(',', '')}-{key}" / f"{person:03d}-{step}.safetensors"

    def steps(self, method: Method) -> int:
        return method.steps or (self.hdb.personalize_config().steps if method.kind == "relaxed" else 0)

    def shown(self, method: Method, step: int) -> list[int]:
        """Every prompt at a method's end; on the way to it every second one of the atlas's."""
        whole = step == self.steps(method) or not self.extras
        return list(range(len(self.prompts))) if whole else list(range(0, len(self.atlas.prompts), 2))

    def make(self, name: str, method: Method, who: Sequence[int], marks: Sequence[int] = ()) -> None:
        """Personalizes the people that aren't in the cache and draws them, at the end and after `marks` steps."""
        end = self.steps(method)
        wanted = sorted({mark for mark in marks if mark < end and (mark or method.kind == "relaxed")} | {end})
        missing = [person for person in who if not all(self.file(name, method, step, person).is_file() for step in wanted)]
        if not missing or method.kind == "true":
            return
        if method.alone and len(missing) > 1:
            for person in missing:
                self.make(name, method, [person], marks)
            return
        say(f"{name}: people {missing[0] + 1} to {missing[-1] + 1}")

        def keep(step: int, loras: LoraSet | None) -> None:
            drawn = ((self.draw(missing, self.shown(method, step), loras).cpu() + 1) * 127.5).round().to(torch.uint8)
            for person, pictures in zip(missing, drawn, strict=True):
                save_tensors(self.file(name, method, step, person), {"pictures": pictures})

        predicted = self.predicted(method, missing)
        if 0 in wanted:
            keep(0, predicted)
        if end:
            train(self.hdb, method, self.subject(method, missing, predicted), predicted, wanted, keep)

    def pictures(self, name: str, method: Method, step: int, people: int) -> Tensor:
        """What `make` drew of the first people: (people, prompts, 3, H, W) in -1..1."""
        if method.kind == "true":
            return self.atlas.truths[:people]
        files = [self.file(name, method, step, person) for person in range(people)]
        return torch.stack([read_tensors(file)[0]["pictures"] for file in files]).float() / 127.5 - 1

    def figures(self, name: str, method: Method, step: int, people: int) -> dict[str, Any]:
        """All figures of the first people, each as [mean, low, high] of a 95 % interval over people."""
        pictures, count = self.pictures(name, method, step, people), len(self.atlas.prompts)
        if pictures.shape[1] < count:
            return judge(pictures[:, :, None], self.atlas.only(range(0, count, 2)), self.judges)
        found = judge(pictures[:, :count, None], self.atlas, self.judges)
        if pictures.shape[1] > count:
            nobody, base, twice = (
                pictures[:, count : count + 2],
                self.pictures("base", METHODS["base"], 0, people),
                pictures[:, count + 2 :],
            )
            gallery = self.judges.recogniser.embed(self.atlas.gallery[:people])
            alike = [
                metrics.similarity(self.judges.recogniser.embed(some.flatten(0, 1)).unflatten(0, some.shape[:2]), gallery)
                for some in (nobody, base[:, count : count + 2])
            ]
            values = {
                "leakage": alike[0] - alike[1],
                "prior_drift": self.judges.classifier.distance(nobody.flatten(0, 1), base[:, count : count + 2].flatten(0, 1)).unflatten(
                    0, (people, 2)
                ),
                "diversity": self.judges.classifier.distance(twice[:, 0], twice[:, 1]),
            }
            found |= {key: [round(float(figure), 4) for figure in metrics.interval(value)] for key, value in values.items()}
        return found


def timed(bench: Bench, methods: Mapping[str, Method], rounds: int = 2, steps: int = 5) -> dict[str, dict[str, float]]:
    """What one person alone costs: seconds of a step, numbers that are trained.

    Methods take turns, and the shortest of the rounds counts: whatever else the machine does meets all of them.
    """
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, method in methods.items():
            if bench.steps(method):
                predicted = bench.predicted(method, [0])
                short = dataclasses.replace(method, steps=steps)
                seconds, numbers = train(bench.hdb, short, bench.subject(method, [0], predicted), predicted, (), lambda *_: None)
                found[name] = {"step": min(seconds, found.get(name, {}).get("step", seconds)), "numbers": numbers}
    return found


def compare(
    bench: Bench,
    methods: Mapping[str, Method],
    timings: Mapping[str, Mapping[str, float]],
    everyone: int,
    save: Callable[[dict[str, Any], dict[str, Any], int], None],
    together: int = 4,
) -> None:
    """Every method on every person; `save(rows, curves, people)` after each few of them.

    Args:
        everyone: how many of the atlas's people are personalized; the others fill the gallery up.
        together: people who are trained side by side.
    """
    for start in range(0, everyone, together):
        people = min(start + together, everyone)
        for name, method in {"base": METHODS["base"], **methods}.items():
            bench.make(name, method, range(start, people), (0, *MARKS) if name in CURVES else ())
        rows, curves = {}, {}
        for name, method in methods.items():
            end, cost = bench.steps(method), timings.get(name, {})
            rows[name] = bench.figures(name, method, end, people) | {
                "costs": {"steps": end, "seconds": round(end * cost.get("step", 0), 2), "numbers": int(cost.get("numbers", 0))}
            }
            if name in CURVES:
                first = [0] if method.kind == "relaxed" else []
                curves[name] = [
                    {"steps": step, "seconds": round(step * cost.get("step", 0), 2), **bench.figures(name, method, step, people)}
                    for step in [*first, *(mark for mark in MARKS if mark < end), end]
                ]
        save(rows, curves, people)


def search(bench: Bench, method: Method, name: str, people: int) -> dict[str, Any]:
    """The learning rate, noise levels and steps at which a method is best: every rate first, then other levels at the best one.

    Returns all that was tried, and the best of it: {"tried": [...], "best": {...}}.
    """
    tried: list[dict[str, Any]] = []

    def attempt(changed: Method) -> None:
        marks = [changed.steps // 4, changed.steps // 2] if changed.steps >= 100 else []
        bench.make(name, changed, range(people), marks)
        for step in [*marks, changed.steps]:
            found = bench.figures(name, changed, step, people)
            figures = {key: found[key] for key in (SCORE, "similarity", "rank1", "context")}
            tried.append({"rate": changed.rate, "levels": changed.levels, "steps": step, **figures})
            say(f"  rate {changed.rate:g}, {changed.levels} levels, {step} steps: {SCORE} {found[SCORE][0]:.3f}")

    def best() -> dict[str, Any]:
        return min(tried, key=lambda one: one[SCORE][0])

    for rate in method.rates:
        attempt(dataclasses.replace(method, rate=rate))
    for levels in [levels for levels in LEVELS if levels != method.levels]:
        attempt(dataclasses.replace(method, rate=best()["rate"], levels=levels))
    return {"tried": tried, "best": best()}


def with_settings(methods: Mapping[str, Method], found: Mapping[str, Any]) -> dict[str, Method]:
    """The methods with what a search found best for them, or for the method that they are `like`."""
    changed = {}
    for name, method in methods.items():
        best = found.get(method.like or name, {}).get("best", {})
        same = not method.like or METHODS[method.like].steps == method.steps
        changed[name] = dataclasses.replace(method, **{key: value for key, value in best.items() if key in SETTINGS[: 2 + same]})
    return changed
