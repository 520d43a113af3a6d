import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ..progress import Progress, say
from ..settings import GenerateChoices
from .options import Flat, Output, WithBase, Writing, as_json, save_sheet, weighted


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
