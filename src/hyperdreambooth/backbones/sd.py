"""Stable Diffusion 1.x and 2.x, and every other `StableDiffusionPipeline` (the embedded toon base is one)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from . import common, schedules
from .base import Conditioning
from .targets import PRESETS


class StableDiffusion:
    """A `StableDiffusionPipeline` with epsilon or v prediction. Its models are frozen and in eval mode."""

    family = "sd"
    text_components: tuple[str, ...] = ("text_encoder",)
    default_targets = PRESETS["sd"]["attention+ff"]

    def __init__(self, pipe: StableDiffusionPipeline):
        self.pipe: Any = pipe
        self.generation: dict[str, Any] = {}
        self.components = common.freeze(pipe, ("unet", "text_encoder"), needed=("text_encoder", "tokenizer"))
        self.denoiser: Any = self.components["unet"]
        self.schedule, self.levels = schedules.discrete(pipe)
        self.unit = int(pipe.vae_scale_factor)
        self.size = int(pipe.unet.config.sample_size * self.unit)

    enable_checkpointing = common.enable_checkpointing
    latent_shape = common.latent_shape
    encode_images = common.encode_images
    decode_images = common.decode_images
    steps_for = schedules.discrete_steps_for
    add_noise = schedules.discrete_add_noise
    target = schedules.discrete_target
    set_timesteps = schedules.discrete_set_timesteps

    @property
    def device(self) -> torch.device:
        found: torch.device = self.denoiser.device
        return found

    encode_prompts = common.encode_prompts

    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        return {"ids": common.clip_ids(self.pipe.tokenizer, self.pipe.text_encoder, prompts, chunks).to(self.device)}

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        ids = tokens["ids"]
        return {"encoder_hidden_states": common.joined(self.components["text_encoder"](ids.flatten(0, 1))[0], ids)}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return common.denoise(self, noisy, timesteps, **conditioning)
