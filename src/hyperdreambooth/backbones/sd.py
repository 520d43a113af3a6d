"""Stable Diffusion 1.x and 2.x, and every other `StableDiffusionPipeline` (the embedded toon base is one)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from .base import Conditioning


class StableDiffusion:
    """A `StableDiffusionPipeline` with epsilon or v prediction. Its models are frozen and in eval mode."""

    family = "sd"
    text_components: tuple[str, ...] = ("text_encoder",)
    default_targets: tuple[str, ...] = ("unet.*attn?.to_[qkv]", "unet.*attn?.to_out.0", "unet.*ff.net.0.proj", "unet.*ff.net.2")

    def __init__(self, pipe: StableDiffusionPipeline):
        self.pipe: Any = pipe
        pipe.set_progress_bar_config(disable=True)
        self.components = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
        self.components.requires_grad_(False).eval()
        pipe.vae.requires_grad_(False).eval()
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.size = int(pipe.unet.config.sample_size * pipe.vae_scale_factor)
        alphas = self.schedule.alphas_cumprod.double()
        self.levels = (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())

    @property
    def device(self) -> torch.device:
        return next(self.pipe.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.pipe.unet.parameters()).dtype

    def enable_checkpointing(self) -> None:
        self.pipe.unet.enable_gradient_checkpointing()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        factor = self.pipe.vae_scale_factor
        return int(self.pipe.unet.config.in_channels), (height or self.size) // factor, (width or self.size) // factor

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            latents = self.pipe.vae.encode(pixels.to(self.device, self.pipe.vae.dtype)).latent_dist.mode()
        scaled: Tensor = (latents - (self.pipe.vae.config.shift_factor or 0.0)) * self.pipe.vae.config.scaling_factor
        return scaled.to(self.dtype)

    def decode_images(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        with torch.no_grad():
            pixels: Tensor = self.pipe.vae.decode(
                latents.to(self.pipe.vae.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
            ).sample
        return pixels.float().clamp(-1, 1)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        tokens = self.pipe.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.pipe.tokenizer.model_max_length, return_tensors="pt"
        )
        return {"encoder_hidden_states": self.components["text_encoder"](tokens.input_ids.to(self.device))[0]}

    def steps_for(self, levels: Tensor) -> Tensor:
        steps = torch.searchsorted(self.levels, levels.detach().cpu().double().clamp(0, 1))
        return steps.clamp(max=len(self.levels) - 1).to(self.device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, noise, timesteps)
        return noise

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.components["unet"](noisy, timesteps, **conditioning).sample
        return output
