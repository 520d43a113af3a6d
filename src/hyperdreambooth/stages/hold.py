"""What one photo must not change: the prediction's answer to other prompts.

Fine-tuning sees a single context, and whatever it learns leaks into the others: a hat that the photo doesn't have fades. What a
picture will show is decided at pure noise, which needs no picture to be asked about. So a few noises a step are denoised for other prompts, and
the answer is held to what the frozen prediction says (without one: the base), as DreamBooth's prior preservation holds the class to
the base's own pictures. Lower noise, which carries the photo's details, stays free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..data import PromptCache
from ..lora import LoraSet, applied
from ..training import Step
from .describe import join
from .subject import SharedNoise, Subject

CONTEXTS = (
    ("a photo of", "a painting of", "a pencil sketch of", "a sculpture of", "a black and white photo of"),
    ("[V]",),
    ("", "smiling", "wearing a hat", "wearing sunglasses", "wearing a red dress", "wearing a suit"),
    ("", "on a beach", "in the snow", "in a city at night", "in a forest", "in front of a blue wall"),
)
"""Other prompts in parts, for hypernetworks that name none; [V] stands for the prompt that names the person."""


def draw_prompt(slots: Sequence[Sequence[str]], generator: torch.Generator) -> str:
    """One phrase of each slot, joined."""
    return join([slot[int(torch.randint(len(slot), (), generator=generator))] for slot in slots])


def holding(
    step: Step,
    backbone: Backbone,
    subject: Subject,
    predicted: LoraSet | None,
    count: int,
    weight: float,
    *,
    live_text: bool,
) -> Step:
    """`step` with the hold added to its losses.

    Args:
        predicted: the updates of the subject's P people whose answer is kept; None: the base's own.
        count: noises a step. People share them.
        weight: of the mean squared difference between the two answers.

    Raises ValueError where the subject has no `contexts`.
    """
    if not subject.contexts:
        raise ValueError("no other prompts to hold")
    people = len(subject.latents)
    prompts = PromptCache(backbone, live=live_text)

    @contextmanager
    def held(source: nn.Module, chosen: list[int], generator: torch.Generator) -> Iterator[Tensor]:
        texts = [text for text in (draw_prompt(subject.contexts, generator) for _ in range(count)) for _ in range(people)]
        latents = subject.latents[:, 0].repeat(count, 1, 1, 1)
        noise = SharedNoise(people)(latents.shape, generator).to(latents)
        timesteps = backbone.steps_for(torch.ones(len(latents)))
        noisy = backbone.add_noise(latents, noise, timesteps)
        with torch.no_grad(), applied(backbone.components, predicted or {}):
            wanted = backbone.predict(noisy, timesteps, prompts(texts)).float()
        with step(source, chosen, generator) as losses:  # the person's update is in place within it
            errors = (backbone.predict(noisy, timesteps, prompts(texts)).float() - wanted).square()
            yield losses + weight * errors.flatten(1).mean(1).unflatten(0, (count, people)).mean(0).repeat(len(losses) // people)

    return held
