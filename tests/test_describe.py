"""Descriptions of a photo, chosen by the denoiser's loss alone."""

from __future__ import annotations

import pytest
import torch

from hyperdreambooth.data import PromptCache
from hyperdreambooth.lora import applied
from hyperdreambooth.objectives import denoising_loss
from hyperdreambooth.stages.describe import LEVELS, describe, familiar, join, strangeness

from .conftest import random_loras

SLOTS = [["a"], ["", "smiling", "angry"], ["[V] face"], ["", "wearing a cap"], ["", "on a blue background", "on a red background"]]


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_phrases_join_without_gaps():
    assert join(["a", "", "[V] face", "", "on a red background"]) == "a [V] face on a red background"
    assert join(["a", "angry", "[V] face"]) == "an angry [V] face"


def test_the_chosen_phrase_denoises_the_photo_best(backbone, latents):
    slots = [["a [V] face"], ["", "wearing a cap", "with glasses", "on a blue background"]]
    found = describe(backbone, latents[:1], slots, noises=1)
    noise = torch.randn(len(LEVELS), 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def loss(text: str) -> float:
        many = latents[:1].expand(len(LEVELS), -1, -1, -1)
        cond = PromptCache(backbone)([text] * len(LEVELS))
        with torch.no_grad():
            return denoising_loss(backbone, many, cond, noise, backbone.steps_for(torch.tensor(LEVELS))).mean().item()

    assert found == [min((join(["a [V] face", phrase]) for phrase in slots[1]), key=loss)]


def test_photos_are_described_as_if_alone_each_under_its_own_lora(backbone, latents):
    predicted = random_loras(backbone, batch=3)
    together = describe(backbone, latents, SLOTS, predicted)
    alone = [describe(backbone, latents[i : i + 1], SLOTS, predicted.select(slice(i, i + 1)))[0] for i in range(3)]
    small = describe(backbone, latents, SLOTS, predicted, batch=1)
    assert together == alone == small
    assert all(text.startswith("a") and "[V] face" in text for text in together)
    with applied(backbone.components, predicted):  # raises if hooks of `describe` were left on the model
        pass
    assert not any(module._forward_hooks for module in backbone.components.modules())


def test_nothing_to_choose_is_the_first_of_everything(backbone, latents):
    assert describe(backbone, latents, [["a"], ["[V] face"], [""]]) == ["a [V] face"] * 3


def test_strangeness_is_the_same_in_any_company_and_tells_what_no_denoiser_knows(backbone, latents):
    together = strangeness(backbone, latents, "a [V] face")
    for i in range(3):
        torch.testing.assert_close(strangeness(backbone, latents[i : i + 1], "a [V] face"), together[i : i + 1])
    assert (strangeness(backbone, 10 * latents, "a [V] face") > together).all()
    assert familiar(backbone, latents, "a [V] face") == pytest.approx(1.25 * together.max().item(), abs=1e-4)
