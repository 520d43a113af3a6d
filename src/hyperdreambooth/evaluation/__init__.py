"""Measured fidelity: does a picture show the person, does it show what the prompt asks for, is it a copy? This file has the flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Request:
    """The flags that decide what is measured."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The JSON file to write; figures that are in it already are kept."""
    split: Literal["validation", "test"] = "test"  # Make choices on validation; test is for reporting.
    atlas: Path = Path("benchmarks/atlas")  # The folder of reference photos and true renders.
    people: int | Path | None = None
    """A number: only that many of the atlas's people, from the first on. Or a folder with a folder of two photos or more for each person:
    these people are measured instead. The first photo by name is personalized, the others are what the person is recognized by."""
    base: str = "toon"  # The base to measure, as --base of `personalize`; another than toon needs a folder as --people.
    hypernetwork: str = "auto"  # Its hypernetwork, as for `personalize`; where there is none, methods that need one are left out.
    prompts: str | None = None
    """Prompts for the people of a folder: a text file with one prompt a line, each with [V], or a paper's list, dreambooth or
    hyperdreambooth (the default)."""
    judges: tuple[str, ...] = ()
    """The networks that recognize the people of a folder; each has figures of its own. dlib (extra `judges`; the default), toon (the
    embedded recognizer), clip:ID, dino:ID or ID, where ID is a folder or hub id of a vision model of transformers."""
    faithful: Path | None = None  # A hypernetwork of mode faithful to compare with; default: benchmarks/faithful, where it exists.
    pictures: int = 1  # Pictures of each prompt, 1 to 10.
    denoising_steps: int | None = None
    """Denoising steps of all pictures, as --steps of `generate`. The default of this flag and the next three: for the atlas's people the
    benchmark's, for people of a folder those of the base or its hypernetwork."""
    guidance: float | None = None  # As --guidance of `generate`.
    context_guidance: float | None = None  # As --context-guidance of `generate`.
    context_until: float | None = None  # As --context-until of `generate`.
    rows: tuple[str, ...] = ()  # The same as --methods; names given by both are all measured.
    methods: tuple[str, ...] = ()
    """Names of methods, or of a group: "ours", the variants of this project's method (the default); "all", other methods too, with the
    settings that a search found (the default for a folder of people, --quick and --search)."""
    search: bool = False  # Search each method's learning rate, noise levels and steps instead; give --split validation.
    settings: Path | None = None  # The JSON of a --search: methods run with the best settings that it found.
    quick: bool = False  # A test whether it runs: all methods on two people, with ten steps each.
    overwrite: bool = False  # Replace the figures in the output: measure everything again.
