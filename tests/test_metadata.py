"""The header of a LoRA file: the metadata by which UIs group, list and look up LoRAs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os

import pytest
import safetensors.torch
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open

from benchmarks.readers import sd, sdxl
from hyperdreambooth import formats
from hyperdreambooth.lora import Lora, LoraSet

from .conftest import picture, random_loras, tiny_pipe

ONE = LoraSet({"unet.a": Lora(torch.ones(2, 4), torch.ones(4, 2))})


def sd2():
    pipe = tiny_pipe("v_prediction")
    pipe.unet.register_to_config(cross_attention_dim=1024)
    return pipe


def sd3(**config):
    transformer = SD3Transformer2DModel(
        sample_size=8, num_attention_heads=1, attention_head_dim=8, caption_projection_dim=8, joint_attention_dim=8, **config
    )
    return StableDiffusion3Pipeline(transformer, sd().scheduler, None, None, None, None, None, None, None)


def flux(guidance: bool):
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8, pooled_projection_dim=8,
        guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return FluxPipeline(sd().scheduler, None, None, None, None, None, transformer)


@pytest.mark.parametrize(
    ("make", "architecture", "version", "second"),
    [
        (sd, "stable-diffusion-v1", "sd_v1", "False"),
        (sd2, "stable-diffusion-v2-768-v", "sd_v2_v", "True"),
        (sdxl, "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
        (lambda: sd3(num_layers=1), "stable-diffusion-3-medium", "sd3", "False"),
        (lambda: sd3(num_layers=1, dual_attention_layers=(0,)), "stable-diffusion-3.5-medium", "sd3", "False"),
        (lambda: sd3(num_layers=38), "stable-diffusion-3.5-large", "sd3", "False"),
        (lambda: flux(True), "flux-1-dev", "flux1", "False"),
        (lambda: flux(False), "flux-1-schnell", "flux1", "False"),
    ],
)
def test_the_base_is_named_by_what_it_is(make, architecture, version, second):
    about = formats.base_metadata(make(), "my/base", 512)
    assert about["modelspec.architecture"] == f"{architecture}/lora"
    assert about["ss_base_model_version"] == version  # A1111 groups LoRAs by these two fields
    assert about["ss_v2"] == second
    assert about["modelspec.resolution"] == "512x512"
    assert about["ss_sd_model_name"] == "my/base"


def test_a_base_whose_name_is_no_utf_8_is_named_by_escapes(tmp_path):
    name = os.fsdecode(b"b\xe4se.safetensors")
    path = formats.save_lora(tmp_path / "me.safetensors", ONE, {"ss_sd_model_name": name})
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["ss_sd_model_name"] == "b\\udce4se.safetensors"


def test_whatever_the_standard_demands_is_there(backbone, tmp_path):
    about = formats.base_metadata(backbone.pipe, "toon", 64)
    own = formats.standard_metadata(
        ONE, title="me", trigger="a [V] face", identifier="[V]", author="ann", license="CC0-1.0", thumbnail=picture(size=(600, 300))
    )
    path = formats.save_lora(tmp_path / "me.safetensors", ONE, about | own)
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
    for name in ("sai_model_spec", "architecture", "implementation", "title", "resolution", "date", "hash_sha256", "prediction_type"):
        assert header[f"modelspec.{name}"], name
    assert header["modelspec.author"] == "ann"
    assert header["modelspec.license"] == "CC0-1.0"
    assert json.loads(header["ss_tag_frequency"]) == {"hyperdreambooth": {"a [V] face": 1}}
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "2.0")
    kind, _, data = header["modelspec.thumbnail"].partition(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 128)
    assert len(data) < 40_000
    assert len(formats.describe(path)["metadata"]["modelspec.thumbnail"]) < 60  # `describe` shortens the base64 data


def test_hashes_are_of_the_tensors_as_they_lie_in_the_file(backbone, tmp_path):
    loras = random_loras(backbone, rank=160)  # the file must exceed 1 MB, the offset at which kohya's older hash starts
    about = formats.base_metadata(backbone.pipe, "toon", 64)
    path = formats.save_lora(tmp_path / "a.safetensors", loras, about, layout="kohya")
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    assert header["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert header["modelspec.hash_sha256"] == "0x" + header["sshs_model_hash"]
    bare = safetensors.torch.save(tensors, {key: value for key, value in header.items() if key.startswith("ss_")})
    assert len(bare) > 0x110000
    assert header["sshs_legacy_hash"] == hashlib.sha256(bare[0x100000:0x110000]).hexdigest()[:8]
    # a user's edits in the header must change neither hash
    again = formats.save_lora(tmp_path / "b.safetensors", loras, about | {"modelspec.author": "bob"}, layout="kohya")
    with safe_open(str(again), framework="pt") as file:
        assert file.metadata()["sshs_legacy_hash"] == header["sshs_legacy_hash"]
