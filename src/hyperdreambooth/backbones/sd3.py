"""Stable Diffusion 3 and 3.5: flow matching, and up to three text encoders (two CLIP, one T5), any of which may be absent."""

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from . import text
from .base import Conditioning
from .schedules import Flow
from .targets import PRESETS

T5_LENGTH = 256


class StableDiffusion3(Flow):
    """A `StableDiffusion3Pipeline` (Esser et al., arXiv 2403.03206).

    The T5 encoder isn't among the components: no tool loads a LoRA into it.
    """

    family = "sd3"
    denoiser_name = "transformer"
    text_components = ("text_encoder", "text_encoder_2")
    needed = ()
    default_targets = PRESETS["sd3"]["attention+ff"]

    def __init__(self, pipe: StableDiffusion3Pipeline):
        super().__init__(pipe)
        self.generation = {"steps": 28, "guidance": 7.0}
        if len(self.components) == 1 and pipe.text_encoder_3 is None:
            raise InputError("this base has no text encoder at all: at least one of the three is needed.")
        self.unit = int(pipe.vae_scale_factor * pipe.patch_size)

    def tokenize(self, prompts: list[str], chunks: int = 1) -> Conditioning:
        pipe = self.pipe
        pairs = {"ids": (pipe.tokenizer, pipe.text_encoder), "ids_2": (pipe.tokenizer_2, pipe.text_encoder_2)}
        found = {name: text.clip_ids(*pair, prompts, chunks) for name, pair in pairs.items() if pair[0]}
        found |= {"ids_3": text.t5_ids(pipe.tokenizer_3, prompts, T5_LENGTH)} if pipe.tokenizer_3 else {}
        return {name: ids.to(self.device) for name, ids in found.items()}

    def encode_tokens(self, tokens: Conditioning) -> Conditioning:
        """The CLIP encoders side by side, padded to T5's width, then T5 (Esser et al., figure 2); zeros for absent ones."""
        config, batch = self.denoiser.config, len(next(iter(tokens.values())))
        place = {"device": self.device, "dtype": self.denoiser.dtype}
        encoders = {"ids": self.pipe.text_encoder, "ids_2": self.pipe.text_encoder_2}
        found = {ids: text.clip_embeddings(encoder, tokens[ids]) for ids, encoder in encoders.items() if encoder is not None}
        # the widths of two absent ones are alike
        width = config.pooled_projection_dim - sum(pooled.shape[-1] for _, pooled in found.values())
        length = next((hidden.shape[1] for hidden, _ in found.values()), text.CLIP_LENGTH)
        absent = torch.zeros(batch, length, width // max(1, 2 - len(found)), **place)
        clips, pooled = zip(*(found.get(ids, (absent, absent[:, 0])) for ids in encoders), strict=True)
        hidden = torch.cat(clips, -1)
        if self.pipe.text_encoder_3 is None:
            t5 = torch.zeros(batch, T5_LENGTH, config.joint_attention_dim, **place)
        else:
            t5 = self.pipe.text_encoder_3(tokens["ids_3"])[0]
        hidden = torch.cat([F.pad(hidden, (0, config.joint_attention_dim - hidden.shape[-1])), t5.to(hidden)], 1)
        return {"encoder_hidden_states": hidden, "pooled_projections": torch.cat(pooled, -1)}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoise(noisy, timestep=timesteps, **conditioning)
