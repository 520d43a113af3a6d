"""GGUF files: a quantized denoiser, with the other models from separate files."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hyperdreambooth.api import HyperDreamBooth
from hyperdreambooth.backbones import architectures, load_backbone
from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import find_targets

from . import checkpoints, families
from .checkpoints import UNET
from .conftest import picture
from .test_single_file import tiny


@pytest.fixture(params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small(family: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A small checkpoint of a family, whose architecture is taken for the published one."""
    torch.manual_seed(0)
    monkeypatch.setattr(architectures, "architecture", lambda name, vae: tiny(name))
    return checkpoints.written(tiny(family), xl=family == "sdxl")


def gguf_file(path: Path, tensors: dict[str, Any], kind: str) -> Path:
    """Writes tensors, or zeros of these shapes, as the usual converters do: matrices in the type wanted, the rest as it is."""
    gguf = pytest.importorskip("gguf")
    writer, wanted = gguf.GGUFWriter(path, "test"), gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    for name, value in tensors.items():
        shape = tuple(value.shape if isinstance(value, torch.Tensor) else value)
        numbers = math.prod(shape)
        if len(shape) > 1 and numbers % block == 0:
            if shape[-1] % block:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
                shape = (numbers // block, block)
            if isinstance(value, torch.Tensor):
                packed = gguf.quants.quantize(value.float().numpy().reshape(shape), wanted)
            else:
                packed = np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8)
            writer.add_tensor(name, packed, raw_dtype=wanted)
        else:
            writer.add_tensor(name, value.float().numpy() if isinstance(value, torch.Tensor) else np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_denoiser_trains_and_draws_with_the_rest_from_parts(small, tmp_path):
    gguf_utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    whole = checkpoints.save(tmp_path / "whole.safetensors", small)
    unet = {key.removeprefix(UNET): value for key, value in small.items() if key.startswith(UNET)}
    path = gguf_file(tmp_path / "UNET.GGUF", unet, "Q8_0")
    plain, packed = load_backbone(whole, prediction="epsilon"), load_backbone(path, prediction="epsilon", parts=[whole])
    assert find_targets(plain.components, ["unet.*to_q", "unet.*ff.net.2"]) == find_targets(
        packed.components, ["unet.*to_q", "unet.*ff.net.2"]
    )
    for key, tensor in packed.denoiser.named_parameters():
        value = gguf_utils.dequantize_gguf_tensor(tensor).float()
        torch.testing.assert_close(value, plain.denoiser.get_parameter(key), atol=0.02, rtol=0.01)
    kinds = [type(layer).__name__ for layer in packed.denoiser.modules() if isinstance(layer, nn.Linear)]
    assert kinds.count("GGUFLinear") > len(kinds) / 2
    for name in packed.text_components:  # the tiny text encoders have a vocabulary of 64 tokens
        getattr(packed.pipe, name).resize_token_embeddings(49408)
    hdb = HyperDreamBooth(packed, "base")
    me = hdb.personalize(picture(3), steps=20, crop="center", quiet=True, learning_rate=1e-2, copies=2)
    assert me.losses[-1][1] < me.losses[0][1]
    assert hdb.generate("a face", me, steps=1)[0].tobytes() != hdb.generate("a face", steps=1)[0].tobytes()


def test_a_gguf_of_flux_keeps_its_bytes(tmp_path):
    tokenizer, _ = families.t5()
    tokenizer.save_pretrained(tmp_path / "t5")
    path = gguf_file(tmp_path / "flux.gguf", checkpoints.flux(prefix=""), "Q4_0")
    parts = {"clip_l": checkpoints.clip(768, 12), "t5": checkpoints.t5(prefix=""), "ae": checkpoints.vae("flux", "")}
    files = [checkpoints.zeros(tmp_path / f"{name}.safetensors", shapes, "F8_E4M3") for name, shapes in parts.items()]
    with pytest.raises(InputError, match="lacks CLIP-L, T5"):
        load_backbone(path, parts=files[2:])
    base = load_backbone(path, parts=[*files, tmp_path / "t5"], dtype=torch.bfloat16)
    layers = [layer for layer in base.denoiser.modules() if isinstance(layer, nn.Linear)]
    stored, numbers = sum(layer.weight.nbytes for layer in layers), sum(layer.in_features * layer.out_features for layer in layers)
    assert stored < 0.6 * numbers
    assert base.denoiser.dtype == torch.bfloat16
    assert find_targets(base.components, base.default_targets)["transformer.transformer_blocks.0.attn.to_q"] == (3072, 3072)


def test_gguf_files_that_cant_be_opened_are_one_clear_error(small, tmp_path):
    unet = {key.removeprefix(UNET): value for key, value in small.items() if key.startswith(UNET)}
    valid = gguf_file(tmp_path / "whole.gguf", unet, "Q8_0").read_bytes()
    path = tmp_path / "model.gguf"
    for content in (b"", b"GGUF", b"<!DOCTYPE html>" * 99, valid[: len(valid) // 2], valid[:200]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a whole GGUF file"):
            load_backbone(path)
    with pytest.raises(InputError, match=r"lacks .*layers of its unet"):
        load_backbone(gguf_file(path, dict(list(unet.items())[:-1]), "Q8_0"), parts=[checkpoints.save(tmp_path / "a.safetensors", small)])
    with pytest.raises(InputError, match="no Stable Diffusion checkpoint"):
        load_backbone(gguf_file(path, {"enc.blk.0.attn_k.weight": (64, 64)}, "Q8_0"))
    texts = {key: value for key, value in small.items() if not key.startswith((UNET, "first_stage"))}
    rest = {key: value for key, value in small.items() if key not in texts}
    denoiser = checkpoints.save(tmp_path / "b.safetensors", rest)
    with pytest.raises(InputError, match=r"is quantized .* a denoiser may be GGUF"):
        load_backbone(denoiser, parts=[gguf_file(path, texts, "Q8_0")])
    half = load_backbone(denoiser, prediction="epsilon", parts=[gguf_file(tmp_path / "half.gguf", texts, "F16")])
    whole = load_backbone(denoiser, prediction="epsilon", parts=[checkpoints.save(tmp_path / "c.safetensors", texts)])
    for name in whole.text_components:
        for one, other in zip(half.components[name].parameters(), whole.components[name].parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match="no such file"):
        load_backbone(tmp_path / "nowhere.gguf")


def test_a_missing_reader_of_gguf_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"model\.gguf needs gguf .*pip install"):
        load_backbone(tmp_path / "model.gguf")
