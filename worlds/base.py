"""A world's base: a small but complete `StableDiffusionPipeline`.

It has a CLIPTextModel with a tokenizer of a few hundred words, a UNet2DConditionModel on 8 x 8 latents and an AutoencoderKL, and uses
v prediction with zero terminal SNR and trailing timesteps.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hyperdreambooth.backbones import StableDiffusion
from hyperdreambooth.objectives import denoising, denoising_loss
from hyperdreambooth.training_settings import NoiseLevels

WIDTH = 128
IDENTIFIER = "[V]"


def byte_alphabet() -> list[str]:
    """The printable characters that CLIP's vocabulary uses for the 256 bytes."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in kept else next(spare)) for byte in range(256)]


def merged(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """A word's BPE tokens: the known neighboring pair with the lowest rank in `merges` is merged until none is left."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while known := [pair for pair in pairwise(parts) if pair in merges]:
        left, right = min(known, key=merges.__getitem__)
        joined: list[str] = []
        for part in parts:
            if part == right and joined and joined[-1] == left:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return parts


def build_tokenizer(words: Sequence[str], length: int, whole: bool = True) -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each of these words, bytes for all others, and prompts of up to `length` tokens.

    A merge learned for one word can apply inside another, which then stays several tokens; `whole` adds merges that prevent this.
    """
    alphabet = byte_alphabet()
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: dict[tuple[str, str], int] = {}
    for again in (False, True) if whole else (False,):
        for word in words:
            left, *others = merged(word, merges if again else {})
            for part in others:
                if (left, part) not in merges:
                    merges[left, part] = len(merges)
                    symbols.append(left + part)
                left += part
    names = list(dict.fromkeys([*symbols, "<|startoftext|>", "<|endoftext|>"]))
    tokenizer = CLIPTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=list(merges), model_max_length=length)
    tokenizer.add_tokens([AddedToken(IDENTIFIER, normalized=False)])
    return tokenizer


def build(vae: AutoencoderKL, tokenizer: CLIPTokenizer, widths: tuple[int, ...]) -> StableDiffusionPipeline:
    """The pipeline with an untrained text encoder and UNet; `widths` are the UNet's channels at each resolution, finest first."""
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        use_linear_projection=True,
    )
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )  # type: ignore[arg-type]


class BaseTraining:
    """Losses and batches for `fit`; `caption(index, draw)` gives a new random caption of a picture each time that it is used."""

    levels = NoiseLevels(mean=0.4, std=1.3, uniform=0.15)

    def __init__(self, backbone: StableDiffusion, latents: Tensor, caption: Callable[[int, random.Random], str], batch: int, seed: int):
        self.backbone, self.latents, self.caption, self.batch, self.seed = backbone, latents, caption, batch, seed
        backbone.components.requires_grad_(True)
        unused = backbone.components["text_encoder"]
        for name, parameter in unused.named_parameters():
            parameter.requires_grad_("position_ids" not in name)

    def draw(self, index: int, generator: torch.Generator) -> tuple[Tensor, list[str], Tensor, Tensor]:
        """The index-th batch: latents, captions, noise levels and noise."""
        draw = random.Random(self.seed * 1_000_003 + index)
        chosen = [draw.randrange(len(self.latents)) for _ in range(self.batch)]
        latents, captions = self.latents[chosen].float(), [self.caption(i, draw) for i in chosen]
        return latents, captions, self.levels.draw(len(captions), generator), torch.randn(latents.shape, generator=generator)

    def losses(self, model: nn.Module, batch: tuple[Tensor, list[str], Tensor, Tensor]) -> Tensor:
        latents, captions, levels, noise = batch
        device, timesteps = self.backbone.device, self.backbone.steps_for(levels)
        return denoising_loss(self.backbone, latents.to(device), self.backbone.encode_prompts(captions), noise.to(device), timesteps)


class HeldOutLoss:
    """Mean denoising loss of held-out people's pictures with their captions, with the same noise and noise levels every time.

    It keeps falling long after generated pictures look finished, and a lower loss of the base also improves the hypernetworks on it.
    """

    def __init__(self, backbone: StableDiffusion, latents: Tensor, captions: Sequence[str]):
        self.backbone, self.latents, self.captions = backbone, latents.float(), captions
        self.levels = BaseTraining.levels.draw(len(captions), torch.Generator().manual_seed(7))

    def __call__(self, step: int, model: nn.Module) -> dict[str, float]:
        total = 0.0
        for start in range(0, len(self.captions), 64):
            part = slice(start, start + 64)
            conditioning = self.backbone.encode_prompts(self.captions[part])
            latents = self.latents[part].to(self.backbone.device)
            losses = denoising(self.backbone, latents, conditioning, self.levels[part], torch.Generator().manual_seed(start))
            total += losses.sum().item()
        return {"loss": total / len(self.captions)}


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Writes the pipeline in fp16 safetensors, without changing the one in memory."""
    half = copy.deepcopy(pipe).to(torch.float16)
    half.save_pretrained(str(folder), safe_serialization=True)
