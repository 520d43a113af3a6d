"""Single-file checkpoints: detecting the family from the tensors, loading, and files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hyperdreambooth.assets import clip
from hyperdreambooth.backbones import architectures, load_backbone, single_file
from hyperdreambooth.backbones.single_file import components, fitted, read_header
from hyperdreambooth.errors import InputError

from . import checkpoints, families
from .checkpoints import UNET

CLIP_L, CLIP_G = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shapes(family: str) -> checkpoints.Shapes:
    return checkpoints.published(family)


def opened(path: Path) -> str:
    """The family of a file that is whole, by its header alone."""
    stored, _ = read_header(path)
    parts = components(stored)
    family = single_file.detect(parts, stored, path)
    for part, model in architectures.models_of(family, parts).values():
        fitted(part, parts[part], model, None)
    return family


def test_a_header_tells_the_family_and_whether_all_is_there(family, shapes, tmp_path):
    path = tmp_path / "model.safetensors"
    assert opened(checkpoints.zeros(path, shapes)) == family
    layer = next(key for key in shapes if key.endswith("transformer_blocks.0.ff.net.2.weight"))
    text = next(key for key in shapes if key.endswith(("position_embedding.weight", "positional_embedding")))
    for key, says in ((layer, "lacks 1 layers of its unet: .*ff.net.2.weight"), (text, "lacks 1 layers of its clip_[lhg]: .*position")):
        with pytest.raises(InputError, match=says):
            opened(checkpoints.zeros(path, {name: shape for name, shape in shapes.items() if name != key}))
    with pytest.raises(InputError, match="which no base of this kind has"):
        opened(checkpoints.zeros(path, {**shapes, text: (3, 3)}))


def test_old_names_other_prefixes_and_fp8_make_no_difference(family, shapes, tmp_path):
    renamed = {key.replace("transformer.text_model.", "transformer."): shape for key, shape in shapes.items()}
    assert opened(checkpoints.zeros(tmp_path / "OLD.SAFETENSORS", renamed, "F8_E4M3")) == family
    wrapped = {f"state_dict.{key}": shape for key, shape in shapes.items()}
    assert opened(checkpoints.zeros(tmp_path / "wrapped.sft", wrapped, "F8_E5M2")) == family
    with pytest.raises(InputError, match="is quantized"):
        opened(checkpoints.zeros(tmp_path / "int8.safetensors", shapes, "I8"))


def test_names_are_the_published_ones():
    """Some names of the three files as everyone knows them, as diffusers' own detection looks for them."""
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES

    one, two, xl = (checkpoints.published(family) for family in ("sd15", "sd21", "sdxl"))
    assert one[UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 768)
    assert one["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] == (49408, 768)
    assert two["cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight"] == (3072, 1024)
    assert xl["conditioner.embedders.1.model.text_projection"] == (1280, 1280)
    assert CHECKPOINT_KEY_NAMES["xl_base"] in xl
    assert CHECKPOINT_KEY_NAMES["v1"] in one
    assert two[CHECKPOINT_KEY_NAMES["v2"]][-1] == 1024


BOTH = {**checkpoints.clip(768, 12, CLIP_L), **checkpoints.clip(1280, 32, CLIP_G, projected=True)}


@pytest.mark.parametrize(
    ("family", "denoiser"),
    [
        ("sd3", checkpoints.sd3(24, 192)),
        ("sd3", checkpoints.sd3(24, 384, 13, normed=True)),
        ("sd3", checkpoints.sd3(38, 192, prefix="", normed=True)),
        ("flux", checkpoints.flux()),
        ("flux", checkpoints.flux(2, 3, prefix="", guided=False)),
    ],
)
def test_headers_of_sd3_and_flux(family, denoiser, tmp_path):
    whole = {**denoiser, **checkpoints.vae(family, "vae."), **BOTH, **checkpoints.t5(2)}
    assert opened(checkpoints.zeros(tmp_path / "model.safetensors", whole, "BF16")) == family
    layer = next(key for key in whole if key.endswith(("img_mlp.0.weight", "mlp.fc1.weight")) and "blocks" in key)
    with pytest.raises(InputError, match=f"lacks layers of its {family}"):
        opened(checkpoints.zeros(tmp_path / "less.safetensors", {key: shape for key, shape in whole.items() if key != layer}))


def tiny(family: str) -> nn.ModuleDict:
    """Small random models with the widths that tell the family."""
    widths = {"sd15": (768,), "sd21": (1024,), "sdxl": (768, 1280)}[family]
    heads: dict[str, Any] = {"attention_head_dim": 4} if family == "sd15" else {"attention_head_dim": (2, 4), "use_linear_projection": True}
    if family == "sdxl":
        heads |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 1280}
    found: dict[str, nn.Module] = {"unet": families.unet(sum(widths), **heads), "vae": families.autoencoder()}
    for index, width in enumerate(widths):
        config = CLIPTextConfig(
            vocab_size=64, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=width
        )
        found["text_encoder_2" if index else "text_encoder"] = (CLIPTextModelWithProjection if index else CLIPTextModel)(config)
    return nn.ModuleDict(found)


@pytest.fixture
def small(family: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A small checkpoint of a family, whose architecture is taken for the published one."""
    torch.manual_seed(0)
    models = tiny(family)
    monkeypatch.setattr(architectures, "architecture", lambda name, vae: tiny(name))
    return checkpoints.written(models, xl=family == "sdxl")


def same(pipe: Any, family: str, dtype: torch.dtype) -> bool:
    torch.manual_seed(0)
    return all(
        torch.equal(pipe.components[name].state_dict()[key], tensor.to(dtype).float())
        for name, model in tiny(family).items()
        for key, tensor in model.state_dict().items()
    )


def test_small_files_open_as_the_very_numbers(family, small, tmp_path):
    base = load_backbone(checkpoints.save(tmp_path / "model.safetensors", small))
    assert same(base.pipe, family, torch.float16)
    assert base.pipe.scheduler.config.prediction_type == ("v_prediction" if family == "sd21" else "epsilon")
    assert base.pipe.name_or_path == str(tmp_path / "model.safetensors")
    eighth = load_backbone(checkpoints.save(tmp_path / "fp8.SFT", small, torch.float8_e4m3fn))
    assert same(eighth.pipe, family, torch.float8_e4m3fn)


def test_scaled_fp8_is_scaled(small, tmp_path):
    name = next(key for key in small if key.endswith("attn1.to_q.weight"))
    scaled = {
        **small,
        name: small[name] / 4,
        f"{name.removesuffix('weight')}scale_weight": torch.tensor(4.0),
        f"{UNET}scaled_fp8": torch.zeros(2),
    }
    found, plain = (load_backbone(checkpoints.save(tmp_path / f"{n}.safetensors", t)).pipe.unet for n, t in enumerate((scaled, small)))
    for one, other in zip(found.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)


def test_what_it_predicts_is_said_by_the_user_the_header_a_tensor_or_a_file_beside_it(small, tmp_path):
    path = tmp_path / "model.safetensors"

    def kind(**more: str) -> str:
        return str(load_backbone(path, **more).pipe.scheduler.config.prediction_type)

    checkpoints.save(path, {**small, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    config = load_backbone(path).pipe.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr, config.timestep_spacing) == ("v_prediction", True, "trailing")
    assert kind(prediction="epsilon") == "epsilon"
    checkpoints.save(path, small, metadata={"modelspec.prediction_type": "edm"})
    assert kind(prediction="epsilon") == "epsilon"
    with pytest.raises(InputError, match=r"says that it predicts edm.*give --prediction"):
        kind()
    checkpoints.save(path, small, metadata={"modelspec.prediction_type": "v"})
    assert kind() == "v_prediction"
    checkpoints.save(path, small)
    (tmp_path / "model.yaml").write_text("model:\n  params:\n    parameterization: v\n")
    assert kind() == "v_prediction"
    (tmp_path / "model.yaml").write_text("model:\n  params:\n    linear_start: 0.00085\n")
    assert kind() == "epsilon"
    (tmp_path / "model.yaml").write_text("- nothing\n")
    with pytest.raises(InputError, match="is no config of one"):
        kind()


ODD: dict[str, tuple[Any, str]] = {
    "scales that are divided by": (lambda q: {"weight_scale_inv": torch.tensor(4.0)}, "is quantized .*weight_scale_inv"),
    "a scale for each block": (lambda q: {"weight_scale": torch.ones(len(q), 4)}, r"is quantized .*weight_scale "),
    "half a byte a weight": (lambda q: {"weight": torch.ones(len(q), 1, dtype=torch.uint8)}, r"is quantized .*stored as U8"),
    "an adapter in it": (lambda q: {"gate.weight": torch.ones(3, 3)}, "has 9 numbers in its unet that no base of this kind has"),
    "places": (lambda q: {"fuser.linear.weight": torch.ones(3, 3)}, "is GLIGEN"),
}


@pytest.mark.parametrize("family", ["sd15"])
@pytest.mark.parametrize("what", list(ODD))
def test_nothing_of_a_denoiser_is_left_out_or_misread(what, small, tmp_path):
    layer = next(key for key in small if key.endswith("attn1.to_q.weight")).removesuffix("weight")
    tensors = {**small, f"{layer}weight": small[f"{layer}weight"].to(torch.float8_e4m3fn)}
    more, says = ODD[what]
    tensors |= {layer + name: value for name, value in more(small[f"{layer}weight"]).items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=says):
        load_backbone(tmp_path / "model.safetensors", prediction="epsilon")


@pytest.mark.parametrize("family", ["sd15"])
def test_a_file_is_what_is_in_it_and_parts_replace_its_own(small, tmp_path):
    tensors = {**small, "model_ema.decay": torch.ones(1)}
    path = checkpoints.save(tmp_path / "model.ckpt", tensors)
    assert same(load_backbone(path, prediction="epsilon").pipe, "sd15", torch.float16)
    other = {key.removeprefix("first_stage_model."): 2 * value for key, value in small.items() if key.startswith("first_stage_model.")}
    vae = checkpoints.save(tmp_path / "vae.safetensors", other)
    found = load_backbone(path, prediction="epsilon", parts=[vae]).pipe.vae.encoder.conv_in.bias
    torch.testing.assert_close(found, 2 * small["first_stage_model.encoder.conv_in.bias"], atol=1e-3, rtol=1e-2)
    for wrong in ({"decoder.mid_block.x.weight": torch.ones(1)}, {"lora_unet_x.lora_up.weight": torch.ones(1, 1)}):
        with pytest.raises(InputError, match=r"--parts .*holds no text encoder or autoencoder by the names"):
            load_backbone(path, parts=[checkpoints.save(tmp_path / "wrong.safetensors", wrong)])


def test_a_denoiser_alone_takes_the_rest_from_parts(family, small, tmp_path):
    bare = {key.removeprefix(UNET): tensor for key, tensor in small.items() if key.startswith(UNET)}
    path = checkpoints.save(tmp_path / "unet.safetensors", bare)
    with pytest.raises(InputError, match=r"lacks the autoencoder, CLIP-.* as --parts"):
        load_backbone(path)
    rest = checkpoints.save(tmp_path / "rest.safetensors", {key: t for key, t in small.items() if not key.startswith(UNET)})
    whole = load_backbone(path, parts=[rest]).pipe
    assert same(whole, family, torch.float16)
    whole.save_pretrained(tmp_path / "directory")
    assert same(load_backbone(path, parts=[tmp_path / "directory"]).pipe, family, torch.float16)
    with pytest.raises(InputError, match="there is no such file, and no directory that holds"):
        load_backbone(path, parts=[tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"holds .* alone, without a denoiser"):
        load_backbone(rest)


@pytest.fixture
def offline(monkeypatch):
    """The hub can't be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_sd3_opens_with_the_text_encoders_that_it_has(tmp_path, offline):
    tokenizer, _ = families.t5()
    tokenizer.save_pretrained(tmp_path / "t5")
    shapes = {**checkpoints.sd3(dual=1, normed=True), **checkpoints.vae("sd3"), **checkpoints.t5()}
    path = checkpoints.zeros(tmp_path / "sd3.safetensors", shapes)
    base = load_backbone(path, parts=[tmp_path / "t5"])
    assert base.family == "sd3"
    assert base.pipe.text_encoder is None
    with torch.no_grad():
        prompt = base.encode_prompts(["a face"])
        latents = torch.randn(1, *base.latent_shape(64, 64))
        assert base.predict(latents, torch.tensor([500.0]), prompt).shape == latents.shape
    with pytest.raises(InputError, match="no text encoder at all"):
        load_backbone(path)


def test_flux_alone_with_parts(tmp_path, offline):
    tokenizer, _ = families.t5()
    tokenizer.save_pretrained(tmp_path / "t5")
    path = checkpoints.zeros(tmp_path / "flux.sft", checkpoints.flux(prefix=""), "F8_E4M3")
    clip_l = checkpoints.zeros(tmp_path / "clip_l.safetensors", checkpoints.clip(768, 12))
    t5 = checkpoints.zeros(tmp_path / "t5.safetensors", checkpoints.t5(prefix=""), "F8_E4M3")
    vae = checkpoints.zeros(tmp_path / "ae.safetensors", checkpoints.vae("flux", ""))
    with pytest.raises(InputError, match=r"lacks CLIP-L\. Give files"):
        load_backbone(path, parts=[vae, t5])
    with pytest.raises(InputError, match="T5's tokenizer is neither shipped nor"):
        load_backbone(path, parts=[vae, t5, clip_l])
    base = load_backbone(path, parts=[vae, t5, clip_l, tmp_path / "t5"], dtype=torch.bfloat16)
    assert base.family == "flux"
    assert base.distilled
    assert base.pipe.scheduler.config.use_dynamic_shifting


FLUX, SD15 = checkpoints.flux(prefix=""), {f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 768)}
REFUSED: list[tuple[checkpoints.Shapes, str]] = [
    ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)}, "is a LoRA"),
    ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 8)}, "is a LoRA"),
    ({"lycoris_unet_mid.hada_w1_a": (4, 8)}, "is a LyCORIS"),
    ({"down_blocks.0.resnets.0.conv1.weight": (4, 8)}, "one model of a base"),
    ({"encoder.layer.0.weight": (4, 8)}, "no Stable Diffusion checkpoint"),
    ({"head.modulation": (1, 2, 1536), "patch_embedding.weight": (1536, 16, 1, 2, 2)}, "it is wan"),
    ({f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280)}, "an SDXL refiner"),
    ({**SD15, f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting model, of 9 input channels"),
    ({**SD15, f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)}, "for editing, of 8 input channels"),
    ({**SD15, f"{UNET}input_blocks.0.0.weight": (320, 5, 3, 3)}, "depth-to-image"),
    ({**FLUX, "img_in.weight": (3072, 384)}, "Flux Fill"),
    ({**FLUX, "img_in.weight": (3072, 128)}, "for editing, of 32"),
    ({**FLUX, "distilled_guidance_layer.in_proj.bias": (3,)}, "is Chroma"),
    ({**SD15, "edm_mean": (1,), "edm_std": (1,)}, "is Playground 2.5"),
    ({**SD15, "edm_vpred.sigma_max": (1,)}, "CosXL"),
    ({**SD15, f"{UNET}time_embed.cond_proj.weight": (320, 256)}, "distilled for a few steps"),
    ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a ControlNet"),
    ({"controlnet_blocks.0.weight": (4, 8), "transformer_blocks.0.attn.to_q.weight": (4, 8)}, "a ControlNet"),
    ({"emb_params": (4, 768)}, "a Textual Inversion"),
    ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "a Textual Inversion"),
    ({"decoder.mid.block_1.conv1.weight": (512, 512, 3, 3)}, "holds the autoencoder alone"),
    ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}, "holds CLIP-L alone"),
]


@pytest.mark.parametrize(("shapes", "says"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_is_no_base_is_one_clear_error(tmp_path, shapes, says):
    path = checkpoints.zeros(tmp_path / "model.safetensors", shapes)
    with pytest.raises(InputError, match=says):
        load_backbone(path)


def test_pickles_and_broken_files_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"only \.safetensors .* Convert it first"):
        load_backbone(tmp_path / "model.ckpt")
    whole = checkpoints.zeros(tmp_path / "whole.safetensors", SD15).read_bytes()
    for content in (b"no", b"", whole[:-1], whole[:20], b"<!DOCTYPE html><html>" + b" " * 99):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="not a whole safetensors file"):
            load_backbone(tmp_path / "model.safetensors")
    for name in ("nowhere.safetensors", "nowhere.SFT"):
        with pytest.raises(InputError, match="no such file"):
            load_backbone(tmp_path / name)


def test_the_tokenizer_is_clips():
    tokenizer = clip.tokenizer()
    assert len(tokenizer) == 49_408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A  Photo, of\na cat's hat!").input_ids[1:-1] == [320, 1125, 267, 539, 320, 2368, 568, 3801, 256]
    padded = tokenizer(["x"], padding="max_length").input_ids[0]
    assert len(padded) == 77
    assert set(padded[3:]) == {49407}
    assert set(clip.tokenizer("!")(["x"], padding="max_length").input_ids[0][3:]) == {0}


def test_schedulers_are_the_published_ones():
    assert architectures.scheduler("sd15", "epsilon", zero_snr=False).config.steps_offset == 1
    assert architectures.scheduler("sd21", "v_prediction", zero_snr=False).config.prediction_type == "v_prediction"
    xl = architectures.scheduler("sdxl", "v_prediction", zero_snr=True)
    assert xl.config.rescale_betas_zero_snr
    assert xl.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("noise", [True, False])
def test_a_unet_that_was_trained_is_asked_what_it_predicts(noise):
    """Stands for a trained UNet at the last step: noise is the input, velocity is the (other) picture."""

    class Trained:
        dtype = torch.float32
        config = type("Config", (), {"cross_attention_dim": 1024})

        def __call__(self, noisy, timestep, text, return_dict):
            picture = torch.randn(noisy.shape[1:], generator=torch.Generator().manual_seed(5))
            alpha = 0.068
            return (noisy + alpha * picture if noise else alpha * noisy - picture,)

    assert single_file.predicts(Trained()) == ("epsilon" if noise else "v_prediction")


def test_a_unet_that_was_trained_on_velocity_is_told_from_a_random_one(monkeypatch):
    base = load_backbone("toon")
    drawn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **more: drawn(1, *base.latent_shape(), **more))
    assert single_file.predicts(base.denoiser) == "v_prediction"
    torch.manual_seed(0)
    assert single_file.predicts(type(base.denoiser).from_config(base.denoiser.config)) is None
