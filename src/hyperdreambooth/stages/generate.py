"""Prompts and a person -> pictures."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backbones import Backbone
from ..data import PromptCache
from ..errors import InputError
from ..lora import LoraSet, applied
from ..progress import say
from ..sampling import Prompts, is_text, sample
from ..settings import GenerateConfig


def noise_for(backbone: Backbone, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
    """Initial noise (B, C, h, w), one seed each: a picture depends on its own seed, never on the batch."""
    shape = backbone.latent_shape(height, width)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(backbone.device)


def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: GenerateConfig,
    *,
    personal: LoraSet | None = None,
    on_picture: Callable[[int], None] | None = None,
) -> Tensor:
    """One picture for each (prompt, seed): (N, 3, H, W) in -1..1.

    Args:
        personal: one person's LoRA, or a batch of N, one for each picture.
        on_picture: called with the number of pictures done.

    Raises InputError where width or height don't fit the base.
    """
    for name, value in (("width", config.width), ("height", config.height)):
        if value is not None and (value < 1 or value % backbone.unit):
            raise InputError(f"{name} must be a multiple of {backbone.unit} for this base, not {value}.")
    cache, pictures = PromptCache(backbone), []
    scaled = personal.scaled(config.strength) if personal else None
    batched = scaled is not None and next(iter(scaled.values())).down.ndim == 3
    for start in range(0, len(prompts), config.batch):
        part = slice(start, start + config.batch)
        mine = scaled.select(part) if scaled and batched else scaled
        wanted = list(prompts[part])
        noise = noise_for(backbone, seeds[part], config.height, config.width)
        without = [config.negative] * len(wanted)
        conditioning = plain = cache(wanted, without)
        negative = cache(without, wanted)
        text = LoraSet({path: lora for path, lora in (mine or {}).items() if is_text(path, backbone)})
        if text:  # it belongs to the branches with the person
            longest = cache.longest([*wanted, config.negative])
            with applied(backbone.components, text), torch.no_grad():
                conditioning = backbone.encode_prompts(wanted, longest)
                negative = negative if config.identity is not None else backbone.encode_prompts(without, longest)
        generator = torch.Generator().manual_seed(seeds[start])
        latents = sample(backbone, Prompts(conditioning, negative, plain), noise, config, personal=mine, generator=generator)
        pictures.append(decoded(backbone, latents).cpu())
        if on_picture:
            on_picture(start + len(wanted))
    return torch.cat(pictures)


def decoded(backbone: Backbone, latents: Tensor) -> Tensor:
    """Latents -> pictures (B, 3, H, W) in -1..1, which are pictures: finite, and not of one color alone.

    Where the autoencoder overflows in half precision it goes on in float32, and says so. Raises InputError that names what failed.
    """
    dtype = str(backbone.denoiser.dtype).removeprefix("torch.")
    if not latents.isfinite().all():
        culprit = f"the denoiser, or a LoRA in it, gave values that aren't finite in {dtype}"
        raise InputError(f"no picture came out: {culprit}. Try --dtype float32, or a lower strength of the LoRA.")
    pixels = backbone.decode_images(latents)
    vae = backbone.pipe.vae
    if not pixels.isfinite().all() and vae.dtype != torch.float32:
        say(f"the autoencoder overflowed in {str(vae.dtype).removeprefix('torch.')}: it goes on in float32.")
        vae.to(torch.float32)
        pixels = backbone.decode_images(latents)
    if not pixels.isfinite().all():
        raise InputError("no picture came out: the autoencoder gave values that aren't finite. Are the base's weights whole?")
    if (pixels.flatten(1).amax(1) == pixels.flatten(1).amin(1)).any():
        raise InputError(f"a picture came out as one color alone, which is no picture (in {dtype}). Try --dtype float32, or another base.")
    return pixels
