"""Losses: one value PER SAMPLE, shape (B,). Weights multiply outside."""

import torch
from torch import Tensor

from .backbones import Backbone, Conditioning
from .lora import LoraSet, update_norms


def denoising(backbone: Backbone, latents: Tensor, conditioning: Conditioning, levels: Tensor, generator: torch.Generator) -> Tensor:
    """`denoising_loss` with noise that is drawn here (on the CPU: every device sees the same), at noise levels (B,) in 0..1: (B,)."""
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    return denoising_loss(backbone, latents, conditioning, noise, backbone.steps_for(levels))


def denoising_loss(
    backbone: Backbone, latents: Tensor, conditioning: Conditioning, noise: Tensor, timesteps: Tensor, target: Tensor | None = None
) -> Tensor:
    """The denoising loss of Ruiz et al., equation 1, as a mean over each sample's elements: (B,). Nothing random, nothing on the host.

    Args:
        latents, noise: (B, C, h, w).
        timesteps: (B,) as the denoiser takes them, from `Backbone.steps_for`.
        target: what is to be predicted in the noise's or the velocity's place, like `latents`.
    """
    predicted = backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, conditioning)
    target = backbone.target(latents, noise, timesteps) if target is None else target
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def weight_loss(predicted: LoraSet, target: LoraSet) -> Tensor:
    """Squared Frobenius distance of two batches of updates, a mean over layers: (B,).

    Paper, equation 4, on what tokens mean rather than on the tokens: (s * down, up / s) is the same update, so raw
    tokens can't be compared. The difference of two updates is a LoRA too, so no (out, in) matrix is formed.
    """
    return update_norms(predicted + target.scaled(-1.0)) / len(predicted)
