"""The pictures that the toon world's hypernetworks learn from.

They show training people in "seen" contexts only: the base is trained on all contexts, and the held-out half measures how
well a hypernetwork generalizes. Each person has two plain photos to be predicted from, and two pictures in any seen
context.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from ..hypernetworks import Album
from . import pictures


def photo_context(draw: random.Random) -> dict[str, str]:
    """The context of a photo: a plain drawing, no hat, rarely glasses."""
    seen = {kind: [name for name, choice in choices.items() if choice["seen"]] for kind, choices in pictures.CONTEXTS.items()}
    return {
        "style": "plain",
        "background": draw.choice(seen["background"]),
        "headwear": "none",
        "eyewear": "glasses" if draw.random() < 0.15 else "none",
        "expression": draw.choice(seen["expression"]),
    }


def seen_context(draw: random.Random) -> dict[str, str]:
    """Any context that hypernetworks may train on."""
    context = photo_context(draw)
    seen = {kind: [name for name, choice in choices.items() if choice["seen"]] for kind, choices in pictures.CONTEXTS.items()}
    if draw.random() < 0.5:
        context["style"] = draw.choice(seen["style"])
    if not pictures.CONTEXTS["style"][context["style"]]["colors"]:
        context["background"] = "white"
    context["headwear"] = draw.choice(seen["headwear"])
    context["eyewear"] = draw.choice(seen["eyewear"])
    return context


def plan(first: int, people: int) -> list[dict[str, Any]]:
    """Two photos and two pictures in seen contexts of each person."""
    jobs = []
    for person in range(first, first + people):
        draw = random.Random(person * 31 + 7)
        jobs += [{"person": person, "context": make(draw)} for make in (photo_context, photo_context, seen_context, seen_context)]
    return jobs


def load_pictures(out: Path, first: int, people: int) -> pictures.Pictures:
    """The plan's pictures, rendered on first use."""
    if out.with_suffix(".jsonl").is_file():
        return pictures.Pictures.load(out)
    return pictures.render_plan(out, plan(first, people))


def album(data: pictures.Pictures, people: int) -> Album:
    """The album of the plan's first `people`."""
    shown = data.rows[: 4 * people]
    names = list(dict.fromkeys(str(row["person"]) for row in shown))
    prompts = [pictures.caption(row["context"]) for row in shown]
    return Album(data, np.arange(len(shown)), names, (True, True, False, False), prompts)
