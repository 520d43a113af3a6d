from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..errors import InputError, some
from ..progress import say
from ..training_settings import PreoptimizeConfig
from .options import Flat, Output, WithBase, WithCrop, as_json, save_sheet

if TYPE_CHECKING:
    from ..data import FolderOfPeople
    from ..stages.preoptimize import Rows
    from ..tables import Table

NO_MATTER = ("log_every", "validate_every", "checkpoint_minutes", "tracker")
"""Settings of the loop that change nothing about a row."""


@dataclass
class Preoptimize(WithBase, WithCrop):
    """Pre-optimize tokens for every identity of a folder: identity/picture.png, or one picture each.

    Chunks of identities are trained side by side and written row by row; stop it at any moment and start it again.
    `export` makes a LoRA of any row. Any number of machines that see both folders can share the work, a shard each.

        hyperdreambooth preoptimize faces -o table
        hyperdreambooth preoptimize faces -o table --shard 0/2
        hyperdreambooth preoptimize faces -o table --merge
        hyperdreambooth export table --identity alice -o alice.safetensors
    """

    folder: tyro.conf.Positional[Path]
    """Pictures of identities."""
    output: Output
    """The table's folder."""
    shard: str = "0/1"
    """i/n: only the i-th of n parts of the identities, from 0 to n-1. Rows are the same however many parts there are."""
    merge: bool = False
    """Train nothing: check that every identity has its row, and pack the rows into a few files."""
    engine: Literal["local", "ray"] = "local"
    """local: this process. ray: Ray Data, with the extra `ray`: a worker on each card of a cluster, or two workers on this machine."""
    address: str | None = None
    """ray: a running cluster, such as auto or ray://head:10001. Every machine must see both folders."""
    config: Annotated[PreoptimizeConfig, Flat] = field(default_factory=PreoptimizeConfig)


def run(args: Preoptimize) -> None:
    from ..data import FolderOfPeople
    from ..engines import on_ray
    from ..personal_lora import PLACEHOLDER
    from ..stages.preoptimize import Rows, chunks_of, parse_shard, preoptimize

    shard = parse_shard(args.shard)
    if args.address and args.engine != "ray":
        raise InputError("--address is a Ray cluster's: give --engine ray too.")
    hdb = args.machine.open(args.base, None)
    args.config.prompt = args.config.prompt.replace(PLACEHOLDER, hdb.identifier)
    people = FolderOfPeople(args.folder, hdb.backbone, args.crop)
    rows = Rows(hdb.backbone, people, args.config, args.output)
    table = rows.table
    keep_settings(args)
    chunks = chunks_of(people.names, args.config.chunk, shard)
    if args.merge:
        table = packed(table, people)
    elif args.engine == "ray" and chunks:
        work = dataclasses.replace(args, folder=args.folder.resolve(), output=args.output.resolve())
        work.base = str(Path(args.base).resolve()) if Path(args.base).exists() else args.base
        on_ray("chunks", partial(opened, work), chunks, address=args.address)
    else:
        table = preoptimize(hdb.backbone, people, args.config, args.output, shard=shard)
    names = [name for chunk in chunks for name in chunk]
    without = [name for name in names if not table.has(name)]
    if without:
        say(f"{len(without)} identities have no row, since none of their pictures could be read: {some(without, 20)}")
    if names and len(without) == len(names):
        raise InputError(f"none of the pictures of {args.folder} could be read.")
    say(f"{args.output}: {len(names) - len(without)} identities{'' if shard == (0, 1) else f' of shard {args.shard}'}")
    if shard == (0, 1):
        shown = [name for name in names if table.has(name)][:8]
        updates = rows.lightweight.to(hdb.device)
        loras = [updates(table[name][None].to(hdb.device)).detach().select(0) for name in shown]
        sheet = [hdb.generate([args.config.prompt] * 3, mine, seed=0) for mine in loras]
        save_sheet(args.output / "preview.png", sheet, shown, [""] * 3, "the first of them")


def opened(args: Preoptimize) -> Rows:
    """What a worker of an engine makes rows with."""
    from ..data import FolderOfPeople
    from ..stages.preoptimize import Rows

    backbone = args.machine.open(args.base, None).backbone
    return Rows(backbone, FolderOfPeople(args.folder, backbone, args.crop), args.config, args.output)


def keep_settings(args: Preoptimize) -> None:
    """Writes config.json, or raises InputError where the table was begun with other settings: its rows could not be compared."""
    from ..checkpoint import read_json, write_json
    from ..tables import read_table_config

    file = args.output / "config.json"
    if file.is_file():
        read_table_config(args.output)  # refuses a damaged one
    before, now = (_decisive(values) for values in (read_json(file) if file.is_file() else {}, as_json(args)))
    differing = [f"{name} {value}, not {now[name]}" for name, value in before.items() if now.get(name, value) != value]
    if differing and any((args.output / begun).is_dir() for begun in ("rows", "packed", "chunk")):
        raise InputError(f"{file} was made with {some(differing)}. Use that, or another folder.")
    if differing or not before:
        write_json(file, as_json(args))


def _decisive(values: dict[str, Any]) -> dict[str, Any]:
    """Of a command's settings those that decide what a row is, by their names as flags."""
    found = {"base": Path(values["base"]).name, "crop": values["crop"]} if {"base", "crop"} <= values.keys() else {}
    for name, value in (values.get("config") or {}).items():
        parts = {f"{name}.{key}": part for key, part in value.items() if key not in NO_MATTER} if isinstance(value, dict) else {name: value}
        found |= parts
    return found


def packed(table: Table, people: FolderOfPeople) -> Table:
    """The merged table. Raises InputError where somebody has no row whose pictures can be read."""
    from ..tables import merge

    missing = [name for name in people.names if name not in table]
    unmade = next((name for name in missing if people.latents_of([name])), None)
    if unmade is not None:
        number = f"{len(missing)} of {len(people.names)}"
        raise InputError(f"{number} identities have no row yet, such as {unmade}. Run their shards (again), then merge.")
    merged = merge(table.folder, table.fingerprint)
    shutil.rmtree(table.folder / "chunk", ignore_errors=True)  # what killed processes left
    return merged
