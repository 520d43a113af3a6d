"""Losses with one value per sample, shape (B,). Their weights are the caller's."""

import torch
from torch import Tensor

from .backbones import Backbone, Conditioning
from .lora import LoraSet, update_norms


def denoising(backbone: Backbone, latents: Tensor, conditioning: Conditioning, levels: Tensor, generator: torch.Generator) -> Tensor:
    """`denoising_loss` at noise levels (B,) in 0..1, with noise that is drawn on the CPU, so that it is the same for any device: (B,)."""
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    return denoising_loss(backbone, latents, conditioning, noise, backbone.steps_for(levels))


def denoising_loss(
    backbone: Backbone, latents: Tensor, conditioning: Conditioning, noise: Tensor, timesteps: Tensor, target: Tensor | None = None
) -> Tensor:
    """The denoising loss of Ruiz et al., equation 1, as a mean over each sample's elements: (B,). No random numbers, no work for the host.

    Args:
        latents, noise: (B, C, h, w).
        timesteps: (B,) as the denoiser takes them, from `Backbone.steps_for`.
        target: what the denoiser should predict, of the latents' shape. Default: what the base was trained for (noise, velocity or flow).
    """
    predicted = backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, conditioning)
    target = backbone.target(latents, noise, timesteps) if target is None else target
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def weight_loss(predicted: LoraSet, target: LoraSet) -> Tensor:
    """Squared Frobenius distance between two batches of updates, a mean over layers: (B,).

    It compares updates where the paper's equation 4 compares tokens: (s * down, up / s) is the same update for any s, so the distance
    between tokens means little. The difference of two updates is a LoRA too, so no (out, in) matrix is formed.
    """
    return update_norms(predicted + target.scaled(-1.0)) / len(predicted)
