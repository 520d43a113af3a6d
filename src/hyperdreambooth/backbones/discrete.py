"""Bases with a discrete schedule: Stable Diffusion 1.x and 2.x (the shipped toon base is one), and XL.

Noisy latents are alpha_t * latents + sigma_t * noise, t of the scheduler's 1000 steps; the denoiser, a UNet, predicts noise or velocity.
"""

import functools
from typing import Any, cast

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from ..errors import InputError
from .base import Backbone, Conditioning, by_chunk, clip_embeddings, joined


class Discrete(Backbone):
    """A base with a discrete schedule. Raises InputError for another schedule, or another prediction than of noise or velocity."""

    denoiser_name = "unet"

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        config = pipe.scheduler.config
        kind = config.get("prediction_type", "epsilon")
        if "beta_schedule" not in config or kind not in ("epsilon", "v_prediction"):
            lacks = "has no discrete schedule with epsilon or v prediction, so it can't be trained on here"
            raise InputError(f"this base's scheduler ({type(pipe.scheduler).__name__}, prediction {kind}) {lacks}.")
        self.schedule: Any = DDPMScheduler.from_config(config)
        alphas = self.schedule.alphas_cumprod.double()
        self.levels = (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())  # The noise level of each step.

    def steps_for(self, levels: Tensor) -> Tensor:
        steps = torch.searchsorted(self.levels, levels.detach().cpu().double().clamp(0, 1))
        return steps.clamp(max=len(self.levels) - 1).to(self.device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return cast(Tensor, self.schedule.add_noise(latents, noise, timesteps))

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        velocity = self.schedule.config.prediction_type == "v_prediction"
        return cast(Tensor, self.schedule.get_velocity(latents, noise, timesteps)) if velocity else noise


class StableDiffusion(Discrete):
    """A `StableDiffusionPipeline` with epsilon or v prediction."""

    family = "sd"
    text_components = ("text_encoder",)
    needed = ("text_encoder", "tokenizer")

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        ids = tokens["ids"]
        return {"encoder_hidden_states": joined(self.components["text_encoder"](by_chunk(ids))[0], ids)}


class StableDiffusionXL(Discrete):
    """A `StableDiffusionXLPipeline` (Podell et al., arXiv 2307.01952)."""

    family = "sdxl"
    text_components = ("text_encoder", "text_encoder_2")
    needed = (*text_components, "tokenizer", "tokenizer_2")

    def __init__(self, pipe: StableDiffusionXLPipeline):
        super().__init__(pipe)
        # cached by size, since a copy from the host can't be recorded in a CUDA graph
        self.sizes = functools.cache(lambda height, width, **place: torch.tensor([height, width, 0, 0, height, width], **place))

    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        # with this setting the base was trained on zeros as the embedding of an empty prompt
        kept = [float(prompt != "" or not self.pipe.config.force_zeros_for_empty_prompt) for prompt in prompts]
        return {**super().tokenize(prompts, chunks), "kept": torch.tensor(kept, device=self.device)}

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """Penultimate hidden states of both encoders side by side, and the second one's pooled text."""
        first, _ = clip_embeddings(self.pipe.text_encoder, tokens["ids"])
        second, pooled = clip_embeddings(self.pipe.text_encoder_2, tokens["ids_2"])
        hidden = torch.cat([first, second], -1)
        kept = tokens["kept"].to(hidden)
        return {"encoder_hidden_states": hidden * kept[:, None, None], "text_embeds": pooled * kept[:, None]}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # SDXL's size condition (original size, crop's corner, target size), of a picture that was neither resized nor cropped
        height, width = (side * self.unit for side in noisy.shape[-2:])
        sizes = self.sizes(height, width, device=noisy.device, dtype=self.denoiser.dtype).expand(len(noisy), -1)
        added = {"text_embeds": conditioning["text_embeds"].to(self.denoiser.dtype), "time_ids": sizes}
        hidden = conditioning["encoder_hidden_states"]
        return self.denoise(noisy, timestep=timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added)
