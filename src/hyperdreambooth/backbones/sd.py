"""Stable Diffusion 1.x and 2.x, and every other `StableDiffusionPipeline` (the embedded toon base is one)."""

from torch import Tensor

from . import text
from .base import Conditioning
from .schedules import Discrete
from .targets import PRESETS


class StableDiffusion(Discrete):
    """A `StableDiffusionPipeline` with epsilon or v prediction."""

    family = "sd"
    denoiser_name = "unet"
    text_components = ("text_encoder",)
    needed = ("text_encoder", "tokenizer")
    default_targets = PRESETS["sd"]["attention+ff"]

    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        return {"ids": text.clip_ids(self.pipe.tokenizer, self.pipe.text_encoder, prompts, chunks).to(self.device)}

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        ids = tokens["ids"]
        return {"encoder_hidden_states": text.joined(self.components["text_encoder"](ids.flatten(0, 1))[0], ids)}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoise(noisy, timesteps, **conditioning)
