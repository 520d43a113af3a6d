"""Lightweight DreamBooth on one subject."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..progress import say
from ..settings import Crop
from ..training_settings import TrainLightConfig
from .options import Flat, Machine, Output, as_json, refuse_existing


@dataclass
class TrainLight:
    """Lightweight DreamBooth: train one subject's tokens on its photos (1 to n), over frozen random aux matrices.

    hyperdreambooth train-light photos/*.jpg -o light --training.steps 300
    hyperdreambooth train-light me.jpg -o light --targets "unet*attn?.to_q" "text_encoder*q_proj" --prior-pictures 16
    """

    photos: tyro.conf.Positional[tuple[Path, ...]]
    """Photos of one subject."""
    output: Output
    """The folder of the run: tokens, LoRA, preview, config, checkpoint."""
    base: str = "toon"
    """"toon" (shipped), a directory in diffusers' layout, a .safetensors checkpoint (SD 1.x, SD 2.x, SDXL), or a hub id."""
    crop: Crop = "auto"
    """auto: the face where one is found, else the middle, and it says which. face: the face, or an error. center: the middle square. Faces
    are found with the extra `faces`."""
    overwrite: bool = False
    """Replace the LoRA of a finished run."""
    config: Annotated[TrainLightConfig, Flat] = field(default_factory=TrainLightConfig)
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


def run(args: TrainLight) -> None:
    from .. import photos
    from ..checkpoint import write_json
    from ..personal_lora import PLACEHOLDER
    from ..stages.dreambooth import Subject
    from ..stages.personalize import finish
    from ..stages.train_light import train_light
    from ..tables import save_row

    lora = args.output / "lora.safetensors"
    refuse_existing(lora, args.overwrite)
    hdb = args.machine.open(args.base, None)
    pixels, notes = hdb.read_photos(args.photos, crop=args.crop)
    for note in notes:
        say(note)
    prompt = args.config.prompt.replace(PLACEHOLDER, hdb.identifier)
    subject = Subject(hdb.backbone.encode_images(pixels)[None].float(), prompt)
    table, report = train_light(hdb.backbone, subject, args.config, directory=args.output)
    loras = finish(table.lightweight(table.tokens.detach()).detach().select(0))
    me = hdb.person(loras, args.config.prompt, tokens=table.tokens[0].detach().cpu(), lightweight=table.lightweight)
    me.save(lora, overwrite=True)
    save_row(args.output, "subject", table.tokens[0].detach().cpu(), table.lightweight.fingerprint())
    write_json(args.output / "config.json", as_json(args))
    picture = hdb.generate([args.config.prompt] * 4, me, seed=0)
    photos.save_png(
        photos.grid([picture], [args.config.prompt], [""] * 4), args.output / "preview.png", {"ai_generated": "true"}, overwrite=True
    )
    say(f"{lora}: rank {me.rank}, {len(me.loras)} layers, {report.seconds:.0f} s\n{args.output / 'preview.png'}: a preview")
