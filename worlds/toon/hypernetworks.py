"""The toon world's hypernetworks, pro and faithful, on the library's own stages.

Their pictures are the training people again, in contexts that are "seen" alone: the base knows all contexts, and what a
hypernetwork makes of the held-out half is measured. Each person has two plain photos to be predicted from, and two
pictures in any seen context.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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

from . import autoencoder, pictures

TARGETS = tuple(f"unet.*.{layer}" for layer in ("attn1.to_?", "attn?.to_q", "attn?.to_out.0", "ff.net.0.proj", "ff.net.2"))
"""Not attn2's to_k and to_v, which read the prompt: with them the LoRA pulls contexts that it never saw towards those it did."""
TOKENS = LightweightConfig(rank=4, down_dim=64, up_dim=32)
FAITHFUL_TOKENS = LightweightConfig(rank=1, down_dim=64, up_dim=32)
DECODER = HyperNetworkConfig(dim=128, blocks=3, heads=4, passes=2)
FAITHFUL_DECODER = HyperNetworkConfig(dim=128, blocks=2, heads=4, passes=2)


def photo_context(draw: random.Random) -> dict[str, str]:
    """What a photo shows: a plain drawing, no hat, seldom glasses."""
    seen = {kind: [name for name, choice in choices.items() if choice["seen"]] for kind, choices in pictures.CONTEXTS.items()}
    return {
        "style": "plain",
        "background": draw.choice(seen["background"]),
        "headwear": "none",
        "eyewear": "glasses" if draw.random() < 0.15 else "none",
        "expression": draw.choice(seen["expression"]),
    }


def seen_context(draw: random.Random) -> dict[str, str]:
    """Any context that hypernetworks may train on."""
    context = photo_context(draw)
    seen = {kind: [name for name, choice in choices.items() if choice["seen"]] for kind, choices in pictures.CONTEXTS.items()}
    if draw.random() < 0.5:
        context["style"] = draw.choice(seen["style"])
    if not pictures.CONTEXTS["style"][context["style"]]["colors"]:
        context["background"] = "white"
    context["headwear"] = draw.choice(seen["headwear"])
    context["eyewear"] = draw.choice(seen["eyewear"])
    return context


def plan(first: int, people: int) -> list[dict[str, Any]]:
    """Two photos and two pictures in seen contexts of each person."""
    jobs = []
    for person in range(first, first + people):
        draw = random.Random(person * 31 + 7)
        jobs += [{"person": person, "context": make(draw)} for make in (photo_context, photo_context, seen_context, seen_context)]
    return jobs


def load_pictures(out: Path, first: int, people: int) -> pictures.Pictures:
    """The plan's pictures, rendered on first use."""
    if out.with_suffix(".jsonl").is_file():
        return pictures.Pictures.load(out)
    return pictures.render_plan(out, plan(first, people))


@torch.no_grad()
def identity_data(data: pictures.Pictures, encoder: FaceEncoder, matrix: Tensor, offset: Tensor) -> IdentityData:
    """Latents, features (pictures, for an encoder that is trained) and captions; the first two pictures of each person may be
    predicted from."""
    latents, features = [], []
    encoder.eval()
    with Progress("encoding pictures", len(data.rows)) as progress:
        for start in range(0, len(data.rows), 500):
            shown = data.pixels[start : start + 500]
            images = pictures.to_tensor(shown)
            latents.append(autoencoder.encode(matrix, offset, images).half())
            features.append(torch.from_numpy(shown).permute(0, 3, 1, 2) if encoder.trained else encoder(images).half())
            progress.update(start + len(shown))
    names = list(dict.fromkeys(str(row["person"]) for row in data.rows))
    people = torch.arange(len(names)).repeat_interleave(4)
    reference = torch.tensor([True, True, False, False]).repeat(len(names))
    prompts = [pictures.caption(row["context"]) for row in data.rows]
    return IdentityData(torch.cat(latents), torch.cat(features), people, names, prompts, reference)


def pro_config(steps: int) -> TrainHypernetworkConfig:
    """Learnable aux, the denoising loss alone; the encoder is trained too."""
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
        batch=768,
        penalty=3e-4,
        shared=3e-3,
        train_encoder=True,
        training=training,
    )


def faithful_config(steps: int) -> TrainHypernetworkConfig:
    """Frozen aux, denoising and weight loss."""
    training = TrainingConfig(
        steps=steps, learning_rate=1e-3, warmup=50, cooldown=0.35, average=0.995, seed=12, log_every=25, validate_every=250
    )
    return TrainHypernetworkConfig(
        mode="faithful",
        targets=TARGETS,
        lightweight=FAITHFUL_TOKENS,
        hypernetwork=FAITHFUL_DECODER,
        levels=NoiseLevels(mean=1.5),
        batch=64,
        weight_loss=1e-3,
        training=training,
    )


def table_config(steps: int) -> PreoptimizeConfig:
    """Tokens of one person after another, 32 side by side."""
    training = TrainingConfig(steps=steps, learning_rate=2e-2, cooldown=0.3, max_grad_norm=0.0, seed=13)
    return PreoptimizeConfig(
        targets=TARGETS, lightweight=FAITHFUL_TOKENS, levels=NoiseLevels(mean=1.5), chunk=32, copies=2, training=training
    )


def photos_of(data: IdentityData) -> IdentityData:
    """Only the pictures that may stand for their person."""
    kept = data.reference.nonzero().flatten()
    prompts = [data.prompts[index] for index in kept.tolist()]
    return IdentityData(data.latents[kept], data.features[kept], data.people[kept], data.names, prompts, data.reference[kept])
