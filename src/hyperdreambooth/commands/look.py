"""Commands that look and measure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .. import formats
from ..backbones import load_backbone
from ..backbones.architectures import FAMILIES, architecture
from ..backbones.targets import PRESETS
from ..errors import InputError
from ..lora import find_targets
from .common import Flat, Machine, Output, refuse_existing


@dataclass
class Info:
    """Show what is in a LoRA or token file: base, rank, layers, size, trigger, fingerprint."""

    file: tyro.conf.Positional[Path]
    """A .safetensors file."""
    json: bool = False
    """Print JSON."""


def run_info(args: Info) -> None:
    about = formats.describe(args.file)
    print(json.dumps(about, indent=2, default=str) if args.json else "\n".join(f"{key}: {value}" for key, value in about.items()))


@dataclass
class Targets:
    """List a base's target layers: shapes, numbers of variables, bytes of a token file and of a LoRA.

    hyperdreambooth targets toon
    hyperdreambooth targets sd15 --preset paper --json
    """

    base: tyro.conf.Positional[str] = "toon"
    """"toon", a directory in diffusers' layout, a .safetensors checkpoint, or a hub id. sd15, sd21, sdxl, sd3, sd35-medium, sd35-large and
    flux stand for their published architectures: no weights are needed."""
    targets: tuple[str, ...] = ()
    """Glob patterns; default: the base's own."""
    preset: Literal["paper", "attention", "attention+ff"] | None = None
    """Named patterns instead: attention of the denoiser; with its feed-forward (the default); or the paper's, attention of the denoiser and
    of the CLIP text encoders and the feed-forward's first layer."""
    rank: int = 1
    """Rank of the LoRA that is counted."""
    down_dim: int = 100
    """Token numbers a layer for `down`."""
    up_dim: int = 50
    """Token numbers a layer for `up`."""
    json: bool = False
    """Print JSON."""


def run_targets(args: Targets) -> None:
    if args.targets and args.preset:
        raise InputError("give --targets or --preset, not both.")
    if args.base in FAMILIES:
        components, family = architecture(args.base), FAMILIES[args.base][0]
    else:
        backbone = load_backbone(args.base)
        components, family = backbone.components, backbone.family
    patterns = args.targets or PRESETS[family][args.preset or "attention+ff"]
    shapes = find_targets(components, patterns)
    variables = len(shapes) * (args.down_dim + args.up_dim) * args.rank
    lora = sum(args.rank * (shape.inputs + shape.outputs) for shape in shapes.values())
    summary = {
        "base": args.base,
        "family": family,
        "patterns": list(patterns),
        "layers": len(shapes),
        "token_variables": variables,
        "token_file_bytes": 4 * variables,
        "lora_variables": lora,
        "tokens_over_lora": round(variables / lora, 4),
        "lora_file_bytes_fp16": 2 * lora,
        "rank": args.rank,
    }
    if args.json:
        print(json.dumps({**summary, "shapes": {path: list(shape) for path, shape in shapes.items()}}, indent=2))
        return
    for path, shape in shapes.items():
        print(f"{shape.inputs:6d} -> {shape.outputs:<6d} {path}")
    print("\n".join(f"{key}: {value}" for key, value in summary.items()))


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


def run_demo(args: Demo) -> None:
    from ..evaluation.demo import demo

    refuse_existing(args.output / "index.html", args.overwrite)
    demo(args.machine.open("toon"), args.output, args.face)


@dataclass
class Evaluate:
    """Measure fidelity on people that were never trained on: identity, context, copying; a JSON and a table.

    hyperdreambooth evaluate -o fidelity.json
    hyperdreambooth evaluate --split validation --people 20 --rows prediction -o quick.json
    """

    output: Output
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
    overwrite: bool = False
    """Measure all rows again."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


def run_evaluate(args: Evaluate) -> None:
    from ..evaluation.command import run

    run(args)
