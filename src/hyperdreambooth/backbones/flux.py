"""Flux: flow matching on latents packed into 2 x 2 patches; `dev` takes its guidance scale as a condition, `schnell` takes none."""

import functools
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.nn import functional as F

from . import text
from .base import Conditioning
from .schedules import FLOW_STEPS, Flow
from .targets import PRESETS


class Flux(Flow):
    """A `FluxPipeline`.

    Training runs `dev` at an embedded guidance of 1, where it predicts what the data say; `sample` sets its own. The T5
    encoder isn't among the components: no tool loads a LoRA into it.
    """

    family = "flux"
    denoiser_name = "transformer"
    text_components = ("text_encoder",)
    needed = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    default_targets = PRESETS["flux"]["attention+ff"]

    def __init__(self, pipe: FluxPipeline):
        super().__init__(pipe)
        self.unit = 2 * int(pipe.vae_scale_factor)
        self.places = functools.cache(positions)  # made once a size: a recorded CUDA graph can't take anything from the host
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
        first = text.clip_ids(self.pipe.tokenizer, self.pipe.text_encoder, prompts)[:, 0]
        return {"ids": first.to(self.device), "ids_2": text.t5_ids(self.pipe.tokenizer_2, prompts, self.t5_length).to(self.device)}

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """T5's hidden states, and CLIP's pooled text."""
        pooled = self.components["text_encoder"](tokens["ids"]).pooler_output
        conditioning = {"encoder_hidden_states": self.pipe.text_encoder_2(tokens["ids_2"])[0], "pooled_projections": pooled}
        return {**conditioning, "guidance": torch.ones(len(pooled), device=self.device)} if self.distilled else conditioning

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        places = self.places(height // 2, width // 2, noisy.device, noisy.dtype)
        words = torch.zeros(conditioning["encoder_hidden_states"].shape[1], 3, device=noisy.device, dtype=noisy.dtype)
        packed = self.denoise(pack(noisy), timestep=timesteps / FLOW_STEPS, img_ids=places, txt_ids=words, **conditioning)
        return unpack(packed, height, width)


def positions(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Where each patch of a picture lies, (rows * columns, 3): zero, row, column."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).to(device, dtype)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): every 2 x 2 patch is a token."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    return F.pixel_shuffle(packed.mT.unflatten(2, (height // 2, width // 2)), 2)
