"""The Python API: stopped personalizations, mixes of LoRAs, and the metadata of generated pictures."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
import transformers

from hyperdreambooth import HyperDreamBooth, formats
from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import Lora, LoraSet

from .conftest import picture
from .families import make

pytestmark = pytest.mark.usefixtures("tiny_world")


@pytest.fixture
def hdb():
    return HyperDreamBooth.from_pretrained("toon", device="cpu")


def test_a_device_may_be_torchs_own():
    opened = HyperDreamBooth.from_pretrained("toon", hypernetwork=None, device=torch.device("cpu"), dtype=None)
    assert opened.device == torch.device("cpu")


def test_a_stopped_person_is_what_the_last_step_showed(hdb):
    shown = []
    me = hdb.personalize(picture(), steps=3, quiet=True, on_step=lambda done, loras: shown.append(loras) or done == 2)
    assert me.metadata["hyperdreambooth.steps"] == "2"
    path = next(iter(me.loras))
    torch.testing.assert_close(me.loras[path].delta(), shown[1][path].delta(), atol=1e-5, rtol=1e-4)
    assert len(hdb.generate("a [V] face", shown[0], steps=1)) == 1


def test_a_photo_is_trained_under_the_words_that_are_found_for_it(hdb):
    hdb.info.describe = [["a [V] face"], ["wearing a cap"]]
    found = hdb.personalize(picture(), steps=2, quiet=True)
    told = hdb.personalize(picture(), steps=2, quiet=True, prompt="a [V] face wearing a cap")
    other = hdb.personalize(picture(), steps=2, quiet=True, prompt="a [V] face")
    assert found.shown == told.shown == ["a [V] face wearing a cap"]
    assert other.shown == hdb.personalize(picture(), steps=0).shown == ["a [V] face"]
    path = next(iter(found.loras))
    torch.testing.assert_close(found.loras[path].delta(), told.loras[path].delta())
    assert any(not torch.allclose(found.loras[p].delta(), other.loras[p].delta(), atol=1e-6) for p in found.loras)


def test_a_long_caption_changes_nothing_for_the_others_of_a_folder(tmp_path):
    hdb, settings = HyperDreamBooth.from_pretrained("toon", hypernetwork=None, device="cpu"), {"steps": 2, "targets": ("unet*attn2.to_v",)}
    for seed, caption in enumerate(("a [V] face", "a [V] face and" + " face" * 40, "")):
        picture(seed).save(tmp_path / f"{seed}.png")
        (tmp_path / f"{seed}.txt").write_text(caption)
    together = dict(hdb.personalize_all(tmp_path, quiet=True, crop="center", **settings))
    for name in ("0", "2"):
        alone = hdb.personalize(picture(int(name)), quiet=True, crop="center", **settings).loras
        for path, lora in alone.items():
            mine, delta = together[name].loras[path].delta(), lora.delta()
            torch.testing.assert_close(mine, delta, atol=2e-3 * float(delta.abs().max()), rtol=0)
    assert list(together) == ["0", "2", "1"]


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_person_is_fine_tuned_where_the_caller_turned_gradients_off(hdb, off):
    """As nodes of ComfyUI and web servers do; the weights are the same, and prediction needs no gradients."""
    expected = hdb.personalize(picture(), steps=2, quiet=True)
    with off():
        opened = HyperDreamBooth.from_pretrained("toon", device="cpu")
        assert len(opened.generate("a [V] face", steps=1)) == 1
        found = opened.personalize(picture(), steps=2, quiet=True)
        assert not opened.predict(opened.read_photos(picture())[0]).requires_grad
        assert not torch.is_grad_enabled()
    for path, lora in expected.loras.items():
        assert torch.equal(found.loras[path].up, lora.up)
        assert torch.equal(found.loras[path].down, lora.down)


def test_a_mix_is_of_tokens_where_everyone_has_some_and_else_a_sum(hdb, tmp_path):
    a, b = (hdb.personalize(picture(seed), steps=0) for seed in (1, 2))
    both = hdb.mix([(a, 0.25), (b, 0.75)])
    torch.testing.assert_close(both.tokens, 0.25 * a.tokens + 0.75 * b.tokens)
    torch.testing.assert_close(hdb.mix([(a, 1.0), (b, 0.0)]).tokens, a.tokens)
    loaded = hdb.load(b.save(tmp_path / "b.safetensors", dtype=torch.float32))
    summed = hdb.mix([(a, 0.5), (loaded, 2.0)])
    path = next(iter(summed.loras))
    torch.testing.assert_close(summed.loras[path].delta(), 0.5 * a.loras[path].delta() + 2 * b.loras[path].delta(), atol=1e-5, rtol=1e-4)
    assert summed.tokens is None
    with pytest.raises(InputError, match="nobody"):
        hdb.mix([])


def test_a_lora_that_is_loaded_and_written_again_keeps_its_own_words(hdb, tmp_path):
    me = hdb.person(hdb.personalize(picture(), steps=0, quiet=True).loras, "a photo of [V] in a hat")
    again = hdb.load(me.save(tmp_path / "me.safetensors"))
    assert again.prompt == "a photo of [V] in a hat"
    header = formats.read_lora(again.save(tmp_path / "again.safetensors")).metadata
    assert (header["modelspec.trigger_phrase"], header["modelspec.title"]) == ("a photo of [V] in a hat", "again")
    words = {
        "modelspec.trigger_phrase": "sks dog",
        "modelspec.title": "My dog",
        "modelspec.description": "A good dog.",
        "modelspec.tags": "dog, pet",
        "modelspec.usage_hint": "weight 0.8",
        "ss_tag_frequency": '{"dogs": {"sks dog": 9}}',
        "ss_output_name": "dog-v2",
    }
    file = formats.save_lora(tmp_path / "dog.safetensors", me.loras, words)
    for name in ("second", "third"):
        file = hdb.load(file).save(tmp_path / f"{name}.safetensors")
        assert words | {"ss_output_name": name} == {key: formats.read_lora(file).metadata[key] for key in words}


def test_a_mix_of_loras_of_convolutions_opens_in_diffusers(tmp_path):
    one = HyperDreamBooth.from_pipeline(make("sd1"))
    layer, size = "unet.down_blocks.1.attentions.0.proj_in", 64  # a 1 x 1 convolution
    loras = LoraSet({layer: Lora(torch.randn(2, size), torch.randn(size, 2))})
    person = one.load(formats.save_lora(tmp_path / "a.safetensors", loras, {}, convolutions={layer}))
    mixed = one.mix([(person, 0.5), (person, 0.5)]).save(tmp_path / "mix.safetensors")
    one.backbone.pipe.load_lora_weights(mixed)  # raises for matrices


def test_pictures_say_how_and_by_what_they_were_made(hdb):
    data = hdb.picture_metadata("a [V] face", 7, hdb.generate_config(strength=0.5), [("me.safetensors", 0.5)])
    assert data["ai_generated"] == "true"
    assert "trainedAlgorithmicMedia" in data["XML:com.adobe.xmp"]
    settings = json.loads(data["hyperdreambooth"])
    assert (settings["prompt"], settings["seed"], settings["strength"]) == ("a [V] face", 7, 0.5)


def test_a_pipeline_that_is_loaded_already_serves_as_the_base(hdb, tiny_world):
    again = HyperDreamBooth.from_pipeline(hdb.backbone.pipe, hypernetwork=tiny_world / "hypernetwork")
    one, other = (each.personalize(picture(), steps=0, quiet=True) for each in (hdb, again))
    assert all(torch.equal(one.loras[path].up, other.loras[path].up) for path in one.loras)
    assert repr(again).count("\n") == 0
    assert "family=sd, hypernetwork=pro, device=cpu, dtype=float32" in repr(again)
    assert repr(one) == f"PersonalLora('toon', rank=1, layers={len(one.loras)}, trigger='[V]')"
    with pytest.raises(InputError, match="supported: "):
        HyperDreamBooth.from_pipeline(object())


def test_what_generate_is_given_means_something_or_is_one_sentence(hdb, capsys):
    me = hdb.personalize(picture(), steps=0, quiet=True)
    with pytest.raises(InputError, match="not a list"):
        hdb.generate("a [V] face", [me, me], steps=1)
    with pytest.raises(InputError, match="there is no prompt"):
        hdb.generate([], me)
    hdb.generate(["a face", "a [V] face"], me, steps=1)
    assert capsys.readouterr().err.count("doesn't name the person") == 1
    hdb.generate("a face", None, steps=1)
    hdb.generate("a [V] face", me, steps=1)
    assert not capsys.readouterr().err


def test_a_picture_that_is_drawn_between_two_steps_has_the_update_once(hdb):
    seen = []

    def on_step(done, loras):
        seen.append((loras, hdb.generate("a [V] face", loras, steps=2)[0].tobytes()))
        return False

    hdb.personalize(picture(), steps=2, learning_rate=0.05, quiet=True, on_step=on_step)
    for loras, drawn in seen:
        assert hdb.generate("a [V] face", loras, steps=2)[0].tobytes() == drawn
    assert seen[0][1] != seen[1][1]


def test_in_python_the_libraries_keep_their_advice_and_bars_to_themselves(capfd):
    """And what a program has set of them is as before."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity_info()
            log.enable_progress_bar()
        assert capfd.readouterr() is not None
        HyperDreamBooth.from_pretrained("toon", device="cpu")
        assert capfd.readouterr().err == ""
        for log in logs:
            assert log.get_verbosity() == log.log_levels["info"]
            assert log.is_progress_bar_enabled()
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            (log.enable_progress_bar if bars else log.disable_progress_bar)()
