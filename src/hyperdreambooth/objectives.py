"""Losses: one value PER SAMPLE, shape (B,). Weights multiply outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbones import Backbone, Conditioning
from .lora import LoraSet, update_norms


@dataclass
class NoiseLevels:
    """How noise levels u = sigma / (alpha + sigma) are drawn: sigmoid of a normal variate, or uniformly in part.

    With little noise the noisy picture itself shows who it is, and the denoiser has no need of the tokens; only high
    noise asks for them. Hence the mean well above zero wherever an identity is learnt.
    """

    mean: float = 1.5
    """Mean of logit(u)."""
    std: float = 1.0
    """Standard deviation of logit(u)."""
    uniform: float = 0.0
    """Fraction of the samples whose level is uniform in 0..1 instead."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels, shape (count,), on the CPU."""
        levels = torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator))
        flat = torch.rand(count, generator=generator)
        return torch.where(torch.rand(count, generator=generator) < self.uniform, flat, levels)


def gaussian(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Independent noise, drawn on the CPU, so that every device sees the same."""
    return torch.randn(shape, generator=generator)


def denoising(
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    levels: Tensor,
    generator: torch.Generator,
    mask: Tensor | None = None,
    draw: Callable[[torch.Size, torch.Generator], Tensor] = gaussian,
) -> Tensor:
    """The denoising loss of Ruiz et al., equation 1, as a mean over each sample's elements: (B,).

    Args:
        latents: (B, C, h, w).
        levels: noise levels (B,) in 0..1, see NoiseLevels.
        mask: weights (B, 1, h, w) in 0..1, where only a part of the picture (a face) should count.
        draw: how noise is drawn, where samples are to share it.
    """
    noise = draw(latents.shape, generator).to(latents)
    timesteps = backbone.steps_for(levels)
    predicted = backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, conditioning)
    errors = (predicted.float() - backbone.target(latents, noise, timesteps).float()).square()
    if mask is None:
        return errors.flatten(1).mean(1)
    return (errors * mask).flatten(1).sum(1) / (mask.expand_as(errors).flatten(1).sum(1) + 1e-6)


def weight_loss(predicted: LoraSet, target: LoraSet) -> Tensor:
    """Squared Frobenius distance of two batches of updates, a mean over layers: (B,).

    Paper, equation 4, on what tokens mean rather than on the tokens: (s * down, up / s) is the same update, so raw
    tokens can't be compared. The difference of two updates is a LoRA too, so no (out, in) matrix is formed.
    """
    return update_norms(predicted + target.scaled(-1.0)) / len(predicted)
