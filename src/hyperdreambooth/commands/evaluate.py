"""Fidelity on people that were never trained on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import InputError
from .options import Flat, Machine


@dataclass
class Evaluate:
    """Measure fidelity on people that were never trained on: identity, context, copying; a JSON and a table.

    hyperdreambooth evaluate -o fidelity.json
    hyperdreambooth evaluate --split validation --people 20 --rows prediction -o quick.json
    hyperdreambooth evaluate --split validation --people 8 --search -o search.json
    hyperdreambooth evaluate --methods all --settings search.json -o comparison.json
    hyperdreambooth evaluate compare before.json after.json
    """

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """compare A.json B.json: which figures of two results differ beyond their intervals."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The JSON file to write; rows that are in it already are kept."""
    split: Literal["validation", "test"] = "test"
    """Choices are made on validation; test is for reporting."""
    atlas: Path = Path("benchmarks/atlas")
    """References and true renders."""
    people: int | None = None
    """Only the first so many people."""
    rows: tuple[str, ...] = ()
    """Only these rows."""
    faithful: Path | None = None
    """A faithful hypernetwork to compare with; default: benchmarks/faithful, where it exists."""
    pictures: int = 1
    """Pictures a prompt."""
    methods: tuple[str, ...] = ()
    """Compare methods instead: "all", or some of them by name, each with its settings as they were searched."""
    search: bool = False
    """Search learning rate, noise levels and steps of the methods instead; on validation people."""
    settings: Path | None = None
    """A search's JSON: what it found best is what the methods run with."""
    quick: bool = False
    """All methods on two people with ten steps each: does it run?"""
    overwrite: bool = False
    """Measure all rows again."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


def run(args: Evaluate) -> None:
    from ..evaluation import command

    if args.words:
        command.compare(args.words)
        return
    if args.output is None:
        raise InputError("where do the figures go? Give -o FILE.json.")
    request = {field.name: getattr(args, field.name) for field in dataclasses.fields(command.Request)}
    command.run(command.Request(**request), args.machine.open)
