"""The two commands that everything is about: make a personal LoRA, and draw with it."""

import dataclasses
import functools
import hashlib
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from .. import STARTED
from ..errors import InputError
from ..progress import Progress, say
from ..settings import GenerateChoices, Layout, PersonalizeChoices
from .options import Flat, Output, WithBase, WithHypernetwork, Writing, as_json, check_lora_name, save_sheet, weighted


@dataclass
class Personalize(WithHypernetwork, Writing):
    """Turn photos of one person into a personal LoRA.

    The hypernetwork predicts a LoRA from the photo; a few steps of rank-relaxed fine-tuning make it fit. The result is a
    standard LoRA file, with a preview picture beside it. A folder of people (identity/picture.png, or a picture each) gives a folder of
    LoRAs, several people trained in one batch; those that are there already are kept.

        hyperdreambooth personalize face.png -o me.safetensors
        hyperdreambooth personalize people/ -o loras
        hyperdreambooth personalize me1.jpg me2.jpg --base runwayml/stable-diffusion-v1-5 --hypernetwork none -o me.safetensors
    """

    photos: tyro.conf.Positional[tuple[Path, ...]]  # One photo or several of the same person; or one folder of people.
    output: Output  # The LoRA file to write (.safetensors); of a folder of people, the folder that gets them.
    tokens: Path | None = None  # Also write the prediction as a token file (about 120 KB for Stable Diffusion 1.5).
    format: Layout = "diffusers"
    """Layout of the LoRA file: diffusers (also for PEFT, and for ComfyUI on SD 3 and Flux), or kohya, which ComfyUI and A1111 need on
    Stable Diffusion 1, 2 and XL and diffusers opens too."""
    mask_file: tuple[Path, ...] = ()
    """Gray pictures as large as the photos, one for all or one each: white where the loss counts, black where not. Default: --mask."""
    prompt: str | None = None
    """What the photos show, such as "a [V] face on a blue background": what it names isn't learnt as the person. Default: the caption
    beside a single photo (me.txt beside me.jpg), else what the base itself sees in them, where the hypernetwork brings words to choose
    from (toon's does), else the person alone."""
    preview: str | None = None  # Prompt of the preview picture; default: the person's own prompt.
    author: str | None = None  # Who made the LoRA, for its metadata.
    license: str | None = None  # The LoRA's license, for its metadata.
    config: Annotated[PersonalizeChoices, Flat] = field(default_factory=PersonalizeChoices)


def run_personalize(args: Personalize) -> None:
    if len(args.photos) == 1 and args.photos[0].is_dir():
        run_folder(args)
        return
    from .. import formats, photos
    from ..checkpoint import write_json
    from ..folders import caption_of

    check_lora_name(args.output)
    args.refuse_existing(args.output, args.tokens)
    for file in args.photos:  # a photo's fault shows before seconds go into loading the base
        photos.load_photo(file)
    hdb = args.machine.open(args.base, args.hypernetwork)
    if hdb.source is None and args.hypernetwork == "auto":
        say(f"There is no hypernetwork for {args.base}: training from scratch.")
    config = hdb.personalize_config(args.config)
    pixels, notes = hdb.read_photos(args.photos, crop=config.crop, face=config.face)
    for note in notes:
        say(note)
    formats.check_layout(args.format, hdb.backbone.components)
    masks = hdb.read_masks(args.mask_file, args.photos, crop=config.crop, face=config.face) if args.mask_file else None
    prompt = hdb.naming(args.prompt or caption_of(args.photos))
    args.machine.explain(config)
    loaded = time.perf_counter()
    # an interrupted fine-tuning of the very same photos and settings goes on; anything else starts anew
    stamp = hashlib.sha256(repr((args.base, args.hypernetwork, prompt, config)).encode())
    for file in (*args.photos, *args.mask_file):
        stamp.update(file.read_bytes())
    state = args.output.with_name(f".{args.output.stem}-{stamp.hexdigest()[:12]}")
    me = hdb.personalize(pixels, masks=masks, prompt=prompt, config=config, directory=state)
    for text in dict.fromkeys(me.shown) if not me.warning else ():
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
    write_json(args.output.with_suffix(".json"), as_json(args, config))
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in me.seconds.items())
    say(f"{preview}: a preview")
    if me.warning:
        say(me.warning)
    say(f"starting and loading {loaded - STARTED:.1f} s, {took}, in all {time.perf_counter() - STARTED:.1f} s")


def run_folder(args: Personalize) -> None:
    """A LoRA for each person of a folder, and one sheet of previews."""
    from .. import formats
    from ..checkpoint import write_json
    from ..folders import list_identities

    alone = {"--tokens": args.tokens, "--face": args.config.face, "--mask-file": args.mask_file, "--prompt": args.prompt}
    for flag, value in alone.items():
        if value:
            raise InputError(f"{flag} is for one person, and {args.photos[0]} is a folder of people. Leave it out, or personalize each.")
    people = list_identities(args.photos[0])
    missing = {name: files for name, files in people.items() if args.overwrite or not (args.output / f"{name}.safetensors").exists()}
    if len(missing) < len(people):
        say(f"{args.output}: {len(people) - len(missing)} people are there already and kept")
    hdb = args.machine.open(args.base, args.hypernetwork)
    formats.check_layout(args.format, hdb.backbone.components)
    config = hdb.personalize_config(args.config)
    args.machine.explain(config)
    refused: dict[str, InputError] = {}
    started, sheet, names = time.perf_counter(), [], []
    with Progress("people", len(missing)) as progress:
        everyone = hdb.personalize_all(missing, config=config, on_refused=refused.__setitem__, quiet=True)
        for done, (name, me) in enumerate(everyone, 1):
            file = args.output / f"{name}.safetensors"
            me.save(file, layout=args.format, author=args.author, license=args.license, overwrite=True)
            say(f"{file}: rank {me.rank}{', ' + me.shown[0] if me.shown else ''}{'; ' + me.warning if me.warning else ''}")
            if done <= 16:
                sheet += hdb.generate(args.preview or me.prompt, me, seed=config.seed)
                names.append(name)
            progress.update(done)
    for name, error in refused.items():
        say(f"{name} is left out: {error}")
    if sheet:
        save_sheet(args.output / "preview.png", [sheet], [""], names, "the first of them")
    write_json(args.output / "personalize.json", as_json(args, config))
    say(f"{args.output}: {len(missing) - len(refused)} people in {time.perf_counter() - started:.1f} s, {len(refused)} left out")
    if refused and len(refused) == len(missing):
        raise InputError(f"no photo of {args.photos[0]} could be read; the first: {next(iter(refused.values()))}")


@dataclass
class Generate(WithBase, Writing):
    """Make pictures from prompts, with a personal LoRA and any number of style LoRAs.

    Write [V] where the person belongs. A LoRA takes a weight after a colon.

        hyperdreambooth generate "a pencil sketch of a [V] face" --lora me.safetensors -o pictures
        hyperdreambooth generate "a [V] face, oil painting" --lora me.safetensors:0.9 --style oil.safetensors:0.7 --count 4 -o pictures
    """

    prompts: tyro.conf.Positional[tuple[str, ...]]  # What to draw.
    output: Output  # The folder that gets the pictures and, for several, a grid.
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE[:WEIGHT]; a folder with one or user/repo[/file] of the hub will do. The first is the person (a LoRA or a token file), further ones
    are styles. Can be repeated."""
    style: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE[:WEIGHT] of a style LoRA of any kind, also without a personal one. Can be repeated."""
    config: Annotated[GenerateChoices, Flat] = field(default_factory=GenerateChoices)


def run_generate(args: Generate) -> None:
    from .. import photos
    from ..backbones import trained_by_flow
    from ..checkpoint import write_json
    from ..sampling import check_scheduler

    check_scheduler(args.config.scheduler, trained_by_flow(args.base))
    hdb = args.machine.open(args.base)
    config = hdb.generate_config(args.config)
    loras = [weighted(text) for text in args.lora]
    styles = [*loras[1:], *(weighted(text) for text in args.style)]
    me = hdb.load(loras[0][0]) if loras else None
    if loras:
        origins = config.origins | ({"strength": "given, times the LoRA's own weight"} if loras[0][1] != 1 else {})
        config = dataclasses.replace(config, strength=config.strength * loras[0][1], origins=origins)
    args.machine.explain(config)
    files = [args.output / f"{p + 1:02d}-{config.seed + i}.png" for p in range(len(args.prompts)) for i in range(config.count)]
    args.refuse_existing(*files)
    with Progress("pictures", len(files)) as progress:
        images = hdb.generate(args.prompts, me, styles=styles, config=config, on_picture=progress.update)
    for index, (file, image) in enumerate(zip(files, images, strict=True)):
        prompt, seed = args.prompts[index // config.count], config.seed + index % config.count
        photos.save_png(image, file, hdb.picture_metadata(prompt, seed, config, [*loras[:1], *styles]), overwrite=args.overwrite)
        say(f"{file}: {prompt} (seed {seed})")
    if len(images) > 1:
        rows = [images[i : i + config.count] for i in range(0, len(images), config.count)]
        seeds = [f"seed {config.seed + i}" for i in range(config.count)]
        save_sheet(args.output / "grid.png", rows, args.prompts, seeds, "all of them")
    write_json(args.output / "generate.json", as_json(args, config))
