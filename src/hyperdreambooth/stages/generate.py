"""Prompts and a person -> pictures, with style LoRAs beside the personal one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbones import Backbone
from ..data import PromptCache
from ..errors import InputError
from ..lora import LoraSet, applied
from ..sampling import sample


@dataclass
class GenerateConfig:
    """How pictures are made."""

    negative: str = ""
    """Negative prompt."""
    steps: int | None = None
    """Denoising steps. Default: the hypernetwork's own, or the family's (25; SD 3 and Flux dev 28, Flux schnell 4)."""
    guidance: float | None = None
    """Prompt guidance scale; 1 is none. Default: the hypernetwork's own, or the family's (5; SD 3 7, Flux 1)."""
    embedded_guidance: float = 3.5
    """Flux dev: the guidance scale that it takes as a condition, without a second branch."""
    identity_guidance: float | Literal["off"] | None = None
    """Identity guidance scale: the base without the personal LoRA as the unconditional branch. "off": plain guidance, with the
    LoRA in both branches. Default: the hypernetwork's own, or off."""
    identity_until: float | None = None
    """The fraction of the denoising steps, 0 to 1, after which the identity scale is 1 at most: the person is decided early, and
    later it only costs what the prompt asked for. Default: the hypernetwork's own, or 1."""
    strength: float = 1.0
    """Weight of the personal LoRA."""
    scheduler: str | None = None
    """A scheduler of diffusers by class name, such as EulerDiscreteScheduler. Default: the base's own."""
    width: int | None = None
    """Width in pixels. Default: the base's own."""
    height: int | None = None
    """Height in pixels. Default: the base's own."""
    seed: int = 0
    """The first picture's seed; the next ones count up."""
    count: int = 1
    """Pictures a prompt."""
    batch: int = 8
    """Pictures that are denoised side by side."""

    def __post_init__(self) -> None:
        if (self.steps is not None and self.steps < 1) or self.count < 1 or self.batch < 1:
            raise InputError(f"steps, count and batch must be at least 1, not {self.steps}, {self.count} and {self.batch}.")
        if self.identity_until is not None and not 0 <= self.identity_until <= 1:
            raise InputError(f"identity_until is a fraction of the steps, 0 to 1, not {self.identity_until}.")

    def resolved(self, **own: Any) -> GenerateConfig:
        """The same with whatever is unset filled in: from a base's own defaults, then from general ones."""
        general = {"steps": 25, "guidance": 5.0, "identity_guidance": "off", "identity_until": 1.0}
        return dataclasses.replace(self, **{key: value for key, value in {**general, **own}.items() if getattr(self, key) is None})


def noise_for(backbone: Backbone, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
    """Initial noise (B, C, h, w), one seed each: a picture depends on its own seed, never on the batch."""
    shape = backbone.latent_shape(height, width)
    device = next(backbone.components.parameters()).device
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)


def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: GenerateConfig,
    *,
    personal: LoraSet | None = None,
    styles: LoraSet | None = None,
    on_picture: Callable[[int], None] | None = None,
) -> Tensor:
    """One picture for each (prompt, seed): (N, 3, H, W) in -1..1.

    Args:
        personal: one person's LoRA, or a batch of N, one for each picture.
        styles: the sum of any style LoRAs.
        on_picture: called with the number of pictures done.

    Raises InputError where width or height don't fit the base.
    """
    config = config.resolved(**backbone.generation)
    assert config.steps is not None
    assert config.guidance is not None
    assert config.identity_until is not None
    identity = None if config.identity_guidance == "off" else config.identity_guidance
    unit = backbone.unit
    for name, value in (("width", config.width), ("height", config.height)):
        if value is not None and (value < unit or value % unit):
            raise InputError(f"{name} must be a multiple of {unit} for this base, not {value}.")
    cache = PromptCache(backbone)
    text = {path.split(".")[0] for path in [*(personal or {}), *(styles or {})]} & set(backbone.text_components)
    batched = personal is not None and next(iter(personal.values())).down.ndim == 3
    pictures = []
    for start in range(0, len(prompts), config.batch):
        part = slice(start, start + config.batch)
        mine = personal.select(part) if personal and batched else personal
        wanted = list(prompts[part])
        noise = noise_for(backbone, seeds[part], config.height, config.width)
        scaled = mine.scaled(config.strength) if mine else None
        without = [config.negative] * len(wanted)
        if text:  # a text encoder's LoRA belongs to the branches with the person, a style's to all
            base, whole = styles or LoraSet(), (scaled or LoraSet()) + (styles or LoraSet())
            conditioning, plain = encode_under(backbone, wanted, whole), encode_under(backbone, wanted, base)
            negative = encode_under(backbone, without, whole if identity is None else base)
        else:
            conditioning = plain = cache(wanted)
            negative = cache(without)
        latents = sample(
            backbone,
            conditioning,
            negative,
            noise,
            plain=plain,
            personal=scaled,
            styles=styles,
            steps=config.steps,
            guidance=config.guidance,
            identity_guidance=identity,
            identity_until=config.identity_until,
            embedded_guidance=config.embedded_guidance,
            scheduler=config.scheduler,
            generator=torch.Generator().manual_seed(seeds[start]),
        )
        pictures.append(backbone.decode_images(latents).cpu())
        if on_picture:
            on_picture(start + len(wanted))
    return torch.cat(pictures)


@torch.no_grad()
def encode_under(backbone: Backbone, prompts: list[str], loras: LoraSet) -> dict[str, Tensor]:
    """Conditioning of prompts while the text encoders carry `loras`."""
    mine = LoraSet({path: lora for path, lora in loras.items() if path.split(".")[0] in backbone.text_components})
    with applied(backbone.components, mine):
        return backbone.encode_prompts(prompts)
