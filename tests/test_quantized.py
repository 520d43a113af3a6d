"""Quantized bases: their size, their accuracy, and that all stages work on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5EncoderModel

from hyperdreambooth import cli
from hyperdreambooth.api import HyperDreamBooth
from hyperdreambooth.backbones import Backbone, load_backbone, wrap
from hyperdreambooth.backbones.quantized import quantized
from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import Hooks, applied, can_be_added_to, find_targets, mergeable
from hyperdreambooth.sampling import noise_for

from . import families
from .conftest import picture, random_loras

BITS = {"nf4": 4.6, "int8": 8.6}
"""Bits a weight, at most, of layers as small as these, whose scales weigh more."""


def weigh(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def linear(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def predicted(base: Backbone, loras: Any = None) -> torch.Tensor:
    noise = noise_for(base, [1, 2])
    with torch.no_grad(), applied(base.components, loras or {}):
        return base.predict(noise, base.steps_for(torch.tensor([0.4, 0.6])), base.encode_prompts(["a face", "a hat"]))


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).norm() / right.norm()).item()


@pytest.fixture(params=["sd1", "sdxl", "sd3.5", "flux-dev"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    families.make(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=list(BITS))
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("bitsandbytes")
    return str(request.param)


def hdb(folder: Path, kind: str | None) -> HyperDreamBooth:
    made = HyperDreamBooth.from_pretrained(folder, device="cpu", quantize=kind)
    if made.backbone.family == "flux":
        made.backbone.size = 64  # the picture size of tests/families.py
    return made


def test_a_base_quantized_while_it_is_opened_weighs_less_and_predicts_nearly_the_same(folder, kind):
    plain, small = hdb(folder, None).backbone, hdb(folder, kind).backbone
    assert find_targets(plain.components, plain.default_targets) == find_targets(small.components, small.default_targets)
    count = sum(layer.weight.numel() for layer in linear(plain.denoiser))
    saved = weigh(plain.denoiser) - weigh(small.denoiser)
    assert saved >= count * (4 - BITS[kind] / 8)
    near = distance(predicted(small), predicted(plain))
    assert 0 < near < (0.3 if kind == "nf4" else 0.05)
    again = hdb(folder, kind).backbone
    torch.testing.assert_close(predicted(again), predicted(small))


def test_an_update_is_added_beside_quantized_weights_and_never_to_them(folder, kind):
    plain, small = hdb(folder, None).backbone, hdb(folder, kind).backbone
    loras = random_loras(plain).scaled(0.3)
    assert mergeable(plain.components, loras)
    assert not mergeable(small.components, loras)
    with Hooks(small.components, loras) as hooks:
        assert set(hooks.dtypes.values()) == {torch.float32}
    theirs, ours = (predicted(base, loras) - predicted(base) for base in (plain, small))
    assert distance(ours, theirs) < (0.6 if kind == "nf4" else 0.3)


def test_personalize_generate_and_export_on_a_quantized_base(folder, kind, tmp_path):
    mine = hdb(folder, kind)
    before = [layer.weight.clone() for layer in linear(mine.backbone.denoiser)]
    mine.backbone.denoiser.enable_gradient_checkpointing()
    settings = {"steps": 30, "crop": "center", "quiet": True, "learning_rate": 1e-2, "copies": 2}
    me = mine.personalize(picture(3), **settings)
    first, last = (sum(loss for _, loss in part) for part in (me.losses[:2], me.losses[-2:]))
    assert last < 0.97 * first
    me.save(tmp_path / "me.safetensors")
    drawn = [mine.generate("a [V] face", who, steps=2, seed=1)[0].tobytes() for who in (None, me, tmp_path / "me.safetensors", None)]
    assert drawn[0] == drawn[3]
    assert len(set(drawn[:2])) == 2
    assert all(torch.equal(layer.weight, old) for layer, old in zip(linear(mine.backbone.denoiser), before, strict=True))
    # the file is an ordinary LoRA, which the same base in full precision can load
    assert hdb(folder, None).load(tmp_path / "me.safetensors").loras.shapes() == me.loras.shapes()


def test_t5_keeps_what_its_library_keeps(kind, capsys):
    pipe = quantized(families.make("flux-dev"), kind, "cpu")
    feed = pipe.text_encoder_2.encoder.block[0].layer[1].DenseReluDense
    assert can_be_added_to(feed.wo.weight)
    assert not can_be_added_to(feed.wi.weight)
    assert all(can_be_added_to(layer.weight) for layer in linear(pipe.text_encoder))
    assert all(can_be_added_to(weight) for weight in pipe.vae.parameters())
    before = weigh(pipe.transformer)
    assert weigh(quantized(pipe, kind, "cpu").transformer) == before
    assert "transformer is quantized already" in capsys.readouterr().err


def save_quantized(folder: Path, kind: str) -> torch.Tensor:
    """Writes a base's denoiser as diffusers does with one that bitsandbytes quantized; returns what it predicts."""
    base = hdb(folder, None).backbone
    quantized(SimpleNamespace(components={base.denoiser_name: base.denoiser}), kind, "cpu")
    found, small = predicted(base), base.denoiser
    name = base.denoiser_name
    small.save_pretrained(folder / name)
    config = json.loads((folder / name / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": kind == "nf4", "load_in_8bit": kind == "int8"}
    config["quantization_config"] |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": True}
    (folder / name / "config.json").write_text(json.dumps(config))
    return found


def test_a_base_that_was_saved_quantized_opens_as_it_is(folder, kind, monkeypatch):
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    expected = save_quantized(folder, kind)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="A GPU is needed"):
            load_backbone(folder)
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):  # diffusers requires a GPU, although bitsandbytes doesn't
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})
    opened = hdb(folder, None).backbone
    torch.testing.assert_close(predicted(opened), expected)
    assert not mergeable(opened.components, random_loras(opened))
    again = hdb(folder, kind).backbone
    assert weigh(again.denoiser) == weigh(opened.denoiser)
    texts = [
        [model for name, model in base.pipe.components.items() if name.startswith("text") and model is not None] for base in (opened, again)
    ]
    assert (sum(map(weigh, texts[0])) > sum(map(weigh, texts[1]))) == any(isinstance(model, T5EncoderModel) for model in texts[0])


def test_a_base_that_torchao_quantized_opens_trains_and_draws(folder):
    torchao = pytest.importorskip("torchao.quantization")
    import diffusers

    name = "unet" if (folder / "unet").is_dir() else "transformer"
    kind = getattr(diffusers, json.loads((folder / name / "config.json").read_text())["_class_name"])
    config = diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    plain = predicted(hdb(folder, None).backbone)
    kind.from_pretrained(folder / name, quantization_config=config, torch_dtype=torch.float32).save_pretrained(folder / name)
    mine = hdb(folder, None)
    assert 0 < distance(predicted(mine.backbone), plain) < 0.05
    assert not mergeable(mine.backbone.components, random_loras(mine.backbone))
    me = mine.personalize(picture(3), steps=20, crop="center", quiet=True, learning_rate=1e-2)
    assert me.losses[-1][1] < me.losses[0][1]
    assert mine.generate("a [V] face", me, steps=1)[0].tobytes() != mine.generate("a [V] face", steps=1)[0].tobytes()


def test_a_missing_library_is_named_with_what_installs_it(folder, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(InputError, match=r"--quantize nf4 needs bitsandbytes .*pip install"):
            load_backbone(folder, quantize="nf4")
        component = folder / ("unet" if (folder / "unet").is_dir() else "transformer")
        config = json.loads((component / "config.json").read_text())
        (component / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
        with pytest.raises(InputError, match=rf"{component.name}, which is quantized, needs bitsandbytes .*pip install"):
            load_backbone(folder)


def test_the_command_line_quantizes(kind, tmp_path, capsys):
    families.make("sd1").save_pretrained(tmp_path / "base")
    args = ["generate", "a face", "--base", str(tmp_path / "base"), "--steps", "2", "--seed", "3", "--device", "cpu"]
    for name, more in (("plain", []), ("small", ["--quantize", kind])):
        assert cli.main([*args, "-o", str(tmp_path / name), *more]) == 0
    plain, small = (next((tmp_path / name).glob("*.png")).read_bytes() for name in ("plain", "small"))
    assert plain != small
    with pytest.raises(SystemExit):
        cli.main([*args, "-o", str(tmp_path / "other"), "--quantize", "int3"])


def test_the_precision_of_an_update_beside_quantized_weights_is_the_bases(kind):
    base = wrap(quantized(families.make("sd1").to(torch.bfloat16), kind, "cpu"), "base")
    with Hooks(base.components, random_loras(base)) as hooks:
        assert set(hooks.dtypes.values()) == {torch.bfloat16}
    assert base.denoiser.dtype == torch.bfloat16
    assert predicted(base).isfinite().all()
