"""Bases that are trained by flow matching: Stable Diffusion 3 and 3.5, and Flux.1.

(1 - u) * latents + u * noise; the denoiser, a transformer, predicts noise - latents (Lipman et al., arXiv 2210.02747; Esser et al., arXiv
2403.03206). Time steps are 1000 u, as diffusers' flow schedulers count. T5 isn't among the components: no tool loads a LoRA into it.
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
        """Larger pictures take more time steps at high noise: the shift is linear in the number of 2 x 2 patches (Esser et al., 5.3.2)."""
        if schedule.config.get("use_dynamic_shifting"):
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            anchors = [schedule.config.get(name, usual) for name, usual in zip(names, (256, 4096, 0.5, 1.15), strict=True)]
            more["mu"] = calculate_shift(math.prod(noise.shape[-2:]) // 4, *anchors)
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
        """The CLIP encoders side by side, padded to T5's width, then T5 (Esser et al., figure 2); zeros for absent ones."""
        config, batch = self.denoiser.config, len(next(iter(tokens.values())))
        place = {"device": self.device, "dtype": self.denoiser.dtype}
        encoders = {"ids": self.pipe.text_encoder, "ids_2": self.pipe.text_encoder_2}
        found = {ids: clip_embeddings(encoder, tokens[ids]) for ids, encoder in encoders.items() if encoder is not None}
        # the widths of two absent ones are alike
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
    """A `FluxPipeline`, of latents packed into 2 x 2 patches. `dev` takes its guidance scale as a condition, `schnell` takes none.

    Training runs `dev` at an embedded guidance of 1, where it predicts what the data say; `sample` sets its own.
    """

    family = "flux"
    text_components = ("text_encoder",)
    needed = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def __init__(self, pipe: FluxPipeline):
        super().__init__(pipe)
        self.unit = 2 * int(pipe.vae_scale_factor)
        # where each patch lies, made once a size: a recorded CUDA graph can't take anything from the host
        self.places = functools.cache(functools.partial(pipe._prepare_latent_image_ids, 1))
        self.distilled = bool(pipe.transformer.config.guidance_embeds)
        self.t5_length = 512 if self.distilled else 256  # as the two were published
        # no second branch: guidance is distilled into the weights
        self.generation = {"steps": 28 if self.distilled else 4, "guidance": 1.0}

    def set_timesteps(self, schedule: Any, steps: int, noise: Tensor, **more: Any) -> None:
        # Flux's own grid ends at 1 / steps; a foreign scheduler has its own
        if not schedule.config.get("use_flow_sigmas"):
            more["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        super().set_timesteps(schedule, steps, noise, **more)

    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        # of CLIP only the pooled text of the first chunk is read: T5 has the words
        first = super().tokenize(prompts)["ids"][:, 0]
        return {"ids": first, "ids_2": t5_ids(self.pipe.tokenizer_2, prompts, self.t5_length).to(self.device)}

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """T5's hidden states, and CLIP's pooled text."""
        pooled = self.components["text_encoder"](tokens["ids"]).pooler_output
        conditioning = {"encoder_hidden_states": self.pipe.text_encoder_2(tokens["ids_2"])[0], "pooled_projections": pooled}
        return {**conditioning, "guidance": torch.ones(len(pooled), device=self.device)} if self.distilled else conditioning

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        places = self.places(height // 2, width // 2, noisy.device, noisy.dtype)
        words = torch.zeros(conditioning["encoder_hidden_states"].shape[1], 3, device=noisy.device, dtype=noisy.dtype)
        patches = F.pixel_unshuffle(noisy, 2).flatten(2).mT  # (B, h/2 * w/2, 4 C): every 2 x 2 patch is a token
        patches = self.denoise(patches, timestep=timesteps / FLOW_STEPS, img_ids=places, txt_ids=words, **conditioning)
        return F.pixel_shuffle(patches.mT.unflatten(2, (height // 2, width // 2)), 2)
