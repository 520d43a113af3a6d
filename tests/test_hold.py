"""Fine-tuning on one photo leaves the answer to other prompts alone."""

from __future__ import annotations

import pytest
import torch

from hyperdreambooth import HyperDreamBooth
from hyperdreambooth.data import PromptCache
from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import applied, find_targets
from hyperdreambooth.pretrained import HyperNetworkInfo
from hyperdreambooth.stages.hold import CONTEXTS, draw_prompt
from hyperdreambooth.stages.personalize import PersonalizeConfig, personalize
from hyperdreambooth.stages.subject import Subject

from .conftest import random_loras, tiny_source
from .test_stages import latents, loss_of

OTHERS = [["a", "a pencil sketch of a"], ["[V] face"], ["wearing a cap", "with glasses"]]


def answers(backbone, loras, text="a [V] face with glasses"):
    """What a denoiser says to pure noise: (4, C, h, w)."""
    noise = latents(4, seed=5)
    steps = backbone.steps_for(torch.ones(4))
    with torch.no_grad(), applied(backbone.components, loras or {}):
        return backbone.predict(backbone.add_noise(latents(4), noise, steps), steps, PromptCache(backbone)([text] * 4))


def tuned(backbone, predicted, x, **changes):
    config = PersonalizeConfig(**{"steps": 12, "rank": 2, "learning_rate": 2e-2, **changes})
    targets = None if predicted is not None else find_targets(backbone.components, backbone.default_targets)
    return personalize(backbone, Subject(x, "a [V] face", contexts=OTHERS), predicted, config, targets=targets, quiet=True)[0]


def test_a_hold_keeps_other_answers_and_still_learns_the_photo(backbone):
    predicted = random_loras(backbone, batch=1, rank=1).scaled(0.01)
    x = latents(1, 1)
    kept, free = (tuned(backbone, predicted, x, hold=hold, hold_weight=5.0) for hold in (4, 0))
    before = answers(backbone, predicted.select(0))
    moved_kept, moved_free = ((answers(backbone, loras.select(0)) - before).square().mean() for loras in (kept, free))
    assert moved_kept < 0.5 * moved_free
    photo = x[0].repeat(4, 1, 1, 1)
    assert loss_of(backbone, kept.select(0), photo) < loss_of(backbone, predicted.select(0), photo)


def test_without_a_prediction_the_base_is_what_is_held_to(backbone):
    x = latents(1, 1)
    kept, free = (tuned(backbone, None, x, hold=hold, hold_weight=5.0) for hold in (4, 0))
    before = answers(backbone, None)
    moved_kept, moved_free = ((answers(backbone, loras) - before).square().mean() for loras in (kept, free))
    assert moved_kept < 0.5 * moved_free


def test_people_who_are_held_do_not_affect_one_another(backbone):
    x = latents(2, 1)
    predicted = random_loras(backbone, batch=2, rank=1).scaled(0.01)
    together = tuned(backbone, predicted, x, hold=2, steps=4)
    alone = tuned(backbone, predicted.select(slice(1, 2)), x[1:], hold=2, steps=4)
    for path in together:
        torch.testing.assert_close(together[path].delta()[1], alone[path].delta()[0], atol=2e-5, rtol=1e-3)


def test_a_hold_is_off_unless_asked_for_or_the_hypernetwork_s_own(backbone):
    predicted, x = random_loras(backbone, batch=1, rank=1), latents(1, 1)
    unset, none = tuned(backbone, predicted, x, steps=2), tuned(backbone, predicted, x, steps=2, hold=0)
    assert all(torch.equal(unset[path].up, none[path].up) for path in none)
    assert PersonalizeConfig().resolved(predicted=True, hold=2).hold == 2
    with pytest.raises(InputError, match="hold at least 0"):
        PersonalizeConfig(hold=-1)
    with pytest.raises(ValueError, match="no other prompts"):
        personalize(backbone, Subject(x, "a [V] face"), predicted, PersonalizeConfig(steps=1, hold=1), quiet=True)


def test_every_phrase_is_drawn_some_time():
    generator = torch.Generator().manual_seed(0)
    drawn = {draw_prompt(OTHERS, generator) for _ in range(60)}
    assert drawn == {f"{a} [V] face {b}" for a in OTHERS[0] for b in OTHERS[2]}


def test_contexts_are_the_hypernetwork_s_own_or_general_ones(backbone):
    info = HyperNetworkInfo("tiny", {}, {}, {}, contexts=OTHERS)
    hdb = HyperDreamBooth(backbone, "tiny", tiny_source(backbone), info)
    assert hdb.contexts == [[phrase.replace("[V]", hdb.identifier) for phrase in slot] for slot in OTHERS]
    hdb.identifier = "sks"
    assert hdb.contexts[1] == ["sks face"]
    info.contexts = []
    general = hdb.contexts
    assert general[1] == [hdb.prompt.replace("[V]", "sks")]
    assert [general[0], *general[2:]] == [list(slot) for slot in (CONTEXTS[0], *CONTEXTS[2:])]
