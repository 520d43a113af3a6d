"""Prompts that describe a photo, chosen with the denoiser alone.

Fine-tuning learns everything that the photo's prompt doesn't name: with "a [V] face", a blue background and a smile become
part of the person. Of several phrases, the true one gives the lowest denoising loss (Li et al., "Your Diffusion Model is
Secretly a Zero-Shot Classifier", 2023), so no other model has to see the face.
"""

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..backbones import Backbone
from ..data import PromptCache
from ..lora import LoraSet, applied
from ..objectives import denoising_loss

# Noise levels at which phrases are compared: at lower ones the prompt hardly matters, at higher ones the photo is hardly visible.
LEVELS = (0.35, 0.5, 0.65, 0.8)


def join(phrases: Sequence[str]) -> str:
    """A prompt out of one phrase of each slot: empty ones are left out, and "a" before a vowel becomes "an"."""
    return re.sub(r"\b(a|A) (?=[aeiou])", r"\1n ", " ".join(phrase for phrase in phrases if phrase))


@torch.no_grad()
def strangeness(backbone: Backbone, latents: Tensor, prompt: str) -> Tensor:
    """The base's denoising loss of photos' latents (N, C, h, w) at the noise level 0.5: (N,), near 1 for pictures unlike its training data.

    For a base of drawings, the loss of photographs is several times that of drawings.
    """
    noise = torch.randn(4, *latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
    conditioning, steps = PromptCache(backbone)([prompt] * 4), backbone.steps_for(torch.full((4,), 0.5))
    losses = [denoising_loss(backbone, one.expand(4, *one.shape), conditioning, noise, steps).mean() for one in latents]
    return torch.stack(losses).cpu()


def familiar(backbone: Backbone, latents: Tensor, prompt: str) -> float:
    """The `strangeness` above which a photo is unlike a hypernetwork's training data: 1.25 times the largest of `latents` from it."""
    return round(1.25 * strangeness(backbone, latents, prompt).max().item(), 4)


@torch.no_grad()
def describe(
    backbone: Backbone, latents: Tensor, slots: Sequence[Sequence[str]], predicted: LoraSet | None = None, noises: int = 2, batch: int = 32
) -> list[str]:
    """Prompts for N photos' latents (N, C, h, w): slot by slot, the phrase with the lowest denoising loss.

    Args:
        slots: the alternative phrases for each part of the prompt, in order; the first of each is used until its slot's turn.
        predicted: the updates of the people, a batch of N, so that phrases needn't explain the faces.
        noises: noise samples at each of LEVELS, the same for all phrases.
        batch: pictures in one forward pass.
    """
    prompts, people = PromptCache(backbone), len(latents)
    steps = backbone.steps_for(torch.tensor(LEVELS * noises).repeat_interleave(people))
    noise = torch.randn(len(LEVELS) * noises, *latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
    noise = noise.repeat_interleave(people, 0)
    copies = max(1, batch // people) * people

    @cache  # the prompts that were chosen for a slot are among those that the next slot tries
    def losses(texts: tuple[str, ...]) -> Tensor:
        """Mean loss of each photo under its text: (N,)."""
        parts = ((some, at, len(some) // people) for some, at in zip(noise.split(copies), steps.split(copies), strict=True))
        found = [denoising_loss(backbone, latents.repeat(n, 1, 1, 1), prompts(texts * n), some, at) for some, at, n in parts]
        return torch.cat(found).unflatten(0, (-1, people)).mean(0)

    chosen = [[slot[0] for slot in slots] for _ in range(people)]
    with applied(backbone.components, predicted or {}):
        for index, slot in enumerate(slots):
            if len(slot) == 1:
                continue
            tried = [[[*words[:index], phrase, *words[index + 1 :]] for words in chosen] for phrase in slot]
            best = torch.stack([losses(tuple(join(words) for words in option)) for option in tried]).argmin(0).tolist()
            chosen = [tried[choice][person] for person, choice in enumerate(best)]
    return [join(words) for words in chosen]
