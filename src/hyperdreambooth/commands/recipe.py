"""The command `recipe`, which makes a hypernetwork in stages, mostly other commands; those that are done are skipped."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..errors import InputError
from ..progress import say
from ..training_settings import PreoptimizeConfig, TrainHypernetworkConfig
from .options import Flat, Output, WithBase, WithCrop, as_json
from .train import Preoptimize, TrainHypernetwork, decisive, keep, open_encoder, run_preoptimize, run_train_hypernetwork

SHIPPED = {file.stem: file for file in sorted((Path(__file__).parents[1] / "assets" / "recipes").glob("*.yaml"))}
AT_ONCE = 64  # Pictures that are decoded before they are written.


@dataclass
class Recipe(WithBase, WithCrop):
    """Make a hypernetwork by a recipe: check this machine, align faces, train, evaluate, and push if asked.

    Recipes: sd15-pro, sd15-faithful, sdxl-pro, sdxl-faithful, toon-pro and toon-faithful (small ones, to try it), or a YAML file of these
    settings. A run can be interrupted at any moment: the same command resumes it. OUTPUT/hypernetwork gets weights, model card,
    figures and pictures.

        hyperdreambooth recipe toon-pro -o runs/try
        hyperdreambooth recipe sd15-pro --data faces -o runs/sd15 --price 2.5
        hyperdreambooth recipe sdxl-pro --data hf:ORG/NAME/train --people 10000 --batch 16 -o runs/sdxl --push me/my-hypernetwork
        hyperdreambooth recipe sd15-pro --help       # with its own settings
    """

    recipe: tyro.conf.Positional[str]  # The name of a recipe, or a YAML file.
    output: Output  # The run's folder.
    data: str = "toon"
    """A folder (identity/picture.png, or one picture each), also an address such as s3://bucket/faces with the extra `remote`,
    hf:ORG/NAME[/FOLDER] on the hub, or toon, the shipped faces. From a folder with only parquet files, as most data sets of the hub are,
    their pictures are taken, which needs the extra `parquet`."""
    people: int | None = None  # Use only this many people, the first ones.
    held_out: int | None = None  # Keep this many of them, the last ones, for validation. Default: a tenth, at least 2 and at most 128.
    encoder: str = "auto"  # A vision model of transformers, by directory or hub id. auto: the shipped one for toon.
    price: float | None = None  # Price of an hour on this machine, to print what the run will cost.
    push: str | None = None  # user/name on the hub, where the finished hypernetwork is uploaded.
    license: str = ""  # The license of the weights, for the model card.
    config: Annotated[TrainHypernetworkConfig, Flat] = field(default_factory=TrainHypernetworkConfig)
    table: PreoptimizeConfig = field(default_factory=PreoptimizeConfig)
    """faithful: settings of the table's pre-optimization. Prompt, targets and token size are always the hypernetwork's."""

    def __post_init__(self) -> None:
        sizes = dataclasses.replace(self.config.lightweight, learnable=False)
        self.table = dataclasses.replace(self.table, prompt=self.config.prompt, targets=self.config.targets, lightweight=sizes)

    @staticmethod
    def expanded(arguments: list[str]) -> list[str]:
        """The command's arguments with the recipe's file as `--config`. Raises InputError where the first one is no recipe."""
        if arguments[:1] in (["-h"], ["--help"]):
            return arguments
        file = SHIPPED.get(arguments[0], Path(arguments[0])) if arguments else Path()
        if not file.is_file() or "--config" in arguments:
            raise InputError(f"the first word is a recipe ({', '.join(SHIPPED)}) or a YAML file; there is no --config. See recipe --help.")
        return [*arguments, "--config", str(file)]


def run_recipe(args: Recipe) -> None:
    from .. import hub
    from ..checkpoint import read_json

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a recipe runs in one process; docs/scale.md says how several share its table and its training.")
    out, faithful = args.output, args.config.mode == "faithful"
    keep(out / "recipe.json", as_json(args), ("people", "held-out"))
    size = preflight(args)
    once(out / "data.json", lambda: align(args, size))
    shutil.rmtree(out / "unpacked", ignore_errors=True)
    shared: dict[str, Any] = {"base": args.base, "crop": "center", "machine": args.machine, "folder": out / "people"}
    if faithful:
        table = Preoptimize(**shared, output=out / "table", config=dataclasses.replace(args.table))
        once(out / "table.json", lambda: run_preoptimize(table))
    shared |= {"encoder": args.encoder, "validation_folder": out / "held-out", "table": out / "table" if faithful else None}
    shared |= {"data": args.data if args.data.startswith("hf:") else Path(args.data).name, "license": args.license}
    training = TrainHypernetwork(**shared, output=out / "hypernetwork", config=dataclasses.replace(args.config))
    once(out / "trained.json", lambda: run_train_hypernetwork(training))
    gauge = read_json(training.output / "config.json")["trained"]["validation"][-1]
    say(f"{training.output}: identity gain {gauge['identity_gain']:.2g} ± {gauge['identity_gain_interval']:.2g} on people it never saw")
    if name := args.push:
        once(out / f"pushed-{name.replace('/', '--')}.json", lambda: {"address": hub.push(training.output, name)})
        say(f"{name}: uploaded (a new repository is private)")


def once(file: Path, work: Callable[[], dict[str, Any] | None]) -> None:
    """Runs a stage and writes its result to `file` as JSON; where the file exists, the stage is done and skipped."""
    from ..checkpoint import write_json

    if not file.is_file():
        say(f"stage: {file.stem}")
        write_json(file, work() or {})


def people_of(args: Recipe) -> dict[str, list[Path]]:
    """Identity -> its picture files; downloads those on the hub, and unpacks parquet files. Raises InputError where there are none."""
    from .. import hub
    from ..assets import toon
    from ..checkpoint import ADDRESS, path_at
    from ..folders import list_identities
    from ..parquet import unpack
    from ..photos import SUFFIXES

    data = args.data
    if data == "toon":
        return {file.stem: [file] for file in toon.faces()}
    here = ADDRESS.fullmatch(data) is None
    folder = hub.download_pictures(data[3:]) if here and data.startswith("hf:") else path_at(data)
    tables = sorted(folder.rglob("*.parquet"), key=str)
    alone = tables and not any(file.suffix.lower() in SUFFIXES for file in folder.rglob("*"))
    return list_identities(unpack(tables, args.output / "unpacked") if alone else folder)


def preflight(args: Recipe) -> int:
    """Prints the time, disk and memory that the recipe needs, by measured steps; returns the side of the base's pictures in pixels.

    The result is kept for the same machine and settings. Raises InputError where disk or main memory are too small.
    """
    import psutil
    import torch

    from ..checkpoint import read_json, write_json

    file, card = args.output / "preflight.json", torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    key = {"machine": f"{platform.node()}, {card}", "settings": decisive(as_json(args))}
    if file.is_file() and (known := read_json(file)) == known | key:
        return int(known["size"])
    say("stage: preflight")
    if not args.data.startswith("hf:"):
        people_of(args)  # reports a wrong folder at once; pictures on the hub are downloaded only after a batch was found to fit
    found, people = measured(args), list(people_of(args).values())[: args.people]
    count, pictures = len(people), sum(map(len, people))
    table = found["chunk_step"] * args.table.training.steps * -(-count // args.table.chunk)
    hours = (found["step"] * args.config.training.steps + table) / 3600
    cost = f", {hours * args.price:,.2f} at {args.price:g} an hour" if args.price is not None else ""
    say(f"{count} people, {pictures} pictures, {found['step']:.3g} s a step: {hours:.3g} hours{cost}, besides reading and drawing pictures")
    # pictures as PNG, at most; latents and features; two checkpoints, while one replaces the other; rows
    disk = pictures * (3 * found["size"] ** 2 + found["encoded"]) + 2 * found["state"] + count * found["row"]
    there = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    needs = [("disk", disk, shutil.disk_usage(args.output).free + there)]
    needs += [("main memory", pictures * found["encoded"], psutil.virtual_memory().available)]
    for name, needed, free in needs:
        say(f"{name}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB there")
        if needed > free:
            raise InputError(f"there isn't enough {name} for {pictures} pictures. Take fewer with --people, or another machine.")
    write_json(file, {**key, **found, "hours": hours})
    return int(found["size"])


def measured(args: Recipe) -> dict[str, float]:
    """Seconds per step and bytes of the stages, measured on batches of random pictures. Raises InputError where a batch doesn't fit."""
    import torch

    from .. import photos, replay
    from ..data import load_identities
    from ..stages.dreambooth import preoptimize
    from ..stages.train_hypernetwork import train_hypernetwork

    hdb, config, rows = args.machine.open(args.base, None), args.config, {}
    encoder, size = open_encoder(hdb, args.encoder, config.train_encoder), hdb.backbone.size
    with tempfile.TemporaryDirectory() as name:
        for number, noise in enumerate(torch.rand(args.table.chunk + 1, 16, 16, 3).numpy()):
            photos.load_photo(noise).resize((size, size)).save(Path(name) / f"{number}.png")
        data = load_identities(name, hdb.backbone, encoder, config.prompt, crop="center")
        try:
            for steps in (2, 4):  # the first run warms up
                short: dict[str, Any] = {"steps": steps, "validate_every": 0, "tracker": None}
                begun = time.monotonic()
                if config.mode == "faithful":
                    table = dataclasses.replace(args.table, training=dataclasses.replace(args.table.training, **short))
                    rows = dict(preoptimize(hdb.backbone, data.split(1)[0], table, Path(name) / f"table-{steps}"))
                chunk_step = (time.monotonic() - begun) / steps
                training = dataclasses.replace(config, training=dataclasses.replace(config.training, **short))
                source, report = train_hypernetwork(hdb.backbone, encoder, data, training, table=rows)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise InputError("a batch doesn't fit: lower --batch and --table.chunk, or give --gradient-checkpointing.") from error
    replay.forget()  # recorded CUDA graphs would keep this base in GPU memory beside the next stage's
    encoded = (data.latents.nbytes + data.features.nbytes) / len(data.people)
    state = 16 * sum(p.numel() for p in source.parameters() if p.requires_grad)  # weights, their average, and two moments
    row = 4 * next(iter(rows.values())).numel() if rows else 0
    step = report.seconds / report.steps
    return {"size": size, "step": step, "chunk_step": chunk_step, "encoded": encoded, "state": state, "row": row}


def align(args: Recipe, size: int) -> dict[str, Any]:
    """Crops pictures to the face: to people/NAME/0000.png, and to held-out/NAME/0000.png for the last people. Existing files are kept.

    Returns the counts, and the broken pictures by path. Raises InputError for too few people.
    """
    from ..checkpoint import write_atomically
    from ..data import decoded

    people = dict(list(people_of(args).items())[: args.people])
    held = min(128, max(2, len(people) // 10)) if args.held_out is None else args.held_out
    if not 2 <= held <= len(people) - 2:
        below = "" if len(people) >= 4 else " Are the people in a folder below? Name that."
        raise InputError(f"{held} of {len(people)} people can't be held out: at least 2 must be, and 2 be left to train on.{below}")
    places: dict[Path, Path] = {}
    for index, (name, files) in enumerate(people.items()):
        folder = args.output / ("people" if index < len(people) - held else "held-out") / name
        places |= {folder / f"{number:04}.png": file for number, file in enumerate(files)}
    left = [place for place in places if not place.is_file()]
    for images in decoded([places[place] for place in left], size, args.crop, AT_ONCE, "aligning faces"):
        for index, image in images.items():
            write_atomically(left[index], image.save)
    broken = [str(file) for place, file in places.items() if not place.is_file()]
    return {"people": len(people) - held, "held_out": held, "pictures": len(places) - len(broken), "broken": broken}
