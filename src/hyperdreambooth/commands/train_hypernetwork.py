import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import InputError
from ..progress import say
from ..training_settings import TrainHypernetworkConfig
from .options import Flat, Output, WithBase, WithCrop, as_json


@dataclass
class TrainHypernetwork(WithBase, WithCrop):
    """Train a hypernetwork: a face photo in, LoRA tokens out.

    pro (default) needs no table: aux matrices are learnt, with the denoising loss. faithful is the paper's: frozen aux,
    and a weight loss against the table of `preoptimize`. Watch the identity gain (loss with a stranger's photo minus loss
    with one's own): it must rise; the loss itself hardly moves.

        hyperdreambooth train-hypernetwork faces --validation-folder strangers -o hypernetwork
        hyperdreambooth train-hypernetwork faces --table table --mode faithful -o hypernetwork
    """

    folder: tyro.conf.Positional[Path]
    """Pictures of identities: identity/picture.png, or one picture each."""
    output: Output
    """The hypernetwork's folder; `personalize --hypernetwork` takes it."""
    encoder: str = "auto"
    """A vision model of transformers, by directory or hub id (DINOv2, CLIP, ViT). auto: the shipped one for toon."""
    validation_folder: Path | None = None
    """Identities for the identity gain; default: the last tenth of the folder's."""
    table: Path | None = None
    """faithful: the folder of `preoptimize`."""
    start: str | None = None
    """A hypernetwork (directory or hub id) whose weights it begins with: the same layers, encoder and sizes."""
    data: str = ""
    """What the pictures are, in words, for the model card."""
    license: str = ""
    """The license of the weights, for the model card."""
    config: Annotated[TrainHypernetworkConfig, Flat] = field(default_factory=TrainHypernetworkConfig)


def run(args: TrainHypernetwork) -> None:
    from .. import photos
    from ..assets import toon
    from ..checkpoint import write_json
    from ..data import load_identities
    from ..encoder import FaceEncoder
    from ..lightweight import LightweightLora
    from ..lora import find_targets
    from ..personal_lora import PLACEHOLDER
    from ..pretrained import HyperNetworkInfo, load_hypernetwork, save_hypernetwork
    from ..stages.describe import familiar
    from ..stages.train_hypernetwork import preview, train_hypernetwork
    from ..tables import read_table

    if args.encoder == "auto" and args.base != "toon":
        raise InputError(f"{args.base} has no encoder of its own: name a vision model with --encoder, such as facebook/dinov2-small.")
    hdb = args.machine.open(args.base, None)
    config = args.config
    config.prompt = config.prompt.replace(PLACEHOLDER, hdb.identifier)
    model = toon.directory("hypernetwork") / "encoder" if args.encoder == "auto" else args.encoder
    encoder = FaceEncoder.from_pretrained(model, trained=config.train_encoder).to(hdb.device).eval()
    start = load_hypernetwork(args.start, hdb.backbone)[0] if args.start else None
    read = partial(
        load_identities, backbone=hdb.backbone, encoder=encoder, prompt=config.prompt, crop=args.crop, cache=args.output / "cache"
    )
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
        hdb.backbone, encoder, data, config, directory=args.output / "run", validation=validation, table=table, start=start
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
    say(f"{args.output}: a hypernetwork; {report.validations[-1] if report.validations else ''}")
    sheet = preview(hdb.backbone, source.eval(), validation, 6)
    shown = photos.save_png(sheet, args.output / "preview.png", {"ai_generated": "true"}, overwrite=True)
    say(f"{shown}: people it never saw, and what is drawn of them")
