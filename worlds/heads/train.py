"""Trains the heads world, stage by stage, each resumable.

python -m worlds.heads.train pictures           draws the training pictures of all stages
python -m worlds.heads.train base               one stage
python -m worlds.heads.train all --minutes 170  every unfinished stage in order, until the time is up
python -m worlds.heads.train sample             two sheets in runs/heads: pictures by the current base, reconstructions by the decoder

Everything is kept in runs/heads, or in the folder that HEADS_RUNS or --runs names. HEADS_SHARDS is the number of shards of training
people, HEADS_WORKERS the number of processes that draw them.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer, ResNetConfig, ResNetModel

from hyperdreambooth.checkpoint import read_header, read_tensors, save_tensors
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.training_settings import TrainingConfig

from .. import base, synthesis
from ..autoencoder import Autoencoder
from ..chain import Chain, main
from ..hypernetworks import Album
from ..pixels import psnr, to_pixels, to_tensor
from . import contexts, pictures
from .sheet import tiled

SHARDS = int(os.environ.get("HEADS_SHARDS", "10"))
"""Shards of training people, of 4,000 pictures and 200 MB each."""
WORKERS = int(os.environ.get("HEADS_WORKERS", "1"))
"""Processes that draw shards."""
GPU = torch.cuda.is_available()
PRECISION = "bf16" if GPU else "no"
LENGTH = 77


class Heads(Chain):
    name = "heads"
    autoencoder = Autoencoder(size=128, kept=(12, 32, 64, 128), widths=(16, 48, 104, 200, 272), groups=1)
    unet_widths = (160, 256)
    judge_widths = (48, 96, 192, 256)
    each = pictures.EACH
    batches = {  # noqa: RUF012
        "encoder": 64,
        "recogniser": 256 if GPU else 64,
        "classifier": 64,
        "decoder": 64 if GPU else 8,
        "base": 1024 if GPU else 64,
        "pro": 512 if GPU else 64,
        "faithful": 64,
    }
    configs = {  # noqa: RUF012
        "encoder": TrainingConfig(
            steps=800, learning_rate=1e-3, weight_decay=0.05, warmup=30, cooldown=0.4, seed=3, log_every=20, validate_every=100
        ),
        "recogniser": TrainingConfig(
            steps=1500, learning_rate=1e-3, weight_decay=0.05, warmup=30, cooldown=0.4, mixed_precision=PRECISION, seed=4, log_every=20,
            validate_every=100,
        ),
        "classifier": TrainingConfig(
            steps=1500, learning_rate=2e-3, weight_decay=0.02, warmup=30, cooldown=0.4, seed=5, log_every=20, validate_every=100
        ),
        "decoder": TrainingConfig(
            steps=2000, optimizer="muon", learning_rate=5e-5, warmup=20, cooldown=0.5, average=0.98, seed=2, log_every=20,
            validate_every=100,
        ),
        "base": TrainingConfig(
            steps=20_000, optimizer="muon", learning_rate=1e-3, weight_decay=0.01, warmup=30, cooldown=0.3, average=0.995,
            mixed_precision=PRECISION, seed=31, log_every=20, validate_every=200,
        ),
    }  # fmt: skip
    steps = {"pro": 5000, "table": 50, "faithful": 200}  # noqa: RUF012

    def __init__(self, runs: Path | None = None):
        super().__init__(runs or Path(os.environ.get("HEADS_RUNS", "runs/heads")))
        self.assets, self.faithful = self.runs / "export", self.runs / "export" / "faithful"

    def pictures(self, minutes: float | None) -> bool:
        """Draws missing shards; a shard takes two minutes of an otherwise idle core. Returns False if the time runs out first."""
        folder, started = self.runs / "pictures", time.monotonic()
        jobs = [(split, shard) for split, shards in (("validation", 1), ("test", 1), ("train", SHARDS)) for shard in range(shards)]
        jobs = [(folder, *job) for job in jobs if not pictures.shard_file(folder, *job).is_file()]
        with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
            for start in range(0, len(jobs), WORKERS):
                if minutes is not None and time.monotonic() - started > 60 * minutes:
                    return False
                for file in pool.map(pictures.draw, *zip(*jobs[start : start + WORKERS], strict=True)):
                    print(time.strftime("%T"), file, flush=True)
        return True

    def load(self, split: str) -> pictures.Pictures:
        return pictures.Pictures.load(self.runs / "pictures", split)

    def training_pictures(self) -> pictures.Pictures:
        return self.load("train")

    def base_pictures(self) -> pictures.Pictures:
        return self.load("train")

    def validation_pictures(self) -> pictures.Pictures:
        return self.load("validation")

    def tokenizer(self) -> CLIPTokenizer:
        return base.build_tokenizer(contexts.vocabulary(), LENGTH)

    def training_caption(self, data: Any, index: int, draw: random.Random) -> str:
        roll = draw.random()
        if roll < 0.1:
            return ""
        generator = np.random.default_rng(draw.getrandbits(63))
        who, where = data.person(index), data.context(index)
        if roll < 0.55:
            return contexts.caption(who, where, generator, subject="a [V] face")
        return contexts.caption(who, where, generator, looks=0.7)

    def held_out_caption(self, data: Any, index: int, draw: random.Random) -> str:
        generator = np.random.default_rng(draw.getrandbits(63))
        return contexts.caption(data.person(index), data.context(index), generator, subject="a [V] face")

    def classes(self) -> dict[str, list[str]]:
        return contexts.classes()

    def labels(self, data: Any) -> dict[str, Tensor]:
        classified = [contexts.classified(data.context(index)) for index in range(len(data))]
        return {kind: torch.tensor([names.index(one[kind]) for one in classified]) for kind, names in self.classes().items()}

    def validation_pairs(self, people: int = 300) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
        """A photo and a picture in any context of each validation person."""
        data = self.validation_pictures()
        rows = np.arange(min(people, len(data) // self.each)) * self.each
        first, second = (to_tensor(data[rows + k]) for k in (0, self.each - 1))
        classified = [contexts.classified(data.context(index)) for row in rows.tolist() for index in (row, row + self.each - 1)]
        return first, second, classified

    def build_encoder(self) -> FaceEncoder:
        """An encoder from pictures of 128 x 128 pixels to 16 features of 256 numbers."""
        config = ResNetConfig(embedding_size=32, hidden_sizes=[48, 96, 160, 256], depths=[1, 1, 2, 2], layer_type="basic")
        return FaceEncoder(ResNetModel(config), size=pictures.SIZE, trained=True)

    def album(self, split: str, people: int | None = None) -> Album:
        """Two photos and a picture in a seen context of each person."""
        data = self.load(split)
        whole = len(data) // self.each
        count = min(people or (whole if split == "train" else 150), whole)
        indices = (np.arange(count)[:, None] * self.each + np.arange(3)).flatten()
        names = [str(data.first + person) for person in range(count)]
        prompts = [self.held_out_caption(data, index, random.Random(index)) for index in indices.tolist()]
        return Album(data, indices, names, (True, True, False), prompts)

    def about(self) -> dict[str, Any]:
        """The defaults were not chosen on validation people of this world, but taken over from the toon world."""
        return {
            "describe": contexts.slots(),
            "personalize": {"steps": 25, "rank": 8, "learning_rate": 6e-3, "copies": 8},
            "generate": {"steps": 10, "guidance": 2.0, "identity_guidance": "off"},
            "data": "rendered heads on shapes of ICT-FaceKit (MIT): see worlds/heads/README.md",
            "license": "apache-2.0",
        }

    def latents_of(self, data: Any) -> Tensor:
        """Latents of all pictures, fp16, cached on disk per shard; computed anew if the encoder's components have changed."""
        mark = hashlib.sha256(self.components.matrix.numpy().tobytes()).hexdigest()
        parts = []
        for shard, pixels in enumerate(data.shards):
            file = self.runs / "latents" / f"{data.split}-{shard:03d}.safetensors"
            if not file.is_file() or read_header(file)[1].get("components") != mark:
                save_tensors(file, {"latents": super().latents_of(pixels)}, {"components": mark})
            parts.append(read_tensors(file)[0]["latents"])
        return torch.cat(parts)

    def build_autoencoder(self) -> AutoencoderKL:
        vae = super().build_autoencoder()
        data = self.training_pictures()
        latents = self.components.encode(to_tensor(data[np.linspace(0, 1999, 8, dtype=int) % len(data)]))
        synthesis.write_decoder(self.autoencoder, vae, self.components, latents)
        return vae

    def trainable_decoder(self, vae: AutoencoderKL) -> nn.Module:
        return synthesis.trainable(vae.decoder)

    @torch.no_grad()
    def sample(self, minutes: float | None = None) -> bool:
        """Draws two sheets of test people: pictures by the current base from their captions, and reconstructions by the decoder."""
        backbone = self.trained_backbone(unfinished=True)
        data = self.load("test")
        people = min(6, len(data) // self.each)
        rows = np.array([row * self.each + k for row in range(people) for k in (0, 4)])
        rebuilt = backbone.decode_images(backbone.encode_images(to_tensor(data[rows])))
        tiled([*data[rows], *to_pixels(rebuilt)], len(rows)).save(self.runs / "sample-decoder.png")
        print(f"decoder: {psnr(rebuilt, to_tensor(data[rows]))['psnr']:.2f} dB on {len(rows)} test pictures")
        everyone = range(0, min(24 * self.each, len(data)), self.each)
        prompts = [self.held_out_caption(data, k, random.Random(k)) for k in everyone]
        prompts += [contexts.caption(data.person(k), data.context(k + 4), np.random.default_rng(k), 0.9) for k in everyone]
        generator = torch.Generator().manual_seed(0)
        drawn = [
            np.asarray(picture)
            for start in range(0, len(prompts), 12)
            for picture in backbone.pipe(
                prompts[start : start + 12], num_inference_steps=20, guidance_scale=3.0, generator=generator
            ).images
        ]
        tiled(drawn, 12).save(self.runs / "sample-base.png")
        (self.runs / "sample-base.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        return True


STAGES = ("pictures", "encoder", "recogniser", "classifier", "decoder", "base", "pro", "table", "faithful", "export")
OTHERS = ("sample",)


if __name__ == "__main__":
    sys.exit(main(Heads, STAGES, OTHERS, sys.argv[1:], __doc__ or ""))
