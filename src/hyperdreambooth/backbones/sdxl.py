"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size as a condition."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from . import common, schedules
from .base import Conditioning
from .targets import PRESETS


class StableDiffusionXL:
    """A `StableDiffusionXLPipeline` (Podell et al., arXiv 2307.01952). Its models are frozen and in eval mode."""

    family = "sdxl"
    text_components: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    default_targets = PRESETS["sdxl"]["attention+ff"]

    def __init__(self, pipe: StableDiffusionXLPipeline):
        self.pipe: Any = pipe
        self.generation: dict[str, Any] = {}
        self.components = common.freeze(pipe, ("unet", *self.text_components), needed=(*self.text_components, "tokenizer", "tokenizer_2"))
        self.denoiser: Any = self.components["unet"]
        self.schedule, self.levels = schedules.discrete(pipe)
        self.unit = int(pipe.vae_scale_factor)
        self.size = int(pipe.unet.config.sample_size * self.unit)
        # made once a size: a recorded CUDA graph can't take anything from the host
        self.sizes = functools.cache(
            lambda height, width, device, dtype: torch.tensor([height, width, 0, 0, height, width], device=device, dtype=dtype)
        )

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
        pairs = ((self.pipe.tokenizer, self.pipe.text_encoder), (self.pipe.tokenizer_2, self.pipe.text_encoder_2))
        first, second = (common.clip_ids(tokenizer, encoder, prompts, chunks).to(self.device) for tokenizer, encoder in pairs)
        # zeros are what the base was trained with in place of no prompt
        kept = [float(prompt != "" or not self.pipe.config.force_zeros_for_empty_prompt) for prompt in prompts]
        return {"ids": first, "ids_2": second, "kept": torch.tensor(kept, device=self.device)}

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """Penultimate hidden states of both encoders side by side, and the second one's pooled text."""
        first, _ = common.clip_embeddings(self.pipe.text_encoder, tokens["ids"])
        second, pooled = common.clip_embeddings(self.pipe.text_encoder_2, tokens["ids_2"])
        hidden = torch.cat([first, second], -1)
        kept = tokens["kept"].to(hidden)
        return {"encoder_hidden_states": hidden * kept[:, None, None], "text_embeds": pooled * kept[:, None]}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # (original size, crop, target size), all of this very picture: the condition of one that was neither enlarged nor cropped
        height, width = (side * self.unit for side in noisy.shape[-2:])
        sizes = self.sizes(height, width, noisy.device, self.denoiser.dtype).expand(len(noisy), -1)
        added = {"text_embeds": conditioning["text_embeds"].to(self.denoiser.dtype), "time_ids": sizes}
        hidden = conditioning["encoder_hidden_states"]
        return common.denoise(self, noisy, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added)
