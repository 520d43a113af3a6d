"""The commands `targets` and `evaluate`, which measure."""

import json
from dataclasses import dataclass
from typing import Literal

import tyro

from ..errors import InputError
from ..evaluation import Request
from .engines import WithEngine, Work, sharing


@dataclass
class Targets:
    """List a base's target layers: shapes, numbers of variables, bytes of a token file and of a LoRA.

    hyperdreambooth targets toon
    hyperdreambooth targets sd15 --preset paper --json
    """

    base: tyro.conf.Positional[str] = "toon"
    """"toon", a directory in diffusers' layout, a .safetensors checkpoint, or a hub id. sd15, sd21, sdxl, sd3, sd35-medium, sd35-large and
    flux name published architectures: no weights are needed."""
    targets: tuple[str, ...] = ()  # Glob patterns of layer paths; default: the preset's.
    preset: Literal["paper", "attention", "attention+ff"] | None = None
    """Patterns by name: attention: the denoiser's attention layers; attention+ff (the default): its feed-forward layers too; paper: the
    attention layers of the denoiser and of the CLIP text encoders, and the first layer of the denoiser's feed-forward blocks."""
    rank: int = 1  # Rank of the LoRA whose variables are counted.
    down_dim: int = 100  # Numbers of each layer's token for the down matrix, for each rank.
    up_dim: int = 50  # Numbers of each layer's token for the up matrix, for each rank.
    json: bool = False  # Print JSON.


def run_targets(args: Targets) -> None:
    from ..backbones import load_backbone
    from ..backbones.architectures import FAMILIES, PRESETS, architecture
    from ..lora import find_targets

    if args.targets and args.preset:
        raise InputError("give --targets or --preset, not both.")
    if args.base in FAMILIES:
        components, family = architecture(args.base), FAMILIES[args.base]
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
class Evaluate(Request, WithEngine):
    """Measure fidelity on people that were never trained on: identity, context and copying, as figures, a table and a report.

    hyperdreambooth evaluate -o fidelity.json
    hyperdreambooth evaluate --split validation --people 20 --methods prediction -o quick.json
    hyperdreambooth evaluate --split validation --people 8 --search -o search.json
    hyperdreambooth evaluate --methods all --settings search.json -o comparison.json
    hyperdreambooth evaluate compare before.json after.json
    """

    words: tyro.conf.Positional[tuple[str, ...]] = ()  # compare A.json B.json: the figures of two results whose intervals don't overlap.


def run_evaluate(args: Evaluate) -> None:
    from ..evaluation import command

    args.check_engine()
    if args.words:
        command.compare(args.words)
    elif args.output is None:
        raise InputError("where do the figures go? Give -o FILE.json.")
    elif args.search and args.engine == "ray":
        raise InputError("a search runs in one process: leave --engine ray out.")
    else:
        command.run(args, args.output, args.machine.open, sharing(args, open_work, "pieces of people"))


def open_work(args: Evaluate) -> Work:
    """What a worker calls for each piece of `command.compare_methods`: it generates the pictures into the command's cache."""
    from ..evaluation import command, comparison

    assert args.output
    bench, methods, _ = command.prepare(args, args.output, args.machine.open)

    def make(piece: list[str]) -> None:
        start, end, bench.stamp, *names = piece
        comparison.make_some(bench, {name: methods[name] for name in names}, range(int(start), int(end)))

    return make
