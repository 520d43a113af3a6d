"""Trains the toon world, stage by stage, each resumable: the recipe of what is shipped.

python -m worlds.toon.train base            one stage
python -m worlds.toon.train all --minutes 170   every unfinished stage in order, until the time is up
python -m worlds.toon.train adopt           takes the shipped weights as finished, so that another training starts from them
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer, ResNetConfig, ResNetModel

from hyperdreambooth.backbones import load_backbone
from hyperdreambooth.checkpoint import save_tensors
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.evaluation.judges import Judge
from hyperdreambooth.pretrained import load_hypernetwork, save_hypernetwork
from hyperdreambooth.stages.train_hypernetwork import train_hypernetwork
from hyperdreambooth.training import Run
from hyperdreambooth.training_settings import TrainHypernetworkConfig, TrainingConfig

from ..autoencoder import Autoencoder
from ..chain import Chain, main
from ..hypernetworks import Album, distilled_config, preserving_config
from ..pixels import to_tensor
from . import base, hypernetworks, pictures

PRECISION = "bf16" if torch.cuda.is_available() else "no"


class Toon(Chain):
    """The batches of the base (2,048 pictures), the recognizer (512 people) and pro (768 pictures) need a GPU."""

    name = "toon"
    autoencoder = Autoencoder(size=pictures.SIZE, kept=(12, 48, 32), widths=(16, 48, 96, 128))
    unet_widths = (128, 192)
    judge_widths = (48, 96, 192)
    each = pictures.CONTEXTS_EACH
    batches = {  # noqa: RUF012
        "encoder": 64,
        "recogniser": 512,
        "classifier": 96,
        "decoder": 16,
        "base": 2048,
        "pro": 768,
        "distilled": 32,
        "preserving": 32,
        "faithful": 64,
    }
    configs = {  # noqa: RUF012
        "encoder": TrainingConfig(
            steps=800, learning_rate=1e-3, weight_decay=0.05, warmup=30, cooldown=0.4, seed=3, log_every=20, validate_every=100
        ),
        "recogniser": TrainingConfig(
            steps=928, learning_rate=1e-3, weight_decay=0.05, warmup=30, cooldown=0.7, average=0.995, mixed_precision=PRECISION, seed=4,
            log_every=20, validate_every=100,
        ),
        "classifier": TrainingConfig(
            steps=650, learning_rate=2e-3, weight_decay=0.02, warmup=30, cooldown=0.4, seed=5, log_every=20, validate_every=100
        ),
        "decoder": TrainingConfig(
            steps=2200, learning_rate=2e-3, warmup=100, cooldown=0.3, average=0.998, seed=2, log_every=50, validate_every=500
        ),
        "base": TrainingConfig(
            steps=1935, optimizer="muon", learning_rate=1.5e-3, weight_decay=0.01, warmup=30, cooldown=0.7, average=0.995,
            mixed_precision=PRECISION, seed=31, log_every=50, validate_every=300,
        ),
    }  # fmt: skip
    steps = {"pro": 1085, "distilled": 1000, "preserving": 2400, "table": 50, "faithful": 200}  # noqa: RUF012
    assets = Path("src/hyperdreambooth/assets/toon")
    faithful = Path("benchmarks/faithful")

    def __init__(self, runs: Path = Path("runs/toon")):
        super().__init__(runs)

    def training_pictures(self) -> pictures.Pictures:
        return pictures.training_pictures(self.runs / "data")

    def base_pictures(self) -> pictures.Pictures:
        return pictures.base_pictures(self.runs / "data")

    def validation_pictures(self) -> pictures.Pictures:
        """Two pictures of each of some validation people, in random contexts."""
        render = self.runs / "data" / "validation"
        pictures.render(render, ["--first", str(pictures.FIRST["validation"]), "--people", "300", "--contexts", "2"])
        return pictures.Pictures.load(render)

    def validation_pairs(self) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
        data = self.validation_pictures()
        images = to_tensor(data.pixels)
        return images[::2], images[1::2], [row["context"] for row in data.rows]

    def tokenizer(self) -> CLIPTokenizer:
        return base.build_tokenizer()

    def training_caption(self, data: Any, index: int, draw: random.Random) -> str:
        return pictures.training_caption(data.rows[index], draw)

    def held_out_caption(self, data: Any, index: int, draw: random.Random) -> str:
        return pictures.caption(data.rows[index]["context"], mention=0.93, draw=draw)

    def classes(self) -> dict[str, list[str]]:
        return {kind: list(choices) for kind, choices in pictures.CONTEXTS.items()}

    def labels(self, data: Any) -> dict[str, Tensor]:
        return {kind: torch.tensor([names.index(row["context"][kind]) for row in data.rows]) for kind, names in self.classes().items()}

    def build_encoder(self) -> FaceEncoder:
        """An encoder from pictures of 64 x 64 pixels to 16 features of 256 numbers."""
        config = ResNetConfig(embedding_size=48, hidden_sizes=[64, 128, 256], depths=[1, 2, 2], layer_type="basic")
        return FaceEncoder(ResNetModel(config), size=pictures.SIZE, trained=True)

    def album(self, split: str, people: int | None = None) -> Album:
        name, first, whole = ("hyper", 0, pictures.HYPER_PEOPLE) if split == "train" else ("hyper-validation", pictures.FIRST[split], 150)
        return hypernetworks.album(hypernetworks.load_pictures(self.runs / "data" / name, first, whole), people or whole)

    def train_distilled(self, minutes: float | None, steps: int | None = None) -> bool:
        """Trains pro to draw with plain guidance what it draws with context guidance."""
        config = distilled_config(steps or self.steps["distilled"], self.batches["distilled"], tuple(pictures.written_prompts()))
        return self.continue_pro("distilled", config, minutes)

    def train_preserving(self, minutes: float | None, steps: int | None = None) -> bool:
        """Trains pro to leave the base's predictions unchanged for prompts without [V]."""
        config = preserving_config(steps or self.steps["preserving"], self.batches["preserving"])
        return self.continue_pro("preserving", config, minutes)

    def continue_pro(self, name: str, config: TrainHypernetworkConfig, minutes: float | None) -> bool:
        """Another training of pro, from its finished weights and with its own encoder."""
        backbone = self.trained_backbone()
        if torch.cuda.is_available():
            backbone.components.cuda()
        start, info = load_hypernetwork(self.runs / "pro" / "model", backbone)
        data, validation = (self.identity_data(start.encoder, split, people) for split, people in (("train", 4000), ("validation", None)))
        run = Run(self.runs / name, minutes=minutes)
        source, report = train_hypernetwork(backbone, start.encoder, data, config, run=run, validation=validation, start=start)
        if report.finished:
            trained = info.trained | {name: {"steps": report.steps, "batch": config.batch, "people": len(data.names)}}
            targets = {path: list(shape) for path, shape in source.lightweight.targets.items()}
            info = replace(info, targets=targets, trained=trained)
            save_hypernetwork(self.runs / name / "model", source.cpu(), info, torch.float32)
        return report.finished

    def about(self) -> dict[str, Any]:
        """The defaults of personalize and generate were chosen on validation people."""
        return {
            "describe": pictures.slots(),
            "personalize": {"steps": 25, "rank": 8, "learning_rate": 6e-3, "copies": 8}
            | {"targets": ["*up_blocks.1*"], "noise_mean": -0.5, "noise_std": 0.5},
            "generate": {"steps": 10, "guidance": 2.0, "identity_guidance": "off", "identity_until": 0.3}
            | {"context_guidance": 6.0, "context_until": 0.3},
            "data": "cartoon people drawn with facesjs (Apache-2.0): see worlds/toon/README.md",
            "license": "apache-2.0",
        }

    def adopt(self, minutes: float | None = None) -> bool:
        """Takes the shipped weights as if they had been trained here."""
        backbone = load_backbone("toon")
        assert self.components  # equal to the shipped encoder's, since they depend on the training pictures only
        backbone.pipe.save_pretrained(str(self.runs / "base" / "model"))
        save_tensors(self.runs / "decoder" / "model.safetensors", backbone.pipe.vae.decoder.state_dict())
        for name in ("recogniser", "classifier"):
            Judge.from_pretrained(self.assets / name).save_pretrained(self.runs / name / "model")
        source, info = load_hypernetwork(self.assets / "hypernetwork", backbone)
        save_hypernetwork(self.runs / "pro" / "model", source, info, torch.float32)
        source.encoder.save_pretrained(self.runs / "encoder" / "model")
        return True


STAGES = ("encoder", "recogniser", "classifier", "decoder", "base", "pro", "table", "faithful", "export")
OTHERS = ("adopt", "distilled", "preserving")


if __name__ == "__main__":
    sys.exit(main(Toon, STAGES, OTHERS, sys.argv[1:], __doc__ or ""))
