"""Recorded CUDA graphs: how they are identified and released; with a GPU, also that they give the results of plain execution."""

from __future__ import annotations

import gc
from unittest import mock

import pytest
import torch

from hyperdreambooth import replay
from hyperdreambooth.backbones import StableDiffusion
from hyperdreambooth.lora import Hooks
from hyperdreambooth.sampling import generate
from hyperdreambooth.settings import GenerateConfig, PersonalizeConfig
from hyperdreambooth.stages.dreambooth import PhotoLosses, Subject, personalize

from .conftest import random_loras, tiny_pipe

card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


class Owner:
    pass


def test_recordings_go_with_what_they_refer_to(monkeypatch):
    one, other = Owner(), Owner()
    assert replay.token(one) is replay.token(one) is not replay.token(other)
    recordings = {((replay.token(one), "x"), 1): "first", ((replay.token(other), "x"), 1): "second"}
    monkeypatch.setattr(replay, "_recordings", recordings)
    del one
    gc.collect()
    assert list(recordings.values()) == ["second"]


def test_losses_with_one_key_compute_the_same(backbone):
    with Hooks(backbone.components, ()) as first, Hooks(backbone.components, ()) as second:
        assert PhotoLosses(backbone, 1.0, first).key == PhotoLosses(backbone, 1.0, second).key
        assert PhotoLosses(backbone, 1.0, first).key != PhotoLosses(backbone, 0.5, first).key
        assert PhotoLosses(StableDiffusion(tiny_pipe()), 1.0, first).key != PhotoLosses(backbone, 1.0, first).key


def test_a_recording_of_another_state_of_the_base_is_another_recording():
    from peft import LoraConfig

    base = StableDiffusion(tiny_pipe())
    plain = replay.fingerprint(base.denoiser)
    with torch.no_grad():
        next(base.denoiser.parameters()).add_(1)  # in place, like merging
    assert replay.fingerprint(base.denoiser) == plain
    base.denoiser.add_adapter(LoraConfig(r=1, lora_alpha=1, target_modules=["to_q"]), "style")
    loaded = replay.fingerprint(base.denoiser)
    base.denoiser.set_adapters(["style"], [0.5])
    weaker = replay.fingerprint(base.denoiser)
    base.denoiser.disable_adapters()
    assert len({plain, loaded, weaker, replay.fingerprint(base.denoiser)}) == 4
    base.denoiser.delete_adapters("style")
    assert replay.fingerprint(base.denoiser) not in (loaded, weaker)


@pytest.mark.parametrize("hooked", [False, True])
def test_drawing_is_recorded_unless_hooks_are_there_already(monkeypatch, hooked):
    base, made = StableDiffusion(tiny_pipe()), []
    monkeypatch.setattr(replay, "Replayed", lambda work, key: made.append(key) or work)
    if hooked:
        next(base.denoiser.modules()).register_forward_hook(lambda *args: None)
    generate(base, ["a [V] face"], [1], GenerateConfig(steps=1))
    assert bool(made) != hooked
    assert all(key[:2] == (replay.token(base), replay.fingerprint(base.denoiser)) for key in made)


def test_the_next_training_goes_on_with_its_own_values_in_the_memory_of_the_last():
    def begun(seed: int, steps: int) -> replay.Memory:
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": torch.tensor(0.1 + seed)}], foreach=False)
        for _ in range(steps):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return replay.Memory(model, optimizer)

    first, second, third = begun(0, 2), begun(1, 1), begun(2, 0)
    recorded = first.tensors()
    assert first.kind() == second.kind()
    for memory in (second, third):  # before its first step a training has no optimizer moments
        before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
        memory.move_to(recorded)
        after = memory.tensors()
        assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in recorded.items())
        assert all(torch.equal(after[name], before.get(name, torch.zeros(()))) or not after[name].any() for name in after)


def test_work_on_a_cpu_runs_as_it_is():
    calls = []
    work = replay.Replayed(lambda inputs: calls.append(1) or inputs["x"] + 1, ("key",))
    for _ in range(5):
        assert work({"x": torch.zeros(2)}).tolist() == [1, 1]
    assert len(calls) == 5


@card
def test_recorded_work_gives_what_plain_work_gives():
    base = StableDiffusion(tiny_pipe().to("cuda"))
    predicted = random_loras(base, batch=1, rank=1).scaled(0.1).map(lambda tensor: tensor.cuda())
    subject = Subject(torch.randn(1, 1, 4, 8, 8, device="cuda"), "a [V] face")
    config, drawing = PersonalizeConfig(steps=8, rank=2, copies=2), GenerateConfig(steps=6)
    with mock.patch.object(replay, "OFF", True):
        plain, _ = personalize(base, subject, predicted, config, quiet=True)
        picture = generate(base, ["a [V] face"], [1], drawing, personal=plain.select(0))
    for _ in range(2):  # the second run reuses the recording
        found, _ = personalize(base, subject, predicted, config, quiet=True)
        for path in plain:
            torch.testing.assert_close(found[path].delta(), plain[path].delta(), atol=1e-4, rtol=1e-2)
        drawn = generate(base, ["a [V] face"], [1], drawing, personal=plain.select(0))
        torch.testing.assert_close(drawn, picture, atol=1e-3, rtol=1e-2)
    replay.forget()
