"""Trains the toon world, stage by stage, each resumable: the recipe of what is shipped.

    python -m worlds.toon.train base            one stage
    python -m worlds.toon.train all --minutes 170   whatever is unfinished first, until the time is up
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from hyperdreambooth.backbones import StableDiffusion
from hyperdreambooth.checkpoint import read_tensors, save_tensors
from hyperdreambooth.training import TrainingConfig, fit

from . import autoencoder, base, pictures

RUNS = Path("runs/toon")


def components(runs: Path, data: pictures.Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder's matrix, computed once from every fifth training picture."""
    file = runs / "components.safetensors"
    if not file.is_file():
        matrix, offset = autoencoder.principal_components(pictures.to_tensor(data.pixels[::5]))
        save_tensors(file, {"matrix": matrix, "offset": offset})
    tensors, _ = read_tensors(file)
    return tensors["matrix"], tensors["offset"]


def latents_of(runs: Path, data: pictures.Pictures) -> torch.Tensor:
    """All latents, fp16."""
    matrix, offset = components(runs, data)
    return torch.cat([autoencoder.encode(matrix, offset, pictures.to_tensor(data.pixels[i : i + 1000])).half() for i in range(0, len(data.pixels), 1000)])


def train_base(runs: Path, minutes: float | None, steps: int = 4200) -> bool:
    """Batches of 64."""
    data = pictures.training_pictures(runs / "data")
    vae = autoencoder.build()
    autoencoder.write_encoder(vae, *components(runs, data))
    torch.manual_seed(0)
    backbone = StableDiffusion(base.build(vae))
    training = base.BaseTraining(backbone, latents_of(runs, data), data.rows, batch=64, seed=1)
    config = TrainingConfig(steps=steps, learning_rate=8e-4, weight_decay=0.01, warmup=100, cooldown=0.25, average=0.998, seed=1, log_every=50)
    report = fit(training.step, backbone.components, training.batches, config, directory=runs / "base", minutes=minutes, name="base")
    return report.finished


def train_decoder(runs: Path, minutes: float | None, steps: int = 4000) -> bool:
    """Batches of 16."""
    data = pictures.training_pictures(runs / "data")
    matrix, offset = components(runs, data)
    torch.manual_seed(0)
    decoder = autoencoder.build().decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    held = torch.arange(0, len(data.pixels), 500)

    def batches(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(data.pixels), (16,), generator=torch.Generator().manual_seed(index))
        images = pictures.to_tensor(data.pixels[chosen.numpy()])
        return autoencoder.encode(matrix, offset, images), images

    def step(model, batch, generator):  # type: ignore[no-untyped-def]
        return autoencoder.reconstruction_step(model, *batch, generator)

    def validate(done, model):  # type: ignore[no-untyped-def]
        images = pictures.to_tensor(data.pixels[held.numpy()])
        rebuilt = model(autoencoder.encode(matrix, offset, images)).clamp(-1, 1)
        mse = (rebuilt - images).square().mean((1, 2, 3)) / 4
        return {"psnr": (-10 * mse.log10()).mean(), "psnr_of_mean": -10 * mse.mean().log10()}

    config = TrainingConfig(steps=steps, learning_rate=2e-3, warmup=100, cooldown=0.3, average=0.998, seed=2, log_every=50, validate_every=500)
    report = fit(step, decoder, batches, config, directory=runs / "decoder", validate=validate, minutes=minutes, name="decoder")
    return report.finished


STAGES = {"decoder": train_decoder, "base": train_base}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *STAGES])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args(argv)
    extra = {"steps": args.steps} if args.steps else {}
    done = STAGES[args.stage](args.runs, args.minutes, **extra)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
