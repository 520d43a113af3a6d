from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ..errors import InputError, some
from ..progress import say
from ..settings import Layout
from .options import Output, WithHypernetwork, Writing, check_lora_name

if TYPE_CHECKING:
    from ..personal_lora import PersonalLora


@dataclass
class Export(WithHypernetwork, Writing):
    """Write a standard LoRA from a token file, one identity of a table, a train-light run, or a LoRA in the other layout.

    hyperdreambooth export me.tokens -o me.safetensors
    hyperdreambooth export table --identity alice -o alice.safetensors
    hyperdreambooth export me.safetensors --format kohya -o me-kohya.safetensors
    """

    source: tyro.conf.Positional[Path]
    """A token file, a table's folder, a train-light folder, or a LoRA file."""
    output: Output
    """The LoRA file to write."""
    identity: str | None = None
    """Which row of a table."""
    format: Layout = "diffusers"
    """Layout of the file: diffusers, or kohya for ComfyUI and A1111."""


def run(args: Export) -> None:
    check_lora_name(args.output)
    args.refuse_existing(args.output)
    if not args.source.exists():
        raise InputError(f"{args.source}: no such file or folder.")
    me = _from_table(args) if args.source.is_dir() else args.machine.open(args.base, args.hypernetwork).load(args.source)
    me.save(args.output, layout=args.format, overwrite=args.overwrite)
    say(f"{args.output}: rank {me.rank}, {len(me.loras)} layers, {args.output.stat().st_size / 1e6:.2f} MB")


def _from_table(args: Export) -> PersonalLora:
    from ..lightweight import LightweightLora
    from ..lora import find_targets
    from ..stages.personalize import finish
    from ..tables import read_table, read_table_config

    if not (args.source / "config.json").is_file():
        raise InputError(f"{args.source} has no config.json: it is neither a table of `preoptimize` nor a run of `train-light`.")
    config = read_table_config(args.source)
    hdb = args.machine.open(config.base, None)
    lightweight = LightweightLora(find_targets(hdb.backbone.components, config.targets or hdb.backbone.default_targets), config.lightweight)
    table = read_table(args.source, lightweight.fingerprint())
    name = args.identity or (next(iter(table)) if len(table) == 1 else None)
    if name is None or name not in table:
        raise InputError(f"{args.source} has {len(table)} identities; name one of them with --identity: {some(list(table), 8)}.")
    loras = finish(lightweight(table[name][None]).detach().select(0))
    return hdb.person(loras, config.prompt, tokens=table[name], lightweight=lightweight)
