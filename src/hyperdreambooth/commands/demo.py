from dataclasses import dataclass
from pathlib import Path

from .options import Command, Output, Writing


@dataclass
class Demo(Command, Writing):
    """The whole way, offline: personalize an example face that nobody trained on, draw it anew, and write a report."""

    output: Output = Path("demo")
    """The folder that gets the LoRA, a grid and index.html."""
    face: int = 1
    """Which of the shipped example faces, from 1."""


def run(args: Demo) -> None:
    from ..evaluation.demo import demo

    args.refuse_existing(args.output / "index.html")
    demo(args.machine.open("toon"), args.output, args.face)
