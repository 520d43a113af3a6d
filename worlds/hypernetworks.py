"""A world's hypernetworks, pro and faithful, trained by the library's own stages: their data and their settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hyperdreambooth.data import IdentityData
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.progress import Progress
from hyperdreambooth.training_settings import (
    HyperNetworkConfig,
    LightweightConfig,
    NoiseLevels,
    PreoptimizeConfig,
    TrainHypernetworkConfig,
    TrainingConfig,
)

from .autoencoder import Components
from .pixels import Pictures, to_tensor

TARGETS = tuple(f"unet.*.{layer}" for layer in ("attn1.to_?", "attn?.to_q", "attn?.to_out.0", "ff.net.0.proj", "ff.net.2"))
"""Without attn2's to_k and to_v, which read the prompt: with them the LoRA pulls held-out contexts towards those of the training."""
READING = ("unet.*.attn2.to_k", "unet.*.attn2.to_v")  # The layers that read the prompt.
TOKENS = LightweightConfig(rank=4, down_dim=64, up_dim=32)
FAITHFUL_TOKENS = LightweightConfig(rank=1, down_dim=64, up_dim=32)
DECODER = HyperNetworkConfig(dim=128, blocks=3, heads=4, passes=2)
FAITHFUL_DECODER = HyperNetworkConfig(dim=128, blocks=2, heads=4, passes=2)


@dataclass
class Album:
    """Training data of hypernetworks: the same number of consecutive pictures for each person."""

    pictures: Pictures
    indices: np.ndarray
    """Which of the pictures are used, grouped by person in the order of `people`."""
    people: list[str]
    reference: tuple[bool, ...]
    """For each of a person's pictures, whether the hypernetwork may predict from it."""
    prompts: list[str]
    """One for each of `indices`."""


@torch.no_grad()
def identity_data(album: Album, encoder: FaceEncoder, components: Components) -> IdentityData:
    """The album's latents, features (uint8 pictures instead if the encoder is trained too) and captions."""
    latents, features = [], []
    encoder.eval()
    with Progress("encoding pictures", len(album.indices)) as progress:
        for start in range(0, len(album.indices), 500):
            shown = album.pictures[album.indices[start : start + 500]]
            images = to_tensor(shown)
            latents.append(components.encode(images).half())
            features.append(torch.from_numpy(shown).permute(0, 3, 1, 2) if encoder.trained else encoder(images).half())
            progress.update(start + len(shown))
    each = len(album.reference)
    people = torch.arange(len(album.people)).repeat_interleave(each)
    reference = torch.tensor(album.reference).repeat(len(album.people))
    return IdentityData(torch.cat(latents), torch.cat(features), people, album.people, album.prompts, reference)


def pro_config(steps: int, batch: int = 768) -> TrainHypernetworkConfig:
    """Pro mode: learnable aux matrices, the denoising loss without a weight loss; the encoder is trained too."""
    training = TrainingConfig(
        steps=steps,
        optimizer="muon",
        learning_rate=1.2e-3,
        warmup=30,
        cooldown=0.7,
        average=0.995,
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
        seed=71,
        log_every=50,
        validate_every=250,
    )
    return TrainHypernetworkConfig(
        mode="pro",
        targets=TARGETS,
        lightweight=TOKENS,
        hypernetwork=DECODER,
        levels=NoiseLevels(mean=2.0, std=1.5, uniform=0.1),
        batch=batch,
        penalty=3e-4,
        shared=3e-3,
        train_encoder=True,
        training=training,
    )


def distilled_config(steps: int, batch: int, written: tuple[str, ...]) -> TrainHypernetworkConfig:
    """Distills context guidance into pro: the teacher is pro itself with context guidance, and the encoder is frozen."""
    training = TrainingConfig(
        steps=steps, optimizer="muon", learning_rate=3e-4, warmup=20, cooldown=0.6, average=0.98, seed=72, log_every=10, validate_every=200
    )
    return replace(
        pro_config(steps, batch),
        context_guidance=6.0,
        context_until=0.25,
        written=written,
        levels=NoiseLevels(mean=1.0, std=1.5, uniform=0.1),
        train_encoder=False,
        training=training,
    )


def preserving_config(steps: int, batch: int) -> TrainHypernetworkConfig:
    """Continues pro with the layers that read the prompt as targets too, and teaches it to leave prompts without [V] unchanged."""
    training = TrainingConfig(
        steps=steps, optimizer="muon", learning_rate=6e-4, warmup=30, cooldown=0.6, average=0.99, seed=73, log_every=20, validate_every=250
    )
    targets = (*TARGETS, *READING)
    return replace(pro_config(steps, batch), targets=targets, prior=0.3, train_encoder=False, training=training)


def faithful_config(steps: int, batch: int = 64) -> TrainHypernetworkConfig:
    """Faithful mode: frozen aux matrices, denoising and weight loss."""
    training = TrainingConfig(
        steps=steps, learning_rate=1e-3, warmup=50, cooldown=0.35, average=0.995, seed=12, log_every=25, validate_every=250
    )
    return TrainHypernetworkConfig(
        mode="faithful",
        targets=TARGETS,
        lightweight=FAITHFUL_TOKENS,
        hypernetwork=FAITHFUL_DECODER,
        levels=NoiseLevels(mean=1.5),
        batch=batch,
        weight_loss=1e-3,
        training=training,
    )


def table_config(steps: int) -> PreoptimizeConfig:
    """Pre-optimization of each person's tokens, 32 people in parallel."""
    training = TrainingConfig(steps=steps, learning_rate=2e-2, cooldown=0.3, max_grad_norm=0.0, seed=13)
    return PreoptimizeConfig(
        targets=TARGETS, lightweight=FAITHFUL_TOKENS, levels=NoiseLevels(mean=1.5), chunk=32, copies=2, training=training
    )


def photos_of(data: IdentityData) -> IdentityData:
    """Only the reference pictures: those that may be predicted from."""
    kept = data.reference.nonzero().flatten()
    prompts = [data.prompts[index] for index in kept.tolist()]
    return IdentityData(data.latents[kept], data.features[kept], data.people[kept], data.names, prompts, data.reference[kept])
