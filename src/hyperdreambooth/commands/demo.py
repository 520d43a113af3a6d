"""The whole way on an example face, with a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from .options import Flat, Machine, Output, refuse_existing


@dataclass
class Demo:
    """The whole way, offline: personalize an example face that nobody trained on, draw it anew, and write a report."""

    output: Output = Path("demo")
    """The folder that gets the LoRA, a grid and index.html."""
    face: int = 1
    """Which of the shipped example faces, from 1."""
    overwrite: bool = False
    """Replace the folder's report if it exists."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


def run(args: Demo) -> None:
    from ..evaluation.demo import demo

    refuse_existing(args.output / "index.html", args.overwrite)
    demo(args.machine.open("toon"), args.output, args.face)
