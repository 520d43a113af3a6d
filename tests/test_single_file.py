"""Single-file checkpoints: what a header tells, and what is refused. Headers alone: no weights are needed for that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hyperdreambooth.assets import clip
from hyperdreambooth.backbones import load_backbone, single_file
from hyperdreambooth.backbones.original_layout import original_name
from hyperdreambooth.errors import InputError

HERE = Path("model.safetensors")


def shapes_of(family: str) -> dict[str, tuple[int, ...]]:
    """The header of a checkpoint of a family."""
    found = single_file.models(family)
    shapes: dict[str, tuple[int, ...]] = {"alphas_cumprod": (1000,)}
    for component, model in found.items():
        for name, tensor in model.state_dict().items():
            key = original_name(component, name, model.config, xl=family == "sdxl")
            shapes[key] = (3 * tensor.shape[0], *tensor.shape[1:]) if "in_proj_" in key else tuple(tensor.shape)
    return shapes


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_header_tells_the_family_and_whether_all_is_there(family):
    shapes = shapes_of(family)
    assert single_file.detect(shapes, HERE) == family
    single_file.check(shapes, single_file.models(family), HERE)
    for key in (k for k in shapes if k.endswith("conv_out.weight") or k.endswith("transformer_blocks.0.ff.net.2.weight")):
        with pytest.raises(InputError, match=f"lacks 1 layers of its (unet|vae), the first of them {key}"):
            single_file.check({k: v for k, v in shapes.items() if k != key}, single_file.models(family), HERE)
        break
    text = next(key for key in shapes if key.endswith("position_embedding.weight") or key.endswith("positional_embedding"))
    with pytest.raises(InputError, match="text_encoder"):
        single_file.check({k: v for k, v in shapes.items() if k != text}, single_file.models(family), HERE)
    with pytest.raises(InputError, match="which no base of this kind has"):
        single_file.check({**shapes, text: (3, 3)}, single_file.models(family), HERE)


def test_names_are_the_published_ones():
    """Some names of the three files as everyone knows them."""
    one, two, xl = (shapes_of(family) for family in ("sd15", "sd21", "sdxl"))
    unet = "model.diffusion_model."
    assert one[unet + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 768)
    assert one[unet + "output_blocks.11.0.skip_connection.weight"] == (320, 640, 1, 1)
    assert one[unet + "output_blocks.5.2.conv.weight"] == (1280, 1280, 3, 3)
    assert one[unet + "output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)
    assert one[unet + "input_blocks.3.0.op.weight"] == (320, 320, 3, 3)
    assert one["first_stage_model.decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert one["first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert one["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] == (49408, 768)
    assert two["cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight"] == (3072, 1024)
    assert two["cond_stage_model.model.positional_embedding"] == (77, 1024)
    assert xl["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"] == (1280,)
    assert xl["conditioner.embedders.1.model.text_projection"] == (1280, 1280)
    assert xl["conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"] == (768,)
    assert xl[unet + "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight"] == (1280, 2048)
    assert xl[unet + "label_emb.0.0.weight"] == (1280, 2816)
    # as diffusers' own detection looks for them
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES

    assert CHECKPOINT_KEY_NAMES["xl_base"] in xl
    assert CHECKPOINT_KEY_NAMES["v1"] in one
    assert two[CHECKPOINT_KEY_NAMES["v2"]][-1] == 1024


@pytest.mark.parametrize(
    ("key", "shape", "says"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", (4, 8), "is a LoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", (4, 8), "is a LoRA"),
        ("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight", (4, 8), "Stable Diffusion 3: .* Give a directory"),
        ("double_blocks.0.img_attn.qkv.weight", (4, 8), "Flux: .* Give a directory"),
        ("down_blocks.0.resnets.0.conv1.weight", (4, 8), "one model of a base"),
        ("encoder.layer.0.weight", (4, 8), "no Stable Diffusion checkpoint"),
        ("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", (768, 1280), "an SDXL refiner"),
    ],
)
def test_what_is_no_base_is_one_clear_error(tmp_path, key, shape, says):
    save_file({key: torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=says):
        load_backbone(tmp_path / "model.safetensors")


def test_inpainting_pickles_and_broken_files_are_refused(tmp_path):
    shapes = {**shapes_of("sd15"), "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}
    with pytest.raises(InputError, match="9 input channels"):
        single_file.detect(shapes, HERE)
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"only \.safetensors .* Convert it first"):
        load_backbone(tmp_path / "model.ckpt")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_backbone(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no such file"):
        load_backbone(tmp_path / "nowhere.safetensors")


def test_the_tokenizer_is_clips():
    tokenizer = clip.tokenizer()
    assert len(tokenizer) == clip.SIZE
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A  Photo, of\na cat's hat!").input_ids[1:-1] == [320, 1125, 267, 539, 320, 2368, 568, 3801, 256]
    padded = tokenizer(["x"], padding="max_length").input_ids[0]
    assert len(padded) == 77
    assert set(padded[3:]) == {49407}
    assert set(clip.tokenizer("!")(["x"], padding="max_length").input_ids[0][3:]) == {0}


def test_schedulers_are_the_published_ones():
    assert single_file.scheduler("sd15", "epsilon", zero_snr=False).config.steps_offset == 1
    assert single_file.scheduler("sd21", "v_prediction", zero_snr=False).config.prediction_type == "v_prediction"
    xl = single_file.scheduler("sdxl", "v_prediction", zero_snr=True)
    assert xl.config.rescale_betas_zero_snr
    assert xl.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("noise", [True, False])
def test_a_unet_that_was_trained_is_asked_what_it_predicts(noise):
    """Stands for a trained UNet at the last step: noise is the input, velocity is the (other) picture."""

    class Trained:
        dtype = torch.float32
        config = type("Config", (), {"cross_attention_dim": 1024})

        def __call__(self, noisy, timestep, text, return_dict):
            picture = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(5))
            alpha = 0.068
            return (noisy + alpha * picture if noise else alpha * noisy - picture,)

    assert single_file.predicts_noise(Trained()) is noise
