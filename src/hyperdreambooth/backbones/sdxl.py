"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size as a condition."""

import functools

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from . import text
from .base import Conditioning
from .schedules import Discrete
from .targets import PRESETS


class StableDiffusionXL(Discrete):
    """A `StableDiffusionXLPipeline` (Podell et al., arXiv 2307.01952)."""

    family = "sdxl"
    denoiser_name = "unet"
    text_components = ("text_encoder", "text_encoder_2")
    needed = (*text_components, "tokenizer", "tokenizer_2")
    default_targets = PRESETS["sdxl"]["attention+ff"]

    def __init__(self, pipe: StableDiffusionXLPipeline):
        super().__init__(pipe)
        # made once a size: a recorded CUDA graph can't take anything from the host
        self.sizes = functools.cache(
            lambda height, width, device, dtype: torch.tensor([height, width, 0, 0, height, width], device=device, dtype=dtype)
        )

    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        pairs = ((self.pipe.tokenizer, self.pipe.text_encoder), (self.pipe.tokenizer_2, self.pipe.text_encoder_2))
        first, second = (text.clip_ids(tokenizer, encoder, prompts, chunks).to(self.device) for tokenizer, encoder in pairs)
        # zeros are what the base was trained with in place of no prompt
        kept = [float(prompt != "" or not self.pipe.config.force_zeros_for_empty_prompt) for prompt in prompts]
        return {"ids": first, "ids_2": second, "kept": torch.tensor(kept, device=self.device)}

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """Penultimate hidden states of both encoders side by side, and the second one's pooled text."""
        first, _ = text.clip_embeddings(self.pipe.text_encoder, tokens["ids"])
        second, pooled = text.clip_embeddings(self.pipe.text_encoder_2, tokens["ids_2"])
        hidden = torch.cat([first, second], -1)
        kept = tokens["kept"].to(hidden)
        return {"encoder_hidden_states": hidden * kept[:, None, None], "text_embeds": pooled * kept[:, None]}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # (original size, crop, target size), all of this very picture: the condition of one that was neither enlarged nor cropped
        height, width = (side * self.unit for side in noisy.shape[-2:])
        sizes = self.sizes(height, width, noisy.device, self.denoiser.dtype).expand(len(noisy), -1)
        added = {"text_embeds": conditioning["text_embeds"].to(self.denoiser.dtype), "time_ids": sizes}
        hidden = conditioning["encoder_hidden_states"]
        return self.denoise(noisy, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added)
