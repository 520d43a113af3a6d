"""The two main commands: `personalize` makes a personal LoRA, and `generate` draws with it."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .. import STARTED
from ..errors import InputError
from ..progress import Progress, say
from ..settings import GenerateChoices, Layout, PersonalizeChoices
from .engines import WithEngine, each
from .options import Flat, Output, WithHypernetwork, Writing, check_lora_name, save_settings, save_sheet, weighted

if TYPE_CHECKING:
    from ..api import HyperDreamBooth


@dataclass
class Personalize(WithEngine, WithHypernetwork, Writing):
    """Turn photos of one person into a personal LoRA.

    The hypernetwork predicts a LoRA from the photo; a few steps of rank-relaxed fine-tuning refine it. The result is a
    standard LoRA file, with a preview picture beside it. A folder of people (identity/picture.png, or a picture each) gives a folder of
    LoRAs, several people trained in one batch; LoRAs that exist already are kept.

        hyperdreambooth personalize face.png -o me.safetensors
        hyperdreambooth personalize people/ -o loras
        hyperdreambooth personalize people/ -o loras --engine ray
        hyperdreambooth personalize me1.jpg me2.jpg --base runwayml/stable-diffusion-v1-5 --hypernetwork none -o me.safetensors
    """

    photos: tyro.conf.Positional[tuple[Path, ...]]  # One photo or several of the same person; or one folder of people.
    output: Output  # The LoRA file to write (.safetensors); for a folder of people, the folder for their LoRAs.
    tokens: Path | None = None  # Also write the prediction as a token file (about 120 KB for Stable Diffusion 1.5).
    format: Layout = "diffusers"
    """Layout of the LoRA file: diffusers (also for PEFT, and for ComfyUI on SD 3 and Flux), or kohya, which ComfyUI and A1111 need on
    Stable Diffusion 1, 2 and XL and diffusers opens too."""
    prompt: str | None = None
    """What the photos show, such as "a [V] face on a blue background": what it names isn't learned as part of the person. Default: the
    caption beside a single photo (me.txt beside me.jpg), else the words that fit the photo best by the base's loss, where the hypernetwork
    has words to choose from (toon's has), else the person alone."""
    preview: str | None = None  # Prompt of the preview picture; default: the person's own prompt.
    author: str | None = None  # Who made the LoRA, for its metadata.
    license: str | None = None  # The LoRA's license, for its metadata.
    config: Annotated[PersonalizeChoices, Flat] = field(default_factory=PersonalizeChoices)


def run_personalize(args: Personalize) -> None:
    args.check_engine()
    if len(args.photos) == 1 and args.photos[0].is_dir():
        run_folder(args)
        return
    if args.engine != "local":
        raise InputError("--engine is for a folder of people. Leave it out for one person's photos.")
    import torch

    from .. import formats, photos
    from ..checkpoint import stamp_of
    from ..folders import caption_of

    check_lora_name(args.output)
    args.refuse_existing(args.output, args.tokens)
    args.refuse_foreign_settings(args.output.with_suffix(".json"))
    preview = photos.preview_path(args.output, args.photos)
    if not photos.is_generated(preview):
        args.refuse_existing(preview)
    for file in args.photos:  # a bad photo is reported before the base is loaded, which takes seconds
        photos.load_photo(file)
    hdb = args.machine.open(args.base, args.hypernetwork)
    if args.tokens and hdb.source is None:
        raise InputError(f"{args.tokens}: only a hypernetwork's prediction has tokens, and none is open. Name one, or leave --tokens out.")
    if hdb.source is None and args.hypernetwork == "auto":
        say(f"There is no hypernetwork for {args.base}: training from scratch.")
    config = hdb.personalize_config(args.config)
    pixels, notes = hdb.read_photos(args.photos, crop=config.crop, face=config.face)
    for note in notes:
        say(note)
    formats.check_layout(args.format, hdb.backbone.components)
    prompt = hdb.naming(args.prompt or caption_of(args.photos))
    args.machine.explain(config)
    loaded = time.perf_counter()
    # an interrupted fine-tuning resumes with the same photos and settings only; with others a new one starts
    opened = [args.base, hdb.backbone.denoiser.dtype, *(getattr(args.machine, name) for name in ("quantize", "prediction", "parts"))]
    opened += [hdb.device.type, torch.get_num_threads()]  # both decide how the photos' latents are rounded
    weights = hdb.source.state_dict().values() if hdb.source else ()
    stamp = stamp_of(opened, prompt, config, *weights, *(file.read_bytes() for file in args.photos))
    state = args.output.with_name(f".{args.output.stem}-{stamp[:12]}")
    me = hdb.personalize(pixels, prompt=prompt, config=config, directory=state)
    for text in dict.fromkeys(me.shown) if not me.warning else ():
        say(f'taken to show "{text}"; --prompt says otherwise')
    save = functools.partial(me.save, args.output, layout=args.format, author=args.author, license=args.license, overwrite=True)
    save()  # at once: on a large base the preview takes long
    say(f"{args.output}: rank {me.rank}, {len(me.loras)} layers, {args.output.stat().st_size / 1e6:.2f} MB, trigger {me.identifier}")
    shutil.rmtree(state, ignore_errors=True)
    if args.tokens:
        me.save_tokens(args.tokens, overwrite=args.overwrite)
        say(f"{args.tokens}: {args.tokens.stat().st_size / 1e3:.0f} KB")
    picture = hdb.generate(args.preview or me.prompt, me, seed=config.seed)[0]
    save(thumbnail=picture)
    metadata = hdb.picture_metadata(args.preview or me.prompt, config.seed, hdb.generate_config(), [(str(args.output), 1.0)])
    photos.save_png(picture, preview, metadata, overwrite=True)
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in me.seconds.items())
    say(f"{preview}: a preview")
    save_settings(args.output.with_suffix(".json"), args, config)
    if me.warning:
        say(me.warning)
    say(f"starting and loading {loaded - STARTED:.1f} s, {took}, in all {time.perf_counter() - STARTED:.1f} s")


def run_folder(args: Personalize) -> None:
    """Makes a LoRA for each person of a folder, and one sheet of previews of the first 16. Raises InputError where all were refused."""
    from .. import formats
    from ..stages.dreambooth import chunks_of

    alone = {"--tokens": args.tokens, "--face": args.config.face, "--prompt": args.prompt}
    for flag, value in alone.items():
        if value:
            raise InputError(f"{flag} is for one person, and {args.photos[0]} is a folder of people. Leave it out, or personalize each.")
    args.refuse_foreign_settings(args.output / "personalize.json")
    hdb = args.machine.open(args.base, args.hypernetwork)
    formats.check_layout(args.format, hdb.backbone.components)
    work = People(args, hdb)
    missing, many = work.missing(work.people), dict[int, list[str]]()
    if len(missing) < len(work.people):
        say(f"{args.output}: {len(work.people) - len(missing)} people are there already and kept")
    args.machine.explain(work.config)
    for name, files in work.people.items():  # people of one batch have the same number of photos
        many.setdefault(len(files), []).append(name)
    batches = [batch for names in many.values() for batch in chunks_of(names, hdb.backbone.side_by_side) if work.missing(batch)]
    refused, started = dict[str, str](), time.perf_counter()
    for made, broken in each(args, batches, work, People, "batches of people"):
        refused |= broken
        for name, words in made.items():
            say(f"{args.output / name}.safetensors: {words}")
    for name, error in refused.items():
        say(f"{name} is left out: {error}")
    there = [name for name in missing if name not in refused]
    if there:
        people = [hdb.load(args.output / f"{name}.safetensors") for name in there[:16]]
        sheet = [picture for me in people for picture in hdb.generate(args.preview or me.prompt, me, seed=work.config.seed)]
        save_sheet(args.output / "preview.png", [sheet], [""], there[:16], "the first of them")
    save_settings(args.output / "personalize.json", args, work.config)
    say(f"{args.output}: {len(there)} people in {time.perf_counter() - started:.1f} s, {len(refused)} left out")
    if missing and not there:
        raise InputError(f"no photo of {args.photos[0]} could be read; the first: {next(iter(refused.values()))}")


class People:
    """Makes the LoRAs of people of a folder, in one batch, where they don't exist yet.

    How sums are rounded depends on all people of a batch; so the whole batch is trained where any of its LoRAs is missing.
    """

    def __init__(self, args: Personalize, hdb: HyperDreamBooth | None = None):
        from ..folders import list_identities

        self.args, self.people = args, list_identities(args.photos[0])
        self.hdb = hdb or args.machine.open(args.base, args.hypernetwork)
        self.config = self.hdb.personalize_config(args.config)

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.args.overwrite or not (self.args.output / f"{name}.safetensors").exists()]

    def readable(self, name: str) -> bool:
        try:
            return bool(self.hdb.read_photos(self.people[name], crop=self.config.crop, face=self.config.face))
        except InputError:
            return False

    def __call__(self, batch: list[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Returns name -> a summary of the LoRA that was made, and name -> why that person was refused."""
        missing, made, refused = self.missing(batch), dict[str, str](), dict[str, InputError]()
        wanted = batch if any(map(self.readable, missing)) else missing
        people = {name: self.people[name] for name in wanted}
        everyone = self.hdb.personalize_all(people, config=self.config, on_refused=refused.__setitem__, quiet=True)
        for name, me in everyone:
            if name in missing:
                file, args = self.args.output / f"{name}.safetensors", self.args
                me.save(file, layout=args.format, author=args.author, license=args.license, overwrite=True)
                made[name] = "; ".join(filter(None, [f"rank {me.rank}", *me.shown[:1], *me.notes, me.warning]))
        return made, {name: str(why) for name, why in refused.items() if name in missing}


@dataclass
class Generate(WithHypernetwork, Writing):
    """Make pictures from prompts, with a personal LoRA and any number of style LoRAs.

    Write [V] where a prompt means the person. A LoRA's weight follows a colon.

        hyperdreambooth generate "a pencil sketch of a [V] face" --lora me.safetensors -o pictures
        hyperdreambooth generate "a [V] face, oil painting" --lora me.safetensors:0.9 --style oil.safetensors:0.7 --count 4 -o pictures
    """

    prompts: tyro.conf.Positional[tuple[str, ...]]  # What to draw.
    output: Output  # Folder for the pictures and, where there are several, a grid.
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE[:WEIGHT]; also a folder with one LoRA, or user/repo[/file] on the hub. The first is the person (a LoRA, or a token file of
    the hypernetwork), further ones are styles. Can be repeated."""
    style: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE[:WEIGHT] of a style LoRA of any kind, also without a personal one. Can be repeated."""
    config: Annotated[GenerateChoices, Flat] = field(default_factory=GenerateChoices)


def run_generate(args: Generate) -> None:
    from .. import photos
    from ..backbones import trained_by_flow
    from ..sampling import check_scheduler

    if not args.prompts:
        raise InputError('there is no prompt. Write what to draw, such as "a [V] face".')
    check_scheduler(args.config.scheduler, trained_by_flow(args.base))
    args.refuse_foreign_settings(args.output / "generate.json")
    hdb = args.machine.open(args.base, args.hypernetwork)
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
    save_settings(args.output / "generate.json", args, config)
