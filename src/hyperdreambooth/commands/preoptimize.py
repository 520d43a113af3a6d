"""Tokens for every identity of a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import InputError
from ..progress import say
from ..settings import Crop
from ..training_settings import PreoptimizeConfig
from .options import Flat, Machine, Output, as_json


@dataclass
class Preoptimize:
    """Pre-optimize tokens for every identity of a folder: identity/picture.png, or one picture each.

    Chunks of identities are trained side by side and written row by row; stop it at any moment and start it again.
    `export` makes a LoRA of any row.

        hyperdreambooth preoptimize faces -o table
        hyperdreambooth export table --identity alice -o alice.safetensors
    """

    folder: tyro.conf.Positional[Path]
    """Pictures of identities."""
    output: Output
    """The table's folder."""
    base: str = "toon"
    """"toon" (shipped), a directory in diffusers' layout, a .safetensors checkpoint (SD 1.x, SD 2.x, SDXL), or a hub id."""
    crop: Crop = "auto"
    """auto: the face where one is found, else the middle, and it says which. face: the face, or an error. center: the middle square. Faces
    are found with the extra `faces`."""
    config: Annotated[PreoptimizeConfig, Flat] = field(default_factory=PreoptimizeConfig)
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


def run(args: Preoptimize) -> None:
    from .. import photos
    from ..checkpoint import write_json
    from ..data import load_identities
    from ..lightweight import LightweightLora
    from ..lora import find_targets
    from ..personal_lora import PLACEHOLDER
    from ..stages.preoptimize import preoptimize, read_table_config

    hdb = args.machine.open(args.base, None)
    args.config.prompt = args.config.prompt.replace(PLACEHOLDER, hdb.identifier)
    data = load_identities(args.folder, hdb.backbone, None, args.config.prompt, crop=args.crop, cache=args.output / "cache")
    saved = args.output / "config.json"
    if saved.is_file():
        before = read_table_config(args.output).lightweight
        if before != args.config.lightweight:
            raise InputError(f"{saved} was made with other token sizes ({before}). Use those, or another folder.")
    write_json(saved, as_json(args))
    table = preoptimize(hdb.backbone, data, args.config, args.output)
    targets = find_targets(hdb.backbone.components, args.config.targets or hdb.backbone.default_targets)
    lightweight = LightweightLora(targets, args.config.lightweight).to(hdb.device)
    names = data.names[:8]
    sheet = []
    for name in names:
        loras = lightweight(table[name][None].to(hdb.device)).detach().select(0)
        sheet.append(hdb.generate([args.config.prompt] * 3, loras, seed=0))
    preview = args.output / "preview.png"
    photos.save_png(photos.grid(sheet, names, [""] * 3), preview, {"ai_generated": "true"}, overwrite=True)
    say(f"{args.output}: {len(table)} identities\n{preview}: the first of them")
