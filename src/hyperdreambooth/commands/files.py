"""Commands that read existing files: LoRAs, token files, tables and hypernetworks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from ..errors import InputError, some
from ..progress import say
from ..settings import Layout
from .options import Output, WithHypernetwork, Writing, check_lora_name, weighted

if TYPE_CHECKING:
    from ..personal_lora import PersonalLora

SHOWN = 200  # Characters of a value that `info` prints, at most.


@dataclass
class Info:
    """Show what is in a LoRA or token file: base, rank, layers, size, trigger, fingerprint."""

    file: tyro.conf.Positional[Path]  # A .safetensors file.
    json: bool = False  # Print JSON.


def run_info(args: Info) -> None:
    from .. import header

    if args.file.is_dir():
        raise InputError(f"{args.file} is a folder: name a LoRA or token file in it.")
    if (about := header.describe(args.file)) is None:
        from .. import formats

        about = formats.describe(args.file)
    print(json.dumps(about, indent=2, default=str) if args.json else "\n".join(readable(about)))


def readable(values: dict[str, Any], indent: str = "") -> list[str]:
    """One line for each value, those of a nested dict indented. Long values are cut, and unprintable characters become spaces."""
    lines = []
    for key, value in values.items():
        inner = readable(dict(sorted(value.items())), f"{indent}  ") if isinstance(value, dict) else []
        text = "" if isinstance(value, dict) else f" {value}"
        long = f"... ({len(text) - 1} characters; --json prints all)" if len(text) > SHOWN else ""
        lines += ["".join(letter if letter.isprintable() else " " for letter in f"{indent}{key}:{text[:SHOWN]}{long}"), *inner]
    return lines


@dataclass
class Export(WithHypernetwork, Writing):
    """Write a standard LoRA from a token file, one identity of a table, a train-light run, or a LoRA in the other layout.

    hyperdreambooth export me.tokens -o me.safetensors
    hyperdreambooth export table --identity alice -o alice.safetensors
    hyperdreambooth export me.safetensors --format kohya -o me-kohya.safetensors
    """

    source: tyro.conf.Positional[Path]  # A token file, a table's folder or address, a train-light folder, or a LoRA file.
    output: Output  # The LoRA file to write.
    identity: str | None = None  # The identity whose row of a table is exported.
    format: Layout = "diffusers"  # Layout of the file: diffusers, or kohya for ComfyUI and A1111.


def run_export(args: Export) -> None:
    from ..checkpoint import path_at

    check_lora_name(args.output)
    args.refuse_existing(args.output)
    args.source = path_at(args.source)
    if not args.source.exists():
        raise InputError(f"{args.source}: no such file or folder.")
    me = read_row(args) if args.source.is_dir() else args.machine.open(args.base, args.hypernetwork).load(args.source)
    me.save(args.output, layout=args.format, overwrite=args.overwrite)
    say(f"{args.output}: rank {me.rank}, {len(me.loras)} layers, {args.output.stat().st_size / 1e6:.2f} MB")


def read_row(args: Export) -> PersonalLora:
    """The LoRA of one row of a table. Raises InputError where the folder isn't a table, or the identity isn't in it."""
    from ..lora import find_targets
    from ..stages.dreambooth import finish
    from ..tables import read_table, read_table_config
    from ..trainable_lora import LightweightLora

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


@dataclass
class Mix(WithHypernetwork, Writing):
    """Blend several people's token files, or LoRAs: FILE:WEIGHT each, or equal shares.

    hyperdreambooth mix alice.tokens:0.5 bob.tokens:0.5 -o both.safetensors
    """

    files: tyro.conf.Positional[tuple[str, ...]]  # FILE[:WEIGHT] of each person; without a weight, an equal share.
    output: Output  # The LoRA file to write.
    tokens: Path | None = None  # Also write the blend as a token file.
    strip: Path | None = None  # Also draw five steps of the blend from the first of two people to the second, with one seed (.png).
    prompt: str | None = None  # Prompt of the strip; default: the person's own prompt.
    seed: int = 0  # Seed of the strip's pictures.


def run_mix(args: Mix) -> None:
    from .. import photos

    check_lora_name(args.output)
    args.refuse_existing(args.output, args.tokens, args.strip)
    if args.strip and len(args.files) != 2:
        raise InputError(f"a strip leads from one person to another: it takes two token files, not {len(args.files)}.")
    hdb = args.machine.open(args.base, args.hypernetwork)
    shares = [weighted(file, 1 / len(args.files)) for file in args.files]
    people = [hdb.load(file) for file, _ in shares]
    me = hdb.mix([(person, weight) for person, (_, weight) in zip(people, shares, strict=True)])
    me.save(args.output, overwrite=args.overwrite)
    say(f"{args.output}: {' + '.join(args.files)}")
    if args.tokens:
        me.save_tokens(args.tokens, overwrite=args.overwrite)
        say(str(args.tokens))
    if args.strip:
        steps, (first, second) = (0.0, 0.25, 0.5, 0.75, 1.0), people
        prompt = args.prompt or me.prompt
        blends = [hdb.mix([(first, 1 - step), (second, step)]) for step in steps]
        row = [hdb.generate(prompt, blend, seed=args.seed)[0] for blend in blends]
        metadata = hdb.picture_metadata(prompt, args.seed, hdb.generate_config(), shares)
        photos.save_png(photos.grid([row], [""], [f"{step:g}" for step in steps]), args.strip, metadata, overwrite=True)
        say(f"{args.strip}: from {args.files[0]} (0) to {args.files[1]} (1)")


@dataclass
class Push:
    """Upload a LoRA file, or a hypernetwork's folder, to the model hub, with a card that describes it. Private by default.

    A LoRA of a face is biometric data: whoever has the file can draw this person. --yes says that the person agrees.
    The token is the hub's own (`hf auth login`, or HF_TOKEN); HF_ENDPOINT names another hub.

        hyperdreambooth push hypernetwork me/my-hypernetwork
        hyperdreambooth push me.safetensors me/my-face --yes
    """

    path: tyro.conf.Positional[Path]  # A LoRA file (.safetensors) or a folder that `train-hypernetwork` wrote.
    repository: tyro.conf.Positional[str]  # user/name on the hub; created if it doesn't exist.
    public: bool = False  # Make a new repository public.
    yes: bool = False  # Confirms that the person whose face it is agrees to the upload.


def run_push(args: Push) -> None:
    from .. import hub

    if not args.path.exists():
        raise InputError(f"{args.path}: no such file or folder.")
    if args.path.is_file() and not args.yes:
        raise InputError(f"{hub.CONSENT} Then say --yes.")
    address = hub.push(args.path, args.repository, public=args.public)
    say(f"{address}: {args.path.name}{'' if args.public else ' (a new repository is private)'}")
