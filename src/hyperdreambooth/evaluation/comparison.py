"""Runs several methods on a bench: their costs, their figures, and the search for each one's best settings.

All methods do a few people before the next few begin: whenever a run is stopped, all have figures of the same people.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import read_json
from ..errors import refusing
from ..lora import LoraSet
from ..progress import say
from ..settings import updated
from .bench import CURVES, Bench
from .methods import LEVELS, METHODS, Method, train

SCORE = "perceptual_distance"  # What a search minimizes: both a wrong person and a wrong context are far from the true render.


def timed(bench: Bench, methods: Mapping[str, Method], rounds: int = 2, steps: int = 5) -> dict[str, dict[str, float]]:
    """Each method's costs for one person alone: `step`, seconds of a training step (the least of some rounds, in which methods take turns);
    `numbers`, trained parameters; `bytes` of a file in half precision; on a GPU `memory`, the peak in MB, the base's weights included."""
    found: dict[str, dict[str, float]] = {name: {"step": 0.0, "numbers": 0, "bytes": 0} for name in methods}
    on_gpu = bench.hdb.device.type == "cuda"
    for turn, (name, method) in itertools.product(range(rounds), methods.items()):
        subject, predicted = bench.people(method, [0])
        costs = found[name]
        if subject is not None:
            made: dict[int, LoraSet | None] = {}
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(bench.hdb.device)
            short = dataclasses.replace(method, steps=steps)
            seconds, costs["numbers"] = train(bench.hdb, short, subject, predicted, (steps,), made.__setitem__)
            if on_gpu:
                costs["memory"] = torch.cuda.max_memory_allocated(bench.hdb.device) // 2**20
            costs["step"] = min(seconds, costs["step"]) if turn else seconds
            predicted = made[steps]
        costs["bytes"] = 2 * (sum(t.numel() for lora in (predicted or {}).values() for t in (lora.down, lora.up)) or costs["numbers"])
    return found


def make_some(bench: Bench, methods: Mapping[str, Method], who: Sequence[int]) -> None:
    """Makes some people's pictures by all methods, and by the base, which leakage and prior drift compare with."""
    for name, method in {"base": METHODS["base"], **methods}.items():
        bench.make(name, method, who, bench.marks(name, method))


def wait_for(bench: Bench, methods: Mapping[str, Method], everyone: int) -> None:
    """Waits until other processes have made all pictures."""
    todo = {"base": METHODS["base"], **methods}
    while any(
        bench.missing(name, method, range(everyone), (*bench.marks(name, method), bench.steps(method))) for name, method in todo.items()
    ):
        time.sleep(0.2)


def compare(
    bench: Bench, methods: Mapping[str, Method], timings: Mapping[str, Mapping[str, float]], everyone: int, together: int = 4
) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """Yields rows and curves by method, and the number of people that they are of, after every `together` people.

    Args:
        everyone: how many of the atlas's people are personalized; the others are in the gallery alone.
        together: how many people are trained in one batch.
    """
    for people in (*range(together, everyone, together), everyone):
        bench.make("base", METHODS["base"], range(people))
        rows, curves = dict[str, Any](), dict[str, Any]()
        for name, method in methods.items():
            step, costs = timings[name]["step"], {key: value for key, value in timings[name].items() if key != "step"}
            points = bench.points(name, method, people, bench.marks(name, method))
            points = [{"seconds": round(one["steps"] * step, 2), **costs, **one} for one in points]
            rows[name] = points[-1]
            if name in CURVES:
                curves[name] = points
        yield rows, curves, people


def search(bench: Bench, method: Method, name: str, people: int) -> dict[str, Any]:
    """Searches the learning rate, noise levels and steps with the least SCORE: first all rates, then other noise levels at the best rate.

    Returns all settings that were tried, with their figures, and the best of them: {"tried": [...], "best": {...}}.
    """
    tried: list[dict[str, Any]] = []

    def best() -> dict[str, Any]:
        return min(tried, key=lambda one: one[SCORE][0])

    others = [levels for levels in LEVELS if levels != method.levels]
    for rate, levels in [*((rate, method.levels) for rate in method.rates), *((0.0, levels) for levels in others)]:
        changed = dataclasses.replace(method, rate=rate or best()["rate"], levels=levels)
        marks = [changed.steps // 4, changed.steps // 2] if changed.steps >= 60 else []
        for point in bench.points(name, changed, people, marks):
            figures = {key: point[key] for key in ("steps", SCORE, "similarity", "rank1", "context")}
            tried.append({"rate": changed.rate, "levels": levels, **figures})
            say(f"  rate {changed.rate:g}, {levels} levels, {point['steps']} steps: {SCORE} {point[SCORE][0]:.3f}")
    return {"tried": tried, "best": best()}


def with_settings(methods: Mapping[str, Method], file: Path) -> dict[str, Method]:
    """The methods with the best settings from a search's file; a method without an entry takes the rate and noise levels of its `like`.

    Raises InputError for a wrong value. Entries whose name isn't a method's are named and ignored.
    """
    with refusing(f"{file} isn't what `evaluate --search` writes", AttributeError, KeyError, TypeError, ValueError):
        found, changed = {name: dict(one.get("best", {})) for name, one in read_json(file)["search"].items()}, {}
    if unknown := [name for name in found if name not in METHODS]:
        say(f"{file}: {' and '.join(map(repr, unknown))} is left out: there is no such method.")
    for name, method in methods.items():
        source = name if name in found or not method.like else method.like
        best, taken = found.get(source, {}), {"rate", "levels", *(("steps",) if source == name else ())}
        changed[name] = updated(method, {key: best[key] for key in taken & best.keys()}, f"{file}: {source}")
    return changed
