"""LoRA files in the readers of other libraries, and the token file."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hyperdreambooth import formats, header
from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import Lora, LoraSet, Shape, applied
from hyperdreambooth.trainable_lora import LightweightLora
from hyperdreambooth.training_settings import LightweightConfig

from .conftest import conditioning, random_loras, tiny_pipe

TEXT = "text_encoder*_proj"


def same(a: LoraSet, b: LoraSet, tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for path in a:
        torch.testing.assert_close(a[path].delta(), b[path].delta(), atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip(backbone, tmp_path, layout, dtype):
    loras = random_loras(backbone, patterns=(*backbone.default_targets, TEXT))
    path = formats.save_lora(tmp_path / "a.safetensors", loras, {"note": "kept"}, layout=layout, dtype=dtype)
    file = formats.read_lora(path, backbone.components)
    same(file.loras, loras, 1e-5 if dtype == torch.float32 else 1e-2)
    assert file.metadata["note"] == "kept"
    assert file.layout == layout
    keys = load_file(path)
    assert all(key.count("text_model") == (1 if key.startswith(("text", "lora_te")) else 0) for key in keys)
    if layout == "kohya":
        assert all(key.startswith(("lora_unet_", "lora_te_text_model_")) for key in keys)
        assert all(value.item() == 2 for key, value in keys.items() if key.endswith(".alpha"))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_mixed_ranks_are_written_as_one(backbone, tmp_path, layout):
    """Older readers scale a file of mixed ranks by its first layer's."""
    loras = random_loras(backbone, rank=1)
    loras = LoraSet({**loras, **{path: lora for path, lora in random_loras(backbone, rank=3).items() if "mid_block" in path}})
    assert {lora.rank for lora in loras.values()} == {1, 3}
    path = formats.save_lora(tmp_path / "a.safetensors", loras, {}, layout=layout, dtype=torch.float32)
    down = ("lora_A.weight", "lora_down.weight")
    assert {value.shape[0] for key, value in load_file(path).items() if key.endswith(down)} == {3}
    same(formats.read_lora(path, backbone.components).loras, loras)
    about = formats.describe(path)
    assert about["rank"] == 3
    if layout == "diffusers":
        assert about["fingerprint"] == about["metadata"]["hyperdreambooth.fingerprint"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_what_is_in_a_file_is_the_same_with_torch_and_without(backbone, tmp_path, dtype, monkeypatch):
    loras = random_loras(backbone, rank=2, patterns=(TEXT, *backbone.default_targets))
    path = formats.save_lora(tmp_path / "a.safetensors", loras, {"modelspec.trigger_phrase": "a [V] face"}, dtype=dtype)
    quick = header.describe(path)
    assert (quick is None) == (dtype == torch.bfloat16)  # numpy has no bfloat16
    monkeypatch.setattr(header, "describe", lambda _: None)
    whole = formats.describe(path)
    assert whole["components"].startswith("text_encoder ")
    assert whole == (quick or whole)
    tensors = load_file(path)
    damaged = {**tensors, next(iter(tensors)): next(iter(tensors.values())) * torch.nan}, dict(list(tensors.items())[1:])
    monkeypatch.undo()
    for content in damaged:  # the quick reader returns None, and the full reader reports the error
        save_file(content, path)
        assert header.describe(path) is None
        with pytest.raises(InputError):
            formats.describe(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_file_in_fp8_is_described(backbone, tmp_path, dtype):
    path = formats.save_lora(tmp_path / "a.safetensors", random_loras(backbone, rank=2), {})
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    assert formats.describe(path)["rank"] == 2


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_opens_it_and_text_encoder_output_is_the_hooks(backbone, tmp_path, layout):
    loras = random_loras(backbone, patterns=(TEXT,))
    path = formats.save_lora(tmp_path / "a.safetensors", loras, {}, layout=layout, dtype=torch.float32)
    pipe = tiny_pipe()
    pipe.load_lora_weights(str(path))
    tokens = pipe.tokenizer(["a [V] face"], padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipe.text_encoder(tokens)[0]
        with applied(backbone.components, loras):
            found = backbone.encode_prompts(["a [V] face"])["encoder_hidden_states"]
        plain = backbone.encode_prompts(["a [V] face"])["encoder_hidden_states"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found - plain).abs().max() > 1e-3


def test_personal_and_style_with_weights_equal_the_sum(backbone, tmp_path):
    person, style = random_loras(backbone, seed=1), random_loras(backbone, rank=3, seed=2)
    for name, loras in (("me", person), ("style", style)):
        formats.save_lora(tmp_path / f"{name}.safetensors", loras, {}, dtype=torch.float32)
    pipe = tiny_pipe()
    pipe.load_lora_weights(str(tmp_path / "me.safetensors"), adapter_name="me")
    pipe.load_lora_weights(str(tmp_path / "style.safetensors"), adapter_name="style")
    pipe.set_adapters(["me", "style"], [1.0, 0.7])
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([400, 400]), conditioning(backbone, 2)
    with torch.no_grad():
        expected = pipe.unet(x, t, **cond).sample
        with applied(backbone.components, person + style.scaled(0.7)):
            found = backbone.predict(x, t, cond)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)


def test_hooks_stack_on_a_peft_adapter(backbone, tmp_path):
    from hyperdreambooth.backbones import StableDiffusion

    person, style = random_loras(backbone, seed=1), random_loras(backbone, seed=2)
    path = formats.save_lora(tmp_path / "style.safetensors", style, {}, dtype=torch.float32)
    pipe = tiny_pipe()
    pipe.load_lora_weights(str(path))
    stacked = StableDiffusion(pipe)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([400, 400]), conditioning(backbone, 2)
    with torch.no_grad():
        with applied(stacked.components, person):
            found = stacked.predict(x, t, cond)
        with applied(backbone.components, person + style):
            expected = backbone.predict(x, t, cond)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)


def test_pefts_own_files_are_read(tmp_path):
    pipe = tiny_pipe()
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_out.0"], init_lora_weights=False), pipe.unet)
    state = get_peft_model_state_dict(pipe.unet)
    save_file({f"base_model.model.{key}": value.contiguous() for key, value in state.items()}, tmp_path / "peft.safetensors")
    file = formats.read_lora(tmp_path / "peft.safetensors")
    modules = dict(pipe.unet.named_modules())
    for path, lora in file.loras.items():
        module = modules[path.removeprefix("unet.")]
        torch.testing.assert_close(lora.delta(), module.get_delta_weight("default"), atol=1e-6, rtol=1e-4)
    assert len(file.loras) == len(state) // 2


def test_older_layouts_and_mixed_alphas(backbone, tmp_path):
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    names = {
        f"{layer}.processor.to_q_lora": f"{layer}.to_q",
        f"{layer}.processor.to_out_lora": f"{layer}.to_out.0",
    }
    save_file(
        {f"{old}.{side}.weight": t for old in names for side, t in (("down", down.clone()), ("up", up.clone()))},
        tmp_path / "old.safetensors",
    )
    found = formats.read_lora(tmp_path / "old.safetensors").loras
    assert set(found) == set(names.values())
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "kohya.safetensors"
    )
    scaled = formats.read_lora(tmp_path / "kohya.safetensors", backbone.components).loras
    torch.testing.assert_close(scaled[f"{layer}.to_q"].delta(), 0.5 * up @ down)


MID = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LOW_RANK = {f"unet.{MID}.lora_A.weight": torch.ones(1, 64), f"unet.{MID}.lora_B.weight": torch.ones(64, 1)}


def bad(tmp_path, tensors):
    save_file(tensors, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"unet.{MID}.lora_A.weight": torch.ones(1, 64)}, "no up matrix"),
        ({f"unet.{MID}.lora_magnitude_vector": torch.ones(64), **LOW_RANK}, "DoRA.*generate --style"),
        ({f"unet.{MID}.hada_w1_a": torch.ones(64, 2)}, "no hada_w1_b"),
        ({f"extra{i}": torch.ones(1) for i in range(5)} | LOW_RANK, "extra0, extra1, extra2 and 2 more: of no LoRA layout"),
        ({"model.diffusion_model.input_blocks.0.weight": torch.ones(2)}, "no LoRA but a whole checkpoint: it holds model.diffusion_model"),
        ({"unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(32, 1, 1, 1)}, "convolution"),
        ({"lora_unet_nowhere.lora_down.weight": torch.ones(1, 2), "lora_unet_nowhere.lora_up.weight": torch.ones(2, 1)}, "another base"),
    ],
)
def test_what_is_no_lora_is_one_error_that_names_it(backbone, tmp_path, tensors, says):
    with pytest.raises(InputError, match=says):
        formats.read_lora(bad(tmp_path, tensors), backbone.components)


def test_truncated_missing_and_existing_files_raise(backbone, tmp_path):
    path = formats.save_lora(tmp_path / "a.safetensors", random_loras(backbone), {})
    with pytest.raises(InputError, match="--overwrite"):
        formats.save_lora(path, random_loras(backbone), {})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="not a whole safetensors"):
        formats.read_lora(path)
    with pytest.raises(InputError, match="no such file"):
        formats.read_lora(tmp_path / "none.safetensors")


def test_an_update_that_overflows_fp16_raises(tmp_path):
    with pytest.raises(InputError, match="doesn't fit"):
        formats.save_lora(tmp_path / "a.safetensors", LoraSet({"unet.a": Lora(torch.full((1, 2), 1e6), torch.ones(2, 1))}), {})
    assert not list(tmp_path.iterdir())


def test_metadata_is_what_uis_read(backbone, tmp_path):
    loras = random_loras(backbone)
    about = formats.base_metadata(backbone.pipe, "toon", 64)
    metadata = about | formats.standard_metadata(loras, title="me", trigger="a [V] face", identifier="[V]")
    path = formats.save_lora(tmp_path / "me.safetensors", loras, metadata)
    about = formats.describe(path)
    assert about["trigger"] == "a [V] face"
    assert about["base"] == "toon"
    assert about["rank"] == 2
    assert about["layers"] == len(loras)
    assert json.loads(about["metadata"]["ss_tag_frequency"])
    assert about["metadata"]["ss_network_module"] == "networks.lora"
    assert about["fingerprint"] == about["metadata"]["hyperdreambooth.fingerprint"]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8 / 2**0.5)])
def test_alphas_in_the_header_are_folded_in_as_diffusers_does(backbone, tmp_path, rslora, scale):
    pipe = tiny_pipe()
    config = LoraConfig(
        r=2, lora_alpha=8, alpha_pattern={"attn2.to_k": 6}, use_rslora=rslora, target_modules=["to_q", "to_k"], init_lora_weights=False
    )
    pipe.unet.add_adapter(config)
    names = ("r", "lora_alpha", "alpha_pattern", "use_rslora", "target_modules")
    header = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items() if name in names}
    state = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=header)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    file = formats.read_lora(path, backbone.components)
    reader = tiny_pipe()
    reader.load_lora_weights(str(path))
    theirs = dict(reader.unet.named_modules())
    for layer, lora in file.loras.items():
        torch.testing.assert_close(lora.delta(), theirs[layer.removeprefix("unet.")].get_delta_weight("default_0"), atol=1e-5, rtol=1e-4)
    raw = state[f"{MID}.lora_B.weight"] @ state[f"{MID}.lora_A.weight"]
    torch.testing.assert_close(file.loras[f"unet.{MID}"].delta(), raw * scale)
    # a saved copy must be the same update in every reader
    copy = formats.save_lora(tmp_path / "copy.safetensors", file.loras, file.metadata, dtype=torch.float32)
    same(formats.read_lora(copy, backbone.components).loras, file.loras)


def test_a_folder_that_peft_saved_is_scaled_and_its_adapter_may_have_a_name(tmp_path):
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    tensors = {f"base_model.model.{MID}.lora_A.me.weight": down, f"base_model.model.{MID}.lora_B.me.weight": up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 2, "alpha_pattern": {}}')
    torch.testing.assert_close(formats.read_lora(tmp_path / "adapter_model.safetensors").loras[f"unet.{MID}"].delta(), 3 * up @ down)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(InputError, match="scale is unknown"):
        formats.read_lora(tmp_path / "adapter_model.safetensors")


def test_the_oldest_text_encoder_names(tmp_path):
    layer = "text_encoder.text_model.encoder.layers.0.self_attn"
    pairs = {"to_q_lora": "q_proj", "to_out_lora": "out_proj"}
    save_file(
        {f"{layer}.{old}.{side}.weight": torch.ones(shape) for old in pairs for side, shape in (("down", (2, 32)), ("up", (32, 2)))},
        tmp_path / "old.safetensors",
    )
    assert set(formats.read_lora(tmp_path / "old.safetensors").loras) == {f"{layer}.{new}" for new in pairs.values()}


def test_live_paths_without_text_model_are_written_with_it(tmp_path):
    loras = LoraSet({"text_encoder.encoder.layers.0.self_attn.q_proj": Lora(torch.ones(1, 4), torch.ones(4, 1))})
    path = formats.save_lora(tmp_path / "a.safetensors", loras, {})
    assert all(key.startswith("text_encoder.text_model.encoder.") for key in load_file(path))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"unet.x.lora_A.weight": torch.ones(3, 4), "unet.x.lora_B.weight": torch.ones(4, 2)}, "down 3 x 4, up 4 x 2"),
        ({"unet.x.lora_A.weight": torch.full((2, 4), float("nan")), "unet.x.lora_B.weight": torch.ones(4, 2)}, "finite"),
        (
            {"unet.x.lora_A.weight": torch.ones(2, 4), "unet.x.lora_B.weight": torch.ones(4, 2), "unet.x.alpha": torch.ones(2)},
            "expected one",
        ),
        (
            {
                f"text_encoder.{step}encoder.layers.0.q.lora_{side}.weight": torch.ones(2, 2)
                for step in ("", "text_model.")
                for side in "AB"
            },
            "twice",
        ),
    ],
)
def test_damaged_files_raise(tmp_path, tensors, says):
    with pytest.raises(InputError, match=says):
        formats.read_lora(bad(tmp_path, tensors))


TARGETS = {"unet.a": Shape(16, 24), "unet.b": Shape(20, 12)}


def test_tokens_round_trip_by_path_and_refuse_another_fingerprint(tmp_path):
    light = LightweightLora(TARGETS, LightweightConfig(1, 10, 8))
    tokens = torch.randn(2, 18)
    path = formats.save_tokens(tmp_path / "me.tokens", tokens, light, {"base": "toon"})
    assert formats.is_tokens(path)
    assert not formats.is_tokens(__file__)
    torch.testing.assert_close(formats.read_tokens(path, light), tokens)
    with pytest.raises(InputError, match="fingerprint"):
        formats.read_tokens(path, LightweightLora(TARGETS, LightweightConfig(1, 10, 8, seed=1)))
    with pytest.raises(InputError, match="--overwrite"):
        formats.save_tokens(path, tokens, light, {})
    about = formats.describe(path)
    assert about["kind"] == "tokens"
    assert about["variables"] == 36
    assert about["fingerprint"] == light.fingerprint()


@pytest.mark.parametrize("row", [torch.zeros(17), torch.full((18,), float("nan"))])
def test_damaged_tokens_raise(tmp_path, row):
    light = LightweightLora(TARGETS, LightweightConfig(1, 10, 8))
    path = formats.save_tokens(tmp_path / "me.tokens", torch.zeros(2, 18), light, {})
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
    save_file({**load_file(path), "unet.b": row}, path, metadata=header)
    with pytest.raises(InputError, match="damaged"):
        formats.read_tokens(path, light)


def test_tokens_of_the_papers_size_weigh_what_it_says(tmp_path):
    targets = {f"unet.layer{i}": Shape(320, 320) for i in range(192)}
    light = LightweightLora(targets, LightweightConfig(1, 100, 50))
    path = formats.save_tokens(tmp_path / "me.tokens", torch.zeros(192, 150), light, {})
    assert 115_200 <= path.stat().st_size < 135_000
