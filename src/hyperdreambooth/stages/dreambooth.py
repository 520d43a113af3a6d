"""What fine-tuning on one subject's photos needs, for `train-light` and `personalize` alike: a step and its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..data import PromptCache
from ..lora import applied
from ..objectives import NoiseLevels, denoising
from ..sampling import sample
from ..training import Batches, Step


@dataclass
class Subject:
    """The photos of P people, as latents (P, photos, C, h, w), and what they show in words: one prompt, or (P, photos) of them.

    mask: (P, photos, 1, h, w) weights of the loss, where only the face should count.
    prior: latents (n, C, h, w) of the class, and its prompt: prior preservation keeps the base's own faces.
    """

    latents: Tensor
    prompt: str | list[list[str]]
    mask: Tensor | None = None
    prior: Tensor | None = None
    prior_prompt: str = "a face"
    prior_weight: float = 1.0

    def texts(self, photo: int) -> list[str]:
        """What that photo of each person shows: P prompts."""
        return [self.prompt] * len(self.latents) if isinstance(self.prompt, str) else [mine[photo] for mine in self.prompt]


def make_step(
    backbone: Backbone, subject: Subject, levels: NoiseLevels, copies: int, *, live_text: bool, seed: int
) -> tuple[Step, Batches]:
    """Every step denoises `copies` noised copies of each person's photos; people don't affect one another.

    Photos take turns. The noise depends on the seed, the step and the copy, never on how many people there are, so one
    person alone gets what the same person gets in a batch.
    """
    people, count = subject.latents.shape[:2]
    prompts = PromptCache(backbone, live=live_text)

    def batches(index: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed * 7919 + index // max(count, 1))
        order = torch.randperm(count, generator=generator).tolist()
        return [order[(index * copies + copy) % count] for copy in range(copies)]

    @contextmanager
    def step(source: nn.Module, chosen: list[int], generator: torch.Generator) -> Iterator[Tensor]:
        latents = torch.cat([subject.latents[:, photo] for photo in chosen])  # copy-major: a batch of LoRAs tiles over it
        mask = torch.cat([subject.mask[:, photo] for photo in chosen]) if subject.mask is not None else None
        texts = [text for photo in chosen for text in subject.texts(photo)]
        drawn = levels.draw(copies, generator).repeat_interleave(people)
        noise = SharedNoise(people)
        with applied(backbone.components, source(torch.arange(people, device=latents.device))):
            losses = denoising(backbone, latents, prompts(texts), drawn, generator, mask, noise)
            if subject.prior is not None:
                pick = torch.randint(len(subject.prior), (copies,), generator=generator)
                prior = subject.prior[pick].repeat_interleave(people, 0)
                prior_levels = NoiseLevels(mean=0.0, uniform=1.0).draw(copies, generator).repeat_interleave(people)
                losses = losses + subject.prior_weight * denoising(
                    backbone, prior, prompts([subject.prior_prompt] * len(prior)), prior_levels, generator, None, noise
                )
            yield losses

    return step, batches


def ellipse_mask(height: int, width: int) -> Tensor:
    """Weights (1, height, width) in 0..1 of the middle of a face crop: 1 on the face, falling to 0 at the corners.

    The prompt names the person and nothing else: a background that counts in the loss would be learnt as the person.
    """
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height - 0.5, (torch.arange(width) + 0.5) / width - 0.5, indexing="ij")
    distance = ((x / 0.42) ** 2 + (y / 0.52) ** 2).sqrt()
    return ((1.1 - distance) / 0.3).clamp(0, 1)[None]


class SharedNoise:
    """Draws noise (copies * people, ...) in which the people of one copy share theirs."""

    def __init__(self, people: int):
        self.people = people

    def __call__(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape[0] // self.people, *shape[1:], generator=generator).repeat_interleave(self.people, 0)


def prior_latents(backbone: Backbone, prompt: str, count: int, seed: int, on_step: Callable[[int], None] | None = None) -> Tensor:
    """Generates the class's own pictures for prior preservation: latents (count, C, h, w)."""
    shape = backbone.latent_shape()
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    prompts = PromptCache(backbone)
    device = next(backbone.components.parameters())
    own = {key: value for key, value in backbone.generation.items() if key in ("steps", "guidance")}
    parts = [
        sample(backbone, prompts([prompt] * len(part)), prompts([""] * len(part)), part.to(device), on_step=on_step, **own)
        for part in noise.split(8)
    ]
    return torch.cat(parts)
