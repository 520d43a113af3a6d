"""Recognizers and the context classifier: contrastive and plain classification.

The measuring recognizer (ConvNeXt V2) and the encoder that hypernetworks read faces with (ResNet) are trained by the
same step and share nothing else: architecture, seed and augmentation stream differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.evaluation.judges import Judge

from . import autoencoder, pictures

JUDGE = {"num_channels": 3, "patch_size": 4, "num_stages": 3, "hidden_sizes": [48, 96, 192], "depths": [2, 2, 2], "drop_path_rate": 0.0}


def build_recogniser() -> Judge:
    return Judge(JUDGE, {"identity": [""] * 128})


def build_classifier() -> Judge:
    return Judge(JUDGE, {kind: list(choices) for kind, choices in pictures.CONTEXTS.items()})


def go_on(model: Judge, folder: Path) -> Judge:
    """The model, with the last weights where there are any."""
    if (folder / "config.json").is_file():
        model.load_state_dict(Judge.from_pretrained(folder).state_dict())
    return model


def build_encoder() -> FaceEncoder:
    """Pictures of 64 x 64 -> 16 features of 256 numbers."""
    config = ResNetConfig(embedding_size=48, hidden_sizes=[64, 128, 256], depths=[1, 2, 2], layer_type="basic")
    return FaceEncoder(ResNetModel(config), size=pictures.SIZE, trained=True)


class Embedder(nn.Module):
    """An encoder with a projection for contrastive training; the projection is thrown away."""

    def __init__(self, encoder: FaceEncoder):
        super().__init__()
        self.encoder, self.projection = encoder, nn.Linear(encoder.dim, 128)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"identity": self.projection(self.encoder(pixels).mean(1))}


def augmented(images: Tensor, generator: torch.Generator, linear: Callable[[Tensor], Tensor]) -> Tensor:
    """Shifts of up to 2 pixels, some noise and blur, and for half of the pictures the loss that latents cause."""
    count = len(images)
    shifted = F.pad(images, (2, 2, 2, 2), mode="replicate")
    offsets = torch.randint(0, 5, (count, 2), generator=generator).tolist()
    images = torch.stack([shifted[i, :, y : y + 64, x : x + 64] for i, (y, x) in enumerate(offsets)])
    roll = torch.rand(count, generator=generator)
    images = torch.where((roll < 0.5)[:, None, None, None], linear(images), images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.where(((roll > 0.35) & (roll < 0.65))[:, None, None, None], blurred, images)
    strength = 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def linear_round_trip(matrix: Tensor, offset: Tensor) -> Callable[[Tensor], Tensor]:
    """Pictures -> latents -> pictures by the pseudo-inverse: what survives the latents, without a decoder."""
    inverse = torch.linalg.pinv(matrix)

    def apply(images: Tensor) -> Tensor:
        latents = autoencoder.encode(matrix, offset, images) + offset[:, None, None]
        patches = torch.einsum("pc,nchw->nphw", inverse, latents)
        return F.fold(patches.flatten(2), images.shape[-2:], autoencoder.PATCH, stride=autoencoder.PATCH)

    return apply


def contrastive_losses(model: nn.Module, pictures: Tensor) -> Tensor:
    """NT-Xent: two pictures of each person, first all the first ones; everyone else is a stranger. Temperature 0.07."""
    device = next(model.parameters()).device
    embedded = F.normalize(model(pictures.to(device))["identity"].float(), dim=-1)
    with torch.autocast(device.type, enabled=False):  # bf16 would round a similarity of 0.9 by up to 0.002, 3 % of the temperature
        logits = embedded @ embedded.mT / 0.07
    logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=device), -1e4)
    return F.cross_entropy(logits, torch.arange(len(logits), device=device).roll(len(pictures) // 2), reduction="none")


def classification_losses(model: nn.Module, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
    """Cross entropy of pictures and labels, summed over the kinds of context."""
    images, labels = batch
    logits = model(images)
    losses = torch.stack([F.cross_entropy(logits[kind].float(), labels[kind], reduction="none") for kind in logits])
    return losses.sum(0)


def pairs(data: pictures.Pictures, people: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of two different pictures of `people` people, all of them at most. Pictures of a person stand together in the data."""
    each = pictures.CONTEXTS_EACH
    total = len(data.rows) // each

    def batch(index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        chosen = torch.randperm(total, generator=generator)[:people]
        a = torch.randint(each, (len(chosen),), generator=generator)
        b = (a + 1 + torch.randint(each - 1, (len(chosen),), generator=generator)) % each
        return tuple(pictures.to_tensor(data.pixels[(chosen * each + i).numpy()]) for i in (a, b))  # type: ignore[return-value]

    return batch


def labelled(data: pictures.Pictures, size: int, seed: int) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
    """Batches of pictures with their contexts as indices."""
    indices = {
        kind: torch.tensor([list(choices).index(row["context"][kind]) for row in data.rows]) for kind, choices in pictures.CONTEXTS.items()
    }

    def batch(index: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(len(data.rows), (size,), generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
        return pictures.to_tensor(data.pixels[chosen.numpy()]), {kind: values[chosen] for kind, values in indices.items()}

    return batch
