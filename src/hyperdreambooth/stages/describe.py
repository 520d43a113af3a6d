"""What a photo shows, in words, told by the denoiser alone.

Fine-tuning learns whatever the photo's prompt doesn't name: with "a [V] face" a blue background and a smile become the
person. Of several phrases, the true one lets the base denoise the photo best (Li et al., "Your Diffusion Model is Secretly
a Zero-Shot Classifier", 2023), so no other model has to see the face.
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

# Noise levels at which phrases compete: lower ones leave nothing to be told, higher ones nothing to tell it by.
LEVELS = (0.35, 0.5, 0.65, 0.8)


def join(phrases: Sequence[str]) -> str:
    """A prompt out of one phrase of each slot; an empty one leaves no gap."""
    return re.sub(r"\b(a|A) (?=[aeiou])", r"\1n ", " ".join(phrase for phrase in phrases if phrase))


@torch.no_grad()
def strangeness(backbone: Backbone, latents: Tensor, prompt: str) -> Tensor:
    """How badly the base denoises photos' latents (N, C, h, w) at the noise level 0.5: (N,), near 1 where it knows nothing like them.

    A base of drawings gets photographs wrong by several times what it gets its own drawings wrong by.
    """
    noise = torch.randn(4, *latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
    conditioning, steps = PromptCache(backbone)([prompt] * 4), backbone.steps_for(torch.full((4,), 0.5))
    losses = [denoising_loss(backbone, one.expand(4, *one.shape), conditioning, noise, steps).mean() for one in latents]
    return torch.stack(losses).cpu()


def familiar(backbone: Backbone, latents: Tensor, prompt: str) -> float:
    """The strangeness above which a photo is unlike pictures that a hypernetwork knows, from pictures (N, C, h, w) that it should know."""
    return round(1.25 * strangeness(backbone, latents, prompt).max().item(), 4)


@torch.no_grad()
def describe(
    backbone: Backbone, latents: Tensor, slots: Sequence[Sequence[str]], predicted: LoraSet | None = None, noises: int = 2, batch: int = 32
) -> list[str]:
    """Prompts of N photos' latents (N, C, h, w).

    Args:
        slots: the alternatives for each part of the prompt, in order; the first of each is what is assumed at first.
        predicted: the people's updates, a batch of N: their faces should not compete with the words.
        noises: at each of LEVELS; all alternatives meet the same ones.
        batch: pictures in one forward pass.
    """
    prompts, people = PromptCache(backbone), len(latents)
    steps = backbone.steps_for(torch.tensor(LEVELS * noises).repeat_interleave(people))
    noise = torch.randn(len(LEVELS) * noises, *latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
    noise = noise.repeat_interleave(people, 0)
    copies = max(1, batch // people) * people

    @cache  # what a slot begins with is what the one before it ended with
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
