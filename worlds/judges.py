"""Training of a world's recognizers (contrastive) and of its context classifier (cross entropy).

The recognizer that measures identity (ConvNeXt V2) and the hypernetworks' face encoder (ResNet) have the same loss and nothing else
in common: architecture, seed and stream of augmentations differ.
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
    """A small ConvNeXt V2 with two blocks at each resolution; the first resolution is a quarter of the picture's."""
    backbone = {"num_channels": 3, "patch_size": 4, "num_stages": len(hidden), "hidden_sizes": list(hidden)}
    return Judge({**backbone, "depths": [2] * len(hidden), "drop_path_rate": 0.0}, heads)


def with_stored_weights(model: Judge, folder: Path) -> Judge:
    """The model, with the weights of `folder` if it holds any."""
    if (folder / "config.json").is_file():
        model.load_state_dict(Judge.from_pretrained(folder).state_dict())
    return model


class Embedder(nn.Module):
    """An encoder with a projection for contrastive training; the projection is discarded afterwards."""

    def __init__(self, encoder: FaceEncoder):
        super().__init__()
        self.encoder, self.projection = encoder, nn.Linear(encoder.dim, 128)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"identity": self.projection(self.encoder(pixels).mean(1))}


def augmented(images: Tensor, generator: torch.Generator, linear: Callable[[Tensor], Tensor]) -> Tensor:
    """Augments pictures: shifts of up to 2 pixels, some noise and blur, and for half of them the linear round trip through the latents."""
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
    """NT-Xent loss with temperature 0.07 of two pictures per person: the first half of the batch has each person's first picture, the
    second half the second, in the same order. All other people's pictures are negatives.
    """
    device = next(model.parameters()).device
    embedded = F.normalize(model(pictures.to(device))["identity"].float(), dim=-1)
    with torch.autocast(device.type, enabled=False):  # bf16 would round a similarity of 0.9 by up to 0.002, 3 % of the temperature
        logits = embedded @ embedded.mT / 0.07
    logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=device), -1e4)
    return F.cross_entropy(logits, torch.arange(len(logits), device=device).roll(len(pictures) // 2), reduction="none")


def classification_losses(model: nn.Module, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
    """Cross entropy per picture, summed over the kinds of context; a batch is pictures and, for each kind, their labels."""
    images, labels = batch
    device = next(model.parameters()).device
    logits = model(images.to(device))
    losses = torch.stack([F.cross_entropy(logits[kind].float(), labels[kind].to(device), reduction="none") for kind in logits])
    return losses.sum(0)


def pairs(data: Pictures, each: int, people: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of two different pictures of each of `people` random people (or of all, if there are fewer); the data holds `each`
    consecutive pictures per person.
    """
    total = len(data) // each

    def batch(index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        chosen = torch.randperm(total, generator=generator)[:people]
        a = torch.randint(each, (len(chosen),), generator=generator)
        b = (a + 1 + torch.randint(each - 1, (len(chosen),), generator=generator)) % each
        return tuple(to_tensor(data[(chosen * each + i).numpy()]) for i in (a, b))  # type: ignore[return-value]

    return batch


def labelled(data: Pictures, labels: dict[str, Tensor], size: int, seed: int) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
    """Batches of `size` random pictures with their labels by kind of context."""

    def batch(index: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(len(data), (size,), generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
        return to_tensor(data[chosen.numpy()]), {kind: values[chosen] for kind, values in labels.items()}

    return batch


def rank_one(model: nn.Module, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Rank-1 identification: each second picture (N, 3, H, W) is looked up among the first ones of the same N people."""
    model.eval()
    device = next(model.parameters()).device
    a, b = (
        torch.cat([F.normalize(model(part.to(device))["identity"], dim=-1).cpu() for part in images.split(100)])
        for images in (first, second)
    )
    model.train()
    return {"rank1": ((a @ b.mT).argmax(1) == torch.arange(len(a))).float().mean()}


def all_right(found: list[dict[str, str]], wanted: list[dict[str, str]]) -> dict[str, float]:
    """Accuracy for each kind of context, and for all kinds at once ("all_right")."""
    both = list(zip(found, wanted, strict=True))
    return {
        "all_right": sum(a == b for a, b in both) / len(both),
        **{kind: sum(a[kind] == b[kind] for a, b in both) / len(both) for kind in wanted[0]},
    }
