"""Methods beside one another on a bench: what each costs, their figures few people at a time, and each one's best settings, searched.

People are done a few at a time with all methods: whenever it ends, the figures are of the same people for all of them.
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
from .harness import CURVES, Bench
from .methods import LEVELS, METHODS, Method, train

SCORE = "perceptual_distance"  # What a search minimizes: the distance to the true render counts the person and the context alike.


def timed(bench: Bench, methods: Mapping[str, Method], rounds: int = 2, steps: int = 5) -> dict[str, dict[str, float]]:
    """What one person alone costs: seconds of a step (the shortest of the rounds, in which methods take turns), trained numbers, bytes of a
    file in half precision, and on a GPU the peak memory in MB, the base's weights included."""
    found: dict[str, dict[str, float]] = {name: {"step": 0.0, "numbers": 0, "bytes": 0} for name in methods}
    on_gpu = bench.hdb.device.type == "cuda"
    for turn, (name, method) in itertools.product(range(rounds), methods.items()):
        subject, predicted = bench.people(method, [0])
        ours = found[name]
        if subject is not None:
            made: dict[int, LoraSet | None] = {}
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(bench.hdb.device)
            short = dataclasses.replace(method, steps=steps)
            seconds, ours["numbers"] = train(bench.hdb, short, subject, predicted, (steps,), made.__setitem__)
            if on_gpu:
                ours["memory"] = torch.cuda.max_memory_allocated(bench.hdb.device) // 2**20
            ours["step"] = min(seconds, ours["step"]) if turn else seconds
            predicted = made[steps]
        ours["bytes"] = 2 * (sum(t.numel() for lora in (predicted or {}).values() for t in (lora.down, lora.up)) or ours["numbers"])
    return found


def make_some(bench: Bench, methods: Mapping[str, Method], who: Sequence[int]) -> None:
    """Makes some people's pictures by all methods, and by the base, beside which others are looked at."""
    for name, method in {"base": METHODS["base"], **methods}.items():
        bench.make(name, method, who, bench.marks(name, method))


def wait_for(bench: Bench, methods: Mapping[str, Method], everyone: int) -> None:
    """Until other processes have made all pictures."""
    todo = {"base": METHODS["base"], **methods}
    while any(
        bench.missing(name, method, range(everyone), (*bench.marks(name, method), bench.steps(method))) for name, method in todo.items()
    ):
        time.sleep(0.2)


def compare(
    bench: Bench, methods: Mapping[str, Method], timings: Mapping[str, Mapping[str, float]], everyone: int, together: int = 4
) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """Every method on every person: rows, curves, and how many people they are of, after each few of them.

    Args:
        everyone: how many of the atlas's people are personalized; the others fill the gallery up.
        together: people who are trained side by side.
    """
    for people in (*range(together, everyone, together), everyone):
        bench.make("base", METHODS["base"], range(people))
        rows, curves = dict[str, Any](), dict[str, Any]()
        for name, method in methods.items():
            step, spent = timings[name]["step"], {key: value for key, value in timings[name].items() if key != "step"}
            points = [
                {"seconds": round(one["steps"] * step, 2), **spent, **one}
                for one in bench.points(name, method, people, bench.marks(name, method))
            ]
            rows[name], curves = points[-1], {**curves, **({name: points} if name in CURVES else {})}
        yield rows, curves, people


def search(bench: Bench, method: Method, name: str, people: int) -> dict[str, Any]:
    """The learning rate, noise levels and steps at which a method is best: every rate first, then other levels at the best one.

    Returns all that was tried, and the best of it: {"tried": [...], "best": {...}}.
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
    """The methods with what a search found best for them; those without an entry take the rate and levels of the method that they are `like`.

    Raises InputError for a wrong value. Entries of no method are named and left out.
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
