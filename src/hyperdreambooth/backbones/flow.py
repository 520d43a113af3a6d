"""Bases that are trained by flow matching: Stable Diffusion 3 and 3.5, and Flux.1.

Noisy latents are (1 - u) * latents + u * noise; the denoiser, a transformer, predicts noise - latents (Lipman et al., arXiv 2210.02747;
Esser et al., arXiv 2403.03206). Time steps are 1000 u, as in diffusers. T5 isn't among `components`: no tool loads a LoRA into it.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .base import CLIP_LENGTH, Backbone, Conditioning, clip_embeddings, t5_ids

FLOW_STEPS = 1000
T5_LENGTH = 256


class Flow(Backbone):
    """A base that is trained by flow matching."""

    denoiser_name = "transformer"

    def steps_for(self, levels: Tensor) -> Tensor:
        return FLOW_STEPS * levels.detach().float().clamp(0, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        level = (timesteps / FLOW_STEPS).to(latents).reshape(-1, *[1] * (latents.ndim - 1))
        return (1 - level) * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def set_timesteps(self, schedule: Any, steps: int, noise: Tensor, **more: Any) -> None:
        """Larger pictures get more steps at high noise: the shift `mu` is linear in the number of 2 x 2 patches (Esser et al., 5.3.2)."""
        if schedule.config.get("use_dynamic_shifting"):
            usual = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
            more["mu"] = calculate_shift(math.prod(noise.shape[-2:]) // 4, *(schedule.config.get(name, usual[name]) for name in usual))
        super().set_timesteps(schedule, steps, noise, **more)


class StableDiffusion3(Flow):
    """A `StableDiffusion3Pipeline` (Esser et al., arXiv 2403.03206), with up to three text encoders, any of which may be absent."""

    family = "sd3"
    text_components = ("text_encoder", "text_encoder_2")
    needed = ()

    def __init__(self, pipe: StableDiffusion3Pipeline):
        super().__init__(pipe)
        self.generation = {"steps": 28, "guidance": 7.0}
        if len(self.components) == 1 and pipe.text_encoder_3 is None:
            raise InputError("this base has no text encoder at all: at least one of the three is needed.")
        self.unit = int(pipe.vae_scale_factor * pipe.patch_size)

    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        third = self.pipe.tokenizer_3
        found = {"ids_3": t5_ids(third, prompts, T5_LENGTH).to(self.device)} if third else {}
        return super().tokenize(prompts, chunks) | found

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """CLIP's two encoders concatenated and padded to T5's width, then T5 (Esser et al., figure 2); zeros for absent encoders."""
        config, batch = self.denoiser.config, len(next(iter(tokens.values())))
        place = {"device": self.device, "dtype": self.denoiser.dtype}
        encoders = {"ids": self.pipe.text_encoder, "ids_2": self.pipe.text_encoder_2}
        found = {ids: clip_embeddings(encoder, tokens[ids]) for ids, encoder in encoders.items() if encoder is not None}
        # where both CLIP encoders are absent, each takes half of the width
        width = config.pooled_projection_dim - sum(pooled.shape[-1] for _, pooled in found.values())
        length = next((hidden.shape[1] for hidden, _ in found.values()), CLIP_LENGTH)
        absent = torch.zeros(batch, length, width // max(1, 2 - len(found)), **place)
        clips, pooled = zip(*(found.get(ids, (absent, absent[:, 0])) for ids in encoders), strict=True)
        hidden = torch.cat(clips, -1)
        if self.pipe.text_encoder_3 is None:
            t5 = torch.zeros(batch, T5_LENGTH, config.joint_attention_dim, **place)
        else:
            t5 = self.pipe.text_encoder_3(tokens["ids_3"])[0]
        hidden = torch.cat([F.pad(hidden, (0, config.joint_attention_dim - hidden.shape[-1])), t5.to(hidden)], 1)
        return {"encoder_hidden_states": hidden, "pooled_projections": torch.cat(pooled, -1)}


class Flux(Flow):
    """A `FluxPipeline`, whose denoiser takes 2 x 2 patches of latents. `dev` takes its guidance scale as a condition, `schnell` takes none.

    In training the guidance scale of `dev` is 1, which means a prediction without guidance; `sample` sets its own.
    """

    family = "flux"
    text_components = ("text_encoder",)
    needed = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def __init__(self, pipe: FluxPipeline):
        super().__init__(pipe)
        self.unit = 2 * int(pipe.vae_scale_factor)
        # the patches' coordinates, cached by size, since a copy from the host can't be recorded in a CUDA graph
        self.image_ids = functools.cache(functools.partial(pipe._prepare_latent_image_ids, 1))
        self.distilled = bool(pipe.transformer.config.guidance_embeds)
        self.t5_length = 512 if self.distilled else 256  # tokens, as dev and schnell were published
        # 1.0 is no classifier-free guidance: dev has guidance distilled into its weights, schnell has none
        self.generation = {"steps": 28 if self.distilled else 4, "guidance": 1.0}

    def set_timesteps(self, schedule: Any, steps: int, noise: Tensor, **more: Any) -> None:
        # Flux's pipeline gives sigmas that end at 1 / steps; a scheduler with `use_flow_sigmas` computes them itself
        if not schedule.config.get("use_flow_sigmas"):
            more["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        super().set_timesteps(schedule, steps, noise, **more)

    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        # of CLIP only the pooled text is used, so its first chunk is enough; the whole prompt goes to T5
        first = super().tokenize(prompts)["ids"][:, 0]
        return {"ids": first, "ids_2": t5_ids(self.pipe.tokenizer_2, prompts, self.t5_length).to(self.device)}

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """T5's hidden states, CLIP's pooled text, and for `dev` a guidance scale of 1."""
        pooled = self.components["text_encoder"](tokens["ids"]).pooler_output
        conditioning = {"encoder_hidden_states": self.pipe.text_encoder_2(tokens["ids_2"])[0], "pooled_projections": pooled}
        return {**conditioning, "guidance": torch.ones(len(pooled), device=self.device)} if self.distilled else conditioning

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        image_ids = self.image_ids(height // 2, width // 2, noisy.device, noisy.dtype)
        text_ids = torch.zeros(conditioning["encoder_hidden_states"].shape[1], 3, device=noisy.device, dtype=noisy.dtype)
        patches = F.pixel_unshuffle(noisy, 2).flatten(2).mT  # (B, h/2 * w/2, 4 C): every 2 x 2 patch is a token
        patches = self.denoise(patches, timestep=timesteps / FLOW_STEPS, img_ids=image_ids, txt_ids=text_ids, **conditioning)
        return F.pixel_shuffle(patches.mT.unflatten(2, (height // 2, width // 2)), 2)
