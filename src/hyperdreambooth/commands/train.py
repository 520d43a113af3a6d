"""Commands that train on photos: the tokens of one subject or of many identities, and a hypernetwork."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..errors import InputError, some
from ..progress import say
from ..training_settings import NOT_DECISIVE, PreoptimizeConfig, TrainHypernetworkConfig, TrainLightConfig
from .engines import WithEngine, Work, each, sharing
from .options import Flat, Output, WithBase, WithCrop, Writing, as_json, json_at, save_sheet

if TYPE_CHECKING:
    from ..api import HyperDreamBooth
    from ..data import IdentityData
    from ..encoder import FaceEncoder
    from ..stages.dreambooth import Rows
    from ..tables import Table

PROMPTS = ("a pencil sketch of a [V] face", "a smiling [V] face", "a [V] face on a blue background")  # Prompts of a hypernetwork's preview.


@dataclass
class TrainLight(WithBase, WithCrop, Writing):
    """Lightweight DreamBooth: train one subject's tokens on its photos (1 to n), over frozen random aux matrices.

    hyperdreambooth train-light photos/*.jpg -o light --training.steps 300
    hyperdreambooth train-light me.jpg -o light --targets "unet*attn?.to_q" "text_encoder*q_proj" --prior-pictures 16
    """

    photos: tyro.conf.Positional[tuple[Path, ...]]  # Photos of one subject.
    output: Output  # The folder of the run: tokens, LoRA, preview, config, checkpoint. An interrupted run of the same photos resumes.
    config: Annotated[TrainLightConfig, Flat] = field(default_factory=TrainLightConfig)


def run_train_light(args: TrainLight) -> None:
    from ..checkpoint import write_json
    from ..personal_lora import PLACEHOLDER
    from ..stages.dreambooth import Subject, finish, train_light
    from ..tables import save_row

    lora = args.output / "lora.safetensors"
    args.refuse_existing(lora)
    config, preview = args.output / "config.json", args.output / "preview.png"
    if not (args.output / "state.safetensors").exists() and not json_at(config).keys() >= {"photos", "config"}:  # no earlier run
        args.refuse_existing(config, preview)
    hdb = args.machine.open(args.base, None)
    pixels, notes = hdb.read_photos(args.photos, crop=args.crop)
    for note in notes:
        say(note)
    if args.overwrite:  # otherwise a finished training, or that of other photos, would be resumed
        (args.output / "state.safetensors").unlink(missing_ok=True)
    prompt = args.config.prompt.replace(PLACEHOLDER, hdb.identifier)
    subject = Subject(hdb.backbone.encode_images(pixels)[None].float(), prompt)
    table, report = train_light(hdb.backbone, subject, args.config, directory=args.output)
    loras = finish(table.lightweight(table.tokens.detach()).detach().select(0))
    me = hdb.person(loras, args.config.prompt, tokens=table.tokens[0].detach().cpu(), lightweight=table.lightweight)
    me.save(lora, overwrite=True)
    save_row(args.output, "subject", table.tokens[0].detach().cpu(), table.lightweight.fingerprint())
    write_json(config, as_json(args))
    say(f"{lora}: rank {me.rank}, {len(me.loras)} layers, {report.seconds:.0f} s")
    pictures = hdb.generate([args.config.prompt] * 4, me, seed=0)
    save_sheet(preview, [pictures], [args.config.prompt], [""] * 4, "a preview")


@dataclass
class Preoptimize(WithEngine, WithCrop):
    """Pre-optimize tokens for every identity of a folder: identity/picture.png, or one picture each.

    Identities are trained in chunks, side by side, and written as a row each. A run can be stopped at any moment and started again.
    `export` makes a LoRA of any row. Any number of machines that see both folders can share the work, one shard each.

        hyperdreambooth preoptimize faces -o table
        hyperdreambooth preoptimize faces -o table --shard 0/2
        hyperdreambooth preoptimize faces -o table --merge
        hyperdreambooth export table --identity alice -o alice.safetensors
    """

    folder: tyro.conf.Positional[Path]  # Pictures of identities; also an address such as s3://bucket/faces, with the extra `remote`.
    output: Output  # The table's folder, or its address.
    shard: str = "0/1"  # i/n: train only the i-th of n parts of the identities, from 0 to n-1. Rows don't depend on n.
    merge: bool = False  # Train nothing: check that every identity has its row, and pack the rows into a few files.
    config: Annotated[PreoptimizeConfig, Flat] = field(default_factory=PreoptimizeConfig)


def run_preoptimize(args: Preoptimize) -> None:
    from ..checkpoint import path_at
    from ..personal_lora import PLACEHOLDER
    from ..stages.dreambooth import chunks_of, parse_shard
    from ..tables import read_table_config

    args.check_engine()
    args.output, shard = path_at(args.output), parse_shard(args.shard)
    hdb = args.machine.open(args.base, None)
    args.config.prompt = args.config.prompt.replace(PLACEHOLDER, hdb.identifier)
    rows = opened(args, hdb)
    if (args.output / "config.json").is_file():
        read_table_config(args.output)  # raises InputError for a damaged one
    keep(args.output / "config.json", as_json(args), ("rows", "packed", "chunk"))
    table, chunks = rows.table, chunks_of(rows.data.names, args.config.chunk, shard)
    if args.merge:
        table = packed(rows)
    else:
        for _ in each(args, chunks, rows, opened, "chunks"):
            pass
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


def opened(args: Preoptimize, hdb: HyperDreamBooth | None = None) -> Rows:
    """What trains a chunk of identities and writes their rows, in this process or in a worker."""
    from ..data import FolderOfPeople
    from ..stages.dreambooth import Rows

    backbone = (hdb or args.machine.open(args.base, None)).backbone
    return Rows(backbone, FolderOfPeople(args.folder, backbone, args.crop), args.config, args.output)


def keep(file: Path, now: dict[str, Any], begun: Sequence[str]) -> None:
    """Writes a command's settings. Raises InputError where `file` has others and a folder of `begun` beside it shows that work began."""
    from ..checkpoint import read_json, write_json

    before, wanted = (decisive(values) for values in (read_json(file) if file.is_file() else {}, now))
    differing = [f"{name} {value}, not {wanted[name]}" for name, value in before.items() if wanted.get(name, value) != value]
    if differing and any((file.parent / folder).is_dir() for folder in begun):
        raise InputError(f"{file} was made with {some(differing)}. Use that, or another folder.")
    if differing or not before:
        write_json(file, now)


def decisive(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a command that its result depends on, by the names of their flags."""
    found: dict[str, Any] = {name: values[name] for name in ("crop", "data", "people", "held_out", "encoder") if name in values}
    found |= {"base": Path(values["base"]).name} if "base" in values else {}
    for prefix, group in (("", values.get("config")), ("table.", values.get("table"))):
        for name, value in (group or {}).items():
            parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
            found |= {prefix + key: part for key, part in parts.items() if key.split(".")[-1] not in NOT_DECISIVE}
    return found


def packed(rows: Rows) -> Table:
    """Merges the table and returns it. Raises InputError where an identity whose pictures can be read has no row."""
    from ..tables import merge

    names = rows.data.names
    missing = [name for name in names if name not in rows.table]
    unmade = next((name for name in missing if rows.data.latents_of([name])), None)
    if unmade is not None:
        number = f"{len(missing)} of {len(names)}"
        raise InputError(f"{number} identities have no row yet, such as {unmade}. Run their shards (again), then merge.")
    merged = merge(rows.output, rows.table.fingerprint)
    if isinstance(rows.output, Path):
        shutil.rmtree(rows.output / "chunk", ignore_errors=True)  # checkpoints of killed processes
    return merged


@dataclass
class TrainHypernetwork(WithEngine, WithCrop):
    """Train a hypernetwork: a face photo in, LoRA tokens out.

    pro (default) needs no table: aux matrices are learned, by the denoising loss. faithful is the paper's mode: frozen aux,
    and a weight loss against the table of `preoptimize`. Watch the identity gain (the loss with another person's photo minus
    the loss with the person's own): it must rise, while the loss itself hardly changes.

        hyperdreambooth train-hypernetwork faces --validation-folder strangers -o hypernetwork
        hyperdreambooth train-hypernetwork faces --table table --mode faithful -o hypernetwork
    """

    folder: tyro.conf.Positional[Path]
    """Pictures of identities: identity/picture.png, or one picture each; also an address such as s3://bucket/faces, with the extra
    `remote`. With --engine ray its pictures are encoded by workers."""
    output: Output  # The hypernetwork's folder; `personalize --hypernetwork` takes it.
    encoder: str = "auto"  # A vision model of transformers, by directory or hub id (DINOv2, CLIP, ViT). auto: the shipped one for toon.
    validation_folder: Path | None = None  # Identities to measure the identity gain on; default: the last tenth of the folder's.
    table: Path | None = None  # faithful: the folder of `preoptimize`.
    start: str | None = None  # A hypernetwork (directory or hub id) to start from, with the same layers, encoder and sizes.
    data: str = ""  # Description of the pictures, for the model card.
    license: str = ""  # The license of the weights, for the model card.
    config: Annotated[TrainHypernetworkConfig, Flat] = field(default_factory=TrainHypernetworkConfig)


def open_encoder(hdb: HyperDreamBooth, name: str, trained: bool) -> FaceEncoder:
    """Opens a vision model by name; `auto` is the shipped one. Raises InputError for `auto` where the base isn't toon."""
    from ..assets import toon
    from ..encoder import FaceEncoder

    if name == "auto" and hdb.base != "toon":
        raise InputError(f"{hdb.base} has no encoder of its own: name a vision model with --encoder, such as facebook/dinov2-small.")
    model = toon.directory("hypernetwork") / "encoder" if name == "auto" else name
    return FaceEncoder.from_pretrained(model, trained=trained).to(hdb.device).eval()


def encoder_of(args: TrainHypernetwork) -> Work:
    """What a worker encodes pieces of the folder's pictures with."""
    from ..data import encoding

    hdb = args.machine.open(args.base, None)
    return encoding(args.folder, hdb.backbone, open_encoder(hdb, args.encoder, args.config.train_encoder), args.crop)


def run_train_hypernetwork(args: TrainHypernetwork) -> None:
    from .. import photos
    from ..checkpoint import write_json
    from ..data import load_identities
    from ..lora import find_targets
    from ..personal_lora import PLACEHOLDER
    from ..pretrained import HyperNetworkInfo, load_hypernetwork, save_hypernetwork
    from ..stages.describe import familiar
    from ..stages.train_hypernetwork import preview, train_hypernetwork
    from ..tables import read_table
    from ..trainable_lora import LightweightLora
    from ..training import Run

    args.check_engine()
    hdb = args.machine.open(args.base, None)
    config = args.config
    config.prompt = config.prompt.replace(PLACEHOLDER, hdb.identifier)
    config.written = tuple(text.replace(PLACEHOLDER, hdb.identifier) for text in config.written)
    encoder = open_encoder(hdb, args.encoder, config.train_encoder)
    start = load_hypernetwork(args.start, hdb.backbone)[0] if args.start else None
    cache = args.output / "cache"

    def read(folder: Path) -> IdentityData:
        share = sharing(dataclasses.replace(args, folder=folder), encoder_of, "pieces of pictures")
        return load_identities(folder, hdb.backbone, encoder, config.prompt, crop=args.crop, cache=cache, share=share)

    data = read(args.folder)
    if args.validation_folder:
        validation = read(args.validation_folder)
    else:
        data, validation = data.split(max(2, len(data.names) // 10))
    table = None
    if args.table:
        targets = find_targets(hdb.backbone.components, config.targets or hdb.backbone.default_targets)
        table = read_table(args.table, LightweightLora(targets, config.lightweight).fingerprint())
    write_json(args.output / "training.json", as_json(args))
    source, report = train_hypernetwork(
        hdb.backbone, encoder, data, config, run=Run(args.output / "run"), validation=validation, table=table, start=start
    )
    info = HyperNetworkInfo(
        base=args.base,
        targets={path: list(shape) for path, shape in source.lightweight.targets.items()},
        lightweight=dataclasses.asdict(config.lightweight),
        hypernetwork=dataclasses.asdict(config.hypernetwork),
        mode=config.mode,
        prompt=args.config.prompt.replace(hdb.identifier, PLACEHOLDER),
        data=args.data,
        license=args.license,
        familiar=familiar(hdb.backbone, validation.latents[:64].to(hdb.device).float(), config.prompt),
        trained={"steps": report.steps, "identities": len(data.names), "validation": report.validations[-1:]},
    )
    save_hypernetwork(args.output, source, info)
    gain, half = report.validations[-1]["identity_gain"], report.validations[-1].get("identity_gain_interval", 0.0)
    word = (
        "it tells people apart" if gain > half else "within its interval of 0, so it tells nobody apart yet: train longer, on more people"
    )
    say(f"{args.output}: a hypernetwork; identity gain {gain:.2g} ± {half:.2g} on people it never saw ({word})")
    sheet = preview(hdb.backbone, source.eval(), validation, 6, [prompt.replace(PLACEHOLDER, hdb.identifier) for prompt in PROMPTS])
    shown = photos.save_png(sheet, args.output / "preview.png", {"ai_generated": "true"}, overwrite=True)
    say(f"{shown}: people it never saw, and what is drawn of them")
