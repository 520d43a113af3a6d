"""What the families do alike: plain functions, most of which a family's class takes as its methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Backbone, Conditioning


def freeze(pipe: Any, names: Sequence[str], needed: Sequence[str]) -> nn.ModuleDict:
    """Freezes all models of a pipeline, in eval mode; returns those of `names` that it has.

    Raises InputError where one of `needed` is absent.
    """
    lacking = [name for name in needed if getattr(pipe, name, None) is None]
    if lacking:
        raise InputError(f"this base has no {lacking[0]}, without which a {type(pipe).__name__} can't be used here.")
    pipe.set_progress_bar_config(disable=True)
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model.requires_grad_(False).eval()
    # an autoencoder that overflows in fp16 says so
    if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    return nn.ModuleDict({name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None})


def enable_checkpointing(self: Backbone) -> None:
    self.denoiser.enable_gradient_checkpointing()


def latent_shape(self: Backbone, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
    factor = self.pipe.vae_scale_factor
    return int(self.pipe.vae.config.latent_channels), (height or self.size) // factor, (width or self.size) // factor


def encode_images(self: Backbone, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    vae = self.pipe.vae
    with torch.no_grad():
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    scaled: Tensor = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return scaled.to(self.denoiser.dtype)


def decode_images(self: Backbone, latents: Tensor) -> Tensor:
    vae = self.pipe.vae
    with torch.no_grad():
        pixels: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
    return pixels.float().clamp(-1, 1)


def denoise(self: Backbone, noisy: Tensor, *arguments: Any, **conditioning: Any) -> Tensor:
    """Runs the denoiser in its own precision (but for the time step, which bf16 would round); its output has that of `noisy`."""
    dtype = self.denoiser.dtype
    given = {key: value.to(dtype) if isinstance(value, Tensor) and key != "timestep" else value for key, value in conditioning.items()}
    output: Tensor = self.denoiser(noisy.to(dtype), *arguments, **given, return_dict=False)[0]
    return output.to(noisy.dtype)


def encode_prompts(self: Backbone, prompts: list[str]) -> Conditioning:
    return self.encode_tokens(self.tokenize(prompts))


def token_ids(tokenizer: Any, prompts: list[str], length: int | None = None) -> Tensor:
    """Prompts padded or cut to the tokenizer's length, (B, length)."""
    ids: Tensor = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=length or tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    return ids


def clip_embeddings(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's penultimate hidden states (B, length, width), which SDXL and SD 3 read, and its first output (the projected one)."""
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output[0]
