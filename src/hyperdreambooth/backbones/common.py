"""What the families do alike: plain functions, most of which a family's class takes as its methods."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..progress import say
from .base import Backbone, Conditioning

CLIP_LENGTH = 77


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


def encode_prompts(self: Backbone, prompts: list[str], chunks: int = 1) -> Conditioning:
    return self.encode_tokens(self.tokenize(prompts, chunks))


def clip_ids(tokenizer: Any, encoder: Any, prompts: list[str], chunks: int = 1) -> Tensor:
    """Prompts as CLIP reads them, (B, chunks, 77): a long one in chunks of 75 tokens between start and end, as A1111 and ComfyUI do.

    All get as many chunks as the longest takes, but at least `chunks`; 77 is whatever tokenizer and encoder have.
    """
    size = min(tokenizer.model_max_length, encoder.config.max_position_embeddings if encoder is not None else CLIP_LENGTH) - 2
    # the tokenizer would warn that its encoder can't read that many at once
    words = [tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids for prompt in prompts]
    chunks = max(chunks, *(math.ceil(len(ids) / size) for ids in words))
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    parts = [[ids[size * i : size * (i + 1)] for i in range(chunks)] for ids in words]
    return torch.tensor([[[start, *part, end, *[pad] * (size - len(part))] for part in row] for row in parts])


def chunks_of(backbone: Backbone, prompts: list[str]) -> int:
    """How many chunks the longest of the prompts takes in the CLIP text encoders."""
    return max((ids.shape[1] for ids in backbone.tokenize(prompts).values() if ids.ndim == 3), default=1)


def t5_ids(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """Prompts padded or cut to `length` tokens, (B, length). What is cut off is said, once."""
    for prompt in prompts:
        ids = tokenizer(prompt, verbose=False).input_ids
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 :], skip_special_tokens=True)
            say_once(f"the prompt is too long for T5, which reads {length} tokens of {len(ids)}. Lost there: {lost}")
    found: Tensor = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    return found


@functools.cache
def say_once(text: str) -> None:
    say(text)


def joined(hidden: Tensor, ids: Tensor) -> Tensor:
    """Hidden states of all chunks (B * chunks, 77, width), one after another in the sequence: (B, chunks * 77, width)."""
    return hidden.unflatten(0, ids.shape[:2]).flatten(1, 2)


def clip_embeddings(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's penultimate hidden states (B, chunks * 77, width), which SDXL and SD 3 read, and the first chunk's pooled text, projected."""
    output = encoder(ids.flatten(0, 1), output_hidden_states=True)
    return joined(output.hidden_states[-2], ids), output[0].unflatten(0, ids.shape[:2])[:, 0]
