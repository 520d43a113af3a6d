from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..progress import say
from ..training_settings import TrainLightConfig
from .options import Flat, Output, WithBase, WithCrop, Writing, as_json, save_sheet


@dataclass
class TrainLight(WithBase, WithCrop, Writing):
    """Lightweight DreamBooth: train one subject's tokens on its photos (1 to n), over frozen random aux matrices.

    hyperdreambooth train-light photos/*.jpg -o light --training.steps 300
    hyperdreambooth train-light me.jpg -o light --targets "unet*attn?.to_q" "text_encoder*q_proj" --prior-pictures 16
    """

    photos: tyro.conf.Positional[tuple[Path, ...]]
    """Photos of one subject."""
    output: Output
    """The folder of the run: tokens, LoRA, preview, config, checkpoint."""
    config: Annotated[TrainLightConfig, Flat] = field(default_factory=TrainLightConfig)


def run(args: TrainLight) -> None:
    from ..checkpoint import write_json
    from ..personal_lora import PLACEHOLDER
    from ..stages.dreambooth import Subject
    from ..stages.personalize import finish
    from ..stages.train_light import train_light
    from ..tables import save_row

    lora = args.output / "lora.safetensors"
    args.refuse_existing(lora)
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
    say(f"{lora}: rank {me.rank}, {len(me.loras)} layers, {report.seconds:.0f} s")
    pictures = hdb.generate([args.config.prompt] * 4, me, seed=0)
    save_sheet(args.output / "preview.png", [pictures], [args.config.prompt], [""] * 4, "a preview")
