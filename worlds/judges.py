"""A world's recognizers and its context classifier: contrastive and plain classification.

The measuring recognizer (ConvNeXt V2) and the encoder that hypernetworks read faces with (ResNet) are trained by the
same step and share nothing else: architecture, seed and augmentation stream differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.evaluation.judges import Judge

from .pixels import Pictures, to_tensor


def build_judge(hidden: tuple[int, ...], heads: dict[str, list[str]]) -> Judge:
    """A small ConvNeXt V2 with two blocks at each of its resolutions, a quarter of the picture's first."""
    backbone = {"num_channels": 3, "patch_size": 4, "num_stages": len(hidden), "hidden_sizes": list(hidden)}
    return Judge({**backbone, "depths": [2] * len(hidden), "drop_path_rate": 0.0}, heads)


def go_on(model: Judge, folder: Path) -> Judge:
    """The model, with the last weights where there are any."""
    if (folder / "config.json").is_file():
        model.load_state_dict(Judge.from_pretrained(folder).state_dict())
    return model


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
    side = images.shape[-1]
    images = torch.stack([shifted[i, :, y : y + side, x : x + side] for i, (y, x) in enumerate(offsets)])
    roll = torch.rand(count, generator=generator)
    images = torch.where((roll < 0.5)[:, None, None, None], linear(images), images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.where(((roll > 0.35) & (roll < 0.65))[:, None, None, None], blurred, images)
    strength = 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


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
    device = next(model.parameters()).device
    logits = model(images.to(device))
    losses = torch.stack([F.cross_entropy(logits[kind].float(), labels[kind].to(device), reduction="none") for kind in logits])
    return losses.sum(0)


def pairs(data: Pictures, each: int, people: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of two different pictures of `people` people, all of them at most; `each` pictures of a person stand together in the data."""
    total = len(data) // each

    def batch(index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        chosen = torch.randperm(total, generator=generator)[:people]
        a = torch.randint(each, (len(chosen),), generator=generator)
        b = (a + 1 + torch.randint(each - 1, (len(chosen),), generator=generator)) % each
        return tuple(to_tensor(data[(chosen * each + i).numpy()]) for i in (a, b))  # type: ignore[return-value]

    return batch


def labelled(data: Pictures, labels: dict[str, Tensor], size: int, seed: int) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
    """Batches of pictures with their contexts as indices."""

    def batch(index: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(len(data), (size,), generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
        return to_tensor(data[chosen.numpy()]), {kind: values[chosen] for kind, values in labels.items()}

    return batch


def told_apart(model: nn.Module, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Rank-1 of second pictures (N, 3, H, W) among first ones of the same N people."""
    model.eval()
    device = next(model.parameters()).device
    a, b = (
        torch.cat([F.normalize(model(part.to(device))["identity"], dim=-1).cpu() for part in images.split(100)])
        for images in (first, second)
    )
    model.train()
    return {"rank1": ((a @ b.mT).argmax(1) == torch.arange(len(a))).float().mean()}


def all_right(found: list[dict[str, str]], wanted: list[dict[str, str]]) -> dict[str, float]:
    """How often each kind of context is classified rightly, and all of them."""
    both = list(zip(found, wanted, strict=True))
    return {
        "all_right": sum(a == b for a, b in both) / len(both),
        **{kind: sum(a[kind] == b[kind] for a, b in both) / len(both) for kind in wanted[0]},
    }
