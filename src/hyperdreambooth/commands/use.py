"""Commands that make and use a personal LoRA."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from .. import formats, photos
from ..checkpoint import write_json
from ..errors import InputError
from ..lightweight import LightweightConfig, LightweightLora
from ..lora import find_targets
from ..person import Person
from ..progress import Progress, say
from ..stages.generate import GenerateConfig
from ..stages.personalize import PersonalizeConfig, finish
from ..stages.preoptimize import read_table
from .common import Flat, Machine, Output, as_json, refuse_existing


@dataclass
class Personalize:
    """Turn photos of one person into a personal LoRA.

    The hypernetwork predicts a LoRA from the photo; a few steps of rank-relaxed fine-tuning make it fit. The result is a
    standard LoRA file, with a preview picture beside it.

        hyperdreambooth personalize face.png -o me.safetensors
        hyperdreambooth personalize me1.jpg me2.jpg --base runwayml/stable-diffusion-v1-5 --hypernetwork none -o me.safetensors
    """

    photos: tyro.conf.Positional[tuple[Path, ...]]
    """One photo or several of the same person."""
    output: Output
    """The LoRA file to write (.safetensors)."""
    base: str = "toon"
    """"toon" (shipped), a directory in diffusers' layout, a .safetensors checkpoint, or a hub id."""
    hypernetwork: str = "auto"
    """A directory or hub id; "none" trains from scratch, on any base; "auto" takes the shipped one for toon."""
    tokens: Path | None = None
    """Also write the prediction as a token file (about 120 KB for Stable Diffusion 1.5)."""
    format: formats.Layout = "diffusers"
    """Layout of the LoRA file: diffusers (also for PEFT, and for ComfyUI on SD 3 and Flux), or kohya, which ComfyUI and A1111 need on
    Stable Diffusion 1, 2 and XL and diffusers opens too."""
    crop: photos.Crop = "center"
    """center: the middle square. face: find the face and turn it upright (needs the extra `faces`)."""
    face: int | None = None
    """Which face, by size from 1, where there are several."""
    mask_file: tuple[Path, ...] = ()
    """Gray pictures as large as the photos, one for all or one each: white where the loss counts, black where not. Default: --mask."""
    prompt: str | None = None
    """What the photos show, such as "a [V] face on a blue background": what it names isn't learnt as the person. Default: what the
    base itself sees in them, where the hypernetwork brings words to choose from (toon's does); else the person alone."""
    preview: str | None = None
    """Prompt of the preview picture; default: the person's own prompt."""
    author: str | None = None
    """Who made the LoRA, for its metadata."""
    license: str | None = None
    """The LoRA's license, for its metadata."""
    overwrite: bool = False
    """Replace the output if it exists."""
    config: Annotated[PersonalizeConfig, Flat] = field(default_factory=PersonalizeConfig)
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


def run_personalize(args: Personalize) -> None:
    for path in (args.output, *([args.tokens] if args.tokens else [])):
        refuse_existing(path, args.overwrite)
    started = time.perf_counter()
    for file in args.photos:  # a photo's fault shows before seconds go into loading the base
        photos.load_photo(file)
    hdb = args.machine.open(args.base, args.hypernetwork)
    if hdb.source is None and args.hypernetwork == "auto":
        say(f"There is no hypernetwork for {args.base}: training from scratch.")
    pixels, notes = hdb.read_photos(args.photos, crop=args.crop, face=args.face)
    for note in notes:
        say(note)
    formats.check_layout(args.format, hdb.backbone.components)
    masks = hdb.read_masks(args.mask_file, args.photos, crop=args.crop, face=args.face) if args.mask_file else None
    config = hdb.personalize_config(args.config)
    loaded = time.perf_counter()
    # an interrupted fine-tuning of the very same photos and settings goes on; anything else starts anew
    stamp = hashlib.sha256(repr((args.base, args.hypernetwork, args.prompt, args.crop, args.face, config)).encode())
    for file in (*args.photos, *args.mask_file):
        stamp.update(file.read_bytes())
    state = args.output.with_name(f".{args.output.stem}-{stamp.hexdigest()[:12]}")
    me = hdb.personalize(pixels, masks=masks, prompt=args.prompt, config=config, directory=state)
    for text in dict.fromkeys(me.shown):
        say(f'taken to show "{text}"; --prompt says otherwise')
    save = functools.partial(me.save, args.output, layout=args.format, author=args.author, license=args.license, overwrite=True)
    save()  # at once, since a preview takes its time on a large base
    say(f"{args.output}: rank {me.rank}, {len(me.loras)} layers, {args.output.stat().st_size / 1e6:.2f} MB, trigger {me.identifier}")
    shutil.rmtree(state, ignore_errors=True)
    if args.tokens:
        me.save_tokens(args.tokens, overwrite=args.overwrite)
        say(f"{args.tokens}: {args.tokens.stat().st_size / 1e3:.0f} KB")
    picture = hdb.generate(args.preview or me.prompt, me, seed=config.seed)[0]
    save(thumbnail=picture)
    preview = photos.preview_path(args.output)
    metadata = hdb.picture_metadata(args.preview or me.prompt, config.seed, hdb.generate_config(), [(str(args.output), 1.0)])
    photos.save_png(picture, preview, metadata, overwrite=True)
    write_json(args.output.with_suffix(".json"), as_json(args))
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in me.seconds.items())
    say(f"{preview}: a preview")
    say(f"loading {loaded - started:.1f} s, {took}, in all {time.perf_counter() - started:.1f} s")


@dataclass
class Generate:
    """Make pictures from prompts, with a personal LoRA and any number of style LoRAs.

    Write [V] where the person belongs. A LoRA takes a weight after a colon.

        hyperdreambooth generate "a pencil sketch of a [V] face" --lora me.safetensors -o pictures
        hyperdreambooth generate "a [V] face, oil painting" --lora me.safetensors:0.9 --style oil.safetensors:0.7 --count 4 -o pictures
    """

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """What to draw."""
    output: Output
    """The folder that gets the pictures and, for several, a grid."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE[:WEIGHT]. The first one is the person (a LoRA or a token file), further ones are styles. Can be repeated."""
    style: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE[:WEIGHT] of a style LoRA, where there is no personal one. Can be repeated."""
    base: str = "toon"
    """"toon" (shipped), a directory in diffusers' layout, a .safetensors checkpoint, or a hub id."""
    overwrite: bool = False
    """Replace pictures that exist."""
    config: Annotated[GenerateConfig, Flat] = field(default_factory=GenerateConfig)
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


def weighted(text: str, default: float = 1.0) -> tuple[str, float]:
    """FILE[:WEIGHT]; a colon of a Windows drive isn't a weight."""
    file, _, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if file else (text, default)
    except ValueError:
        return text, default


def run_generate(args: Generate) -> None:
    hdb = args.machine.open(args.base)
    config = hdb.generate_config(args.config)
    loras = [weighted(text) for text in args.lora]
    styles = [*loras[1:], *(weighted(text) for text in args.style)]
    me = hdb.load(loras[0][0]) if loras else None
    if loras:
        config = dataclasses.replace(config, strength=config.strength * loras[0][1])
    files = [args.output / f"{p + 1:02d}-{config.seed + i}.png" for p in range(len(args.prompts)) for i in range(config.count)]
    for file in files:
        refuse_existing(file, args.overwrite)
    with Progress("pictures", len(files)) as progress:
        images = hdb.generate(args.prompts, me, styles=styles, config=config, on_picture=progress.update)
    for index, (file, image) in enumerate(zip(files, images, strict=True)):
        prompt, seed = args.prompts[index // config.count], config.seed + index % config.count
        photos.save_png(image, file, hdb.picture_metadata(prompt, seed, config, [*loras[:1], *styles]), overwrite=args.overwrite)
        say(f"{file}: {prompt} (seed {seed})")
    if len(images) > 1:
        rows = [images[i : i + config.count] for i in range(0, len(images), config.count)]
        sheet = photos.grid(rows, list(args.prompts), [f"seed {config.seed + i}" for i in range(config.count)])
        photos.save_png(sheet, args.output / "grid.png", {"ai_generated": "true"}, overwrite=True)
        say(f"{args.output / 'grid.png'}: all of them")
    write_json(args.output / "generate.json", as_json(args))


@dataclass
class Export:
    """Write a standard LoRA from something else.

    From a token file, from one identity of a pre-optimized table, from a train-light run (its folder), or from a LoRA in
    the other layout.

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
    base: str = "toon"
    """The base that it belongs to."""
    hypernetwork: str = "auto"
    """The hypernetwork whose token file it is."""
    format: formats.Layout = "diffusers"
    """Layout of the file: diffusers, or kohya for ComfyUI and A1111."""
    overwrite: bool = False
    """Replace the output if it exists."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


def run_export(args: Export) -> None:
    refuse_existing(args.output, args.overwrite)
    if not args.source.exists():
        raise InputError(f"{args.source}: no such file or folder.")
    me = _from_table(args) if args.source.is_dir() else args.machine.open(args.base, args.hypernetwork).load(args.source)
    me.save(args.output, layout=args.format, overwrite=args.overwrite)
    say(f"{args.output}: rank {me.rank}, {len(me.loras)} layers, {args.output.stat().st_size / 1e6:.2f} MB")


def _from_table(args: Export) -> Person:
    file = args.source / "config.json"
    if not file.is_file():
        raise InputError(f"{args.source} has no config.json: it is neither a table of `preoptimize` nor a run of `train-light`.")
    values = json.loads(file.read_text(encoding="utf-8"))
    hdb = args.machine.open(values["base"], None)
    config = values["config"]
    lightweight = LightweightLora(
        find_targets(hdb.backbone.components, config["targets"] or hdb.backbone.default_targets), LightweightConfig(**config["lightweight"])
    )
    table = read_table(args.source, lightweight.fingerprint())
    name = args.identity or (next(iter(table)) if len(table) == 1 else None)
    if name not in table:
        raise InputError(
            f"{args.source} has {len(table)} identities; name one of them with --identity: {', '.join(list(table)[:8])}{' ...' if len(table) > 8 else ''}"
        )
    loras = finish(lightweight(table[name][None]).detach().select(0))
    return hdb.person(loras, config["prompt"], tokens=table[name], lightweight=lightweight)


@dataclass
class Mix:
    """Blend several people's token files, or LoRAs: FILE:WEIGHT each, or equal shares.

    hyperdreambooth mix alice.tokens:0.5 bob.tokens:0.5 -o both.safetensors
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """FILE[:WEIGHT] of each person; without a weight, an equal share."""
    output: Output
    """The LoRA file to write."""
    base: str = "toon"
    """The base that they belong to."""
    hypernetwork: str = "auto"
    """The hypernetwork whose token files they are."""
    tokens: Path | None = None
    """Also write the blend as a token file."""
    strip: Path | None = None
    """Also draw the way from the first of two people to the second, in five pictures of one seed (.png)."""
    prompt: str | None = None
    """Prompt of the strip; default: the person's own prompt."""
    seed: int = 0
    """Seed of the strip's pictures."""
    overwrite: bool = False
    """Replace the output if it exists."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


def run_mix(args: Mix) -> None:
    for path in (args.output, args.tokens, args.strip):
        if path:
            refuse_existing(path, args.overwrite)
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
