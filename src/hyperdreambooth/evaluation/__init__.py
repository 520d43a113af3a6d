"""Measured fidelity: who is it, is it what the prompt asked for, is it a copy? Here is what can be asked for, on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Request:
    """The flags that decide what is measured."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The JSON file to write; what is in it already is kept."""
    split: Literal["validation", "test"] = "test"  # Choices are made on validation; test is for reporting.
    atlas: Path = Path("benchmarks/atlas")  # References and true renders.
    people: int | Path | None = None
    """A number: only the first so many of the atlas's people. A folder of people, two photos or more each: they are measured instead, the
    first photo by name being the one that is given, the others what the person is recognized by."""
    base: str = "toon"  # The base to measure, where --people is a folder: as `personalize` takes it.
    hypernetwork: str = "auto"  # Its hypernetwork, as `personalize` takes it; without one, the methods that need it are left out.
    prompts: str | None = None
    """What is drawn of the people of a folder: a text file, one prompt a line with [V], or a paper's list, dreambooth or hyperdreambooth
    (the default)."""
    judges: tuple[str, ...] = ()
    """Who tells whether people of a folder are themselves, each with figures of its own: dlib (extra `judges`; the default), clip:ID,
    dino:ID, or ID: a folder or hub id of a vision model of transformers; toon: the embedded recognizer."""
    faithful: Path | None = None  # A faithful hypernetwork to compare with; default: benchmarks/faithful, where it exists.
    pictures: int = 1  # Pictures a prompt.
    denoising_steps: int | None = None
    """How all pictures are drawn, as --steps of `generate`. Default, as of the next three: the protocol's."""
    guidance: float | None = None  # As --guidance of `generate`.
    context_guidance: float | None = None  # As --context-guidance of `generate`.
    context_until: float | None = None  # As --context-until of `generate`.
    rows: tuple[str, ...] = ()  # More of --methods, by another name.
    methods: tuple[str, ...] = ()
    """By name, or "ours": this project's own ways (the default), or "all": what they are compared with too, each with its settings as they
    were searched (the default for photos, --quick and --search)."""
    search: bool = False  # Search learning rate, noise levels and steps of the methods instead; on validation people.
    settings: Path | None = None  # A search's JSON: what it found best is what the methods run with.
    quick: bool = False  # All methods on two people with ten steps each: does it run?
    overwrite: bool = False  # Measure everything again.
