"""Measured fidelity: who is it, is it what the prompt asked for, is it a copy? Here is what can be asked for, on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Request:
    """The flags that decide what is measured."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The JSON file to write; rows that are in it already are kept."""
    split: Literal["validation", "test"] = "test"  # Choices are made on validation; test is for reporting.
    atlas: Path = Path("benchmarks/atlas")  # References and true renders.
    people: int | None = None  # Only the first so many people.
    rows: tuple[str, ...] = ()  # Only these rows.
    faithful: Path | None = None  # A faithful hypernetwork to compare with; default: benchmarks/faithful, where it exists.
    pictures: int = 1  # Pictures a prompt.
    methods: tuple[str, ...] = ()  # Compare methods instead: "all", or some of them by name, each with its settings as they were searched.
    search: bool = False  # Search learning rate, noise levels and steps of the methods instead; on validation people.
    settings: Path | None = None  # A search's JSON: what it found best is what the methods run with.
    quick: bool = False  # All methods on two people with ten steps each: does it run?
    overwrite: bool = False  # Measure all rows again.
