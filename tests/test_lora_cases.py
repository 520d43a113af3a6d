"""LoRA files of every spelling, family and kind through one reader: their effect on the base's weights, and the files that are refused.

The expected values come from PEFT or diffusers, or, for a spelling that neither reads, from the meaning of the tensor names.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from benchmarks.original_layout import unet_name
from hyperdreambooth import formats
from hyperdreambooth.errors import InputError
from hyperdreambooth.formats.keys import TABLES, Names
from hyperdreambooth.formats.lora_file import CARRIERS

from .families import make
from .test_hub import server

assert server  # `server` is a fixture, a hub on loopback

PIPES = {}


def pipeline(family):
    """The same tiny pipeline each time: a style leaves its weights as they were."""
    if family not in PIPES:
        PIPES[family] = make(family)
    return PIPES[family]


def root(pipe):
    return nn.ModuleDict({name: part for name, part in pipe.components.items() if name in CARRIERS and part is not None})


def weights(pipe):
    """Weights and biases by canonical path."""
    found = {}
    for path, module in Names(root(pipe)).modules.items():
        found[path] = module.weight.detach().clone()
        if getattr(module, "bias", None) is not None:
            found[f"{path} bias"] = module.bias.detach().clone()
    return found


def effect(pipe, *styles):
    """What files of style do to the weights, where they do anything; afterwards all is as it was."""
    before = weights(pipe)
    with formats.styled(pipe, styles):
        during = weights(pipe)
    assert all(torch.equal(value, before[path]) for path, value in weights(pipe).items())
    return {path: value - before[path] for path, value in during.items() if not torch.equal(value, before[path])}


def same(found, expected):
    assert found.keys() == expected.keys()
    for path in expected:
        torch.testing.assert_close(found[path], expected[path], atol=1e-5, rtol=1e-3)


def written(tmp_path, tensors, name="a.safetensors", **metadata):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name, metadata=metadata)
    return tmp_path / name


# --- key style x family x content: layers with diffusers' names

UNET = ("sd1", "sd2", "sdxl")
ATTENTION = {
    **dict.fromkeys(UNET, "{}.down_blocks.1.attentions.0.transformer_blocks.0.attn1.{}"),
    **dict.fromkeys(("sd3", "sd3.5", "flux-dev", "flux-schnell"), "{}.transformer_blocks.0.attn.{}"),
}
LAYERS = ("to_q", "to_k", "to_out.0")
PARTS = {
    "kohya": ("lora_down", "lora_up"),
    "peft": ("lora_A", "lora_B"),
    "named": ("lora_A.my-style_1", "lora_B.my-style_1"),
    "older": ("down", "up"),
}
SPELLINGS = {
    "diffusers": ("{component}.{rest}", "peft"),
    "PEFT": ("base_model.model.{component}.{rest}", "peft"),
    "PEFT of the denoiser": ("base_model.model.{rest}", "peft"),
    "PEFT's name of an adapter": ("{component}.{rest}", "named"),
    "without a component": ("{rest}", "peft"),
    "saved from a wrapped model": ("{component}.base_model.model.{rest}", "peft"),
    "component twice": ("{component}.{component}.{rest}", "peft"),
    "saved from a compiled model": ("{component}._orig_mod.{rest}", "peft"),
    "saved from several devices": ("module.{component}.{rest}", "peft"),
    "ComfyUI": ("diffusion_model.{rest}", "kohya"),
    "kohya": ("lora_unet_{flat}", "kohya"),
    "OneTrainer": ("lora_transformer_{flat}", "kohya"),
    "OneTrainer's newer": ("{component}.{rest}", "kohya"),
    "LyCORIS": ("lycoris_{flat}", "kohya"),
    "diffusers of 2023": ("{component}.{rest2023}_lora", "older"),
    "save_attn_procs of 2023": ("{rest2023}_lora", "older"),
}


def spelled(spelling, path, down, up, alpha=None):
    """A LoRA of one layer."""
    pattern, parts = SPELLINGS[spelling]
    component, _, rest = path.partition(".")
    older = rest.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
    name = pattern.format(component=component, rest=rest, flat=rest.replace(".", "_"), rest2023=older)
    tensors = {f"{name}.{side}.weight": value for side, value in zip(PARTS[parts], (down, up), strict=True)}
    return tensors | ({f"{name.removesuffix('_lora')}.alpha": torch.tensor(alpha)} if alpha is not None else {})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(list(ATTENTION)),
    spelling=st.sampled_from(list(SPELLINGS)),
    layers=st.sets(st.sampled_from(LAYERS), min_size=1),
    rank=st.integers(1, 5),
    alpha=st.none() | st.sampled_from([0.0, 0.5, 2.0, 8.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
    strength=st.sampled_from([1.0, 0.7, -0.5]),
)
def test_any_spelling_of_any_family_means_the_same(tmp_path, family, spelling, layers, rank, alpha, dtype, strength):
    pipe = pipeline(family)
    alpha = None if SPELLINGS[spelling][1] == "older" else alpha  # the older format has no alpha
    tensors, expected = {}, {}
    width = 64 if family in UNET else 32
    for layer in layers:
        path = ATTENTION[family].format("unet" if family in UNET else "transformer", layer)
        down, up = (torch.randn(shape).to(dtype) for shape in ((rank, width), (width, rank)))
        tensors |= spelled(spelling, path, down, up, alpha)
        scale = strength * (1.0 if alpha is None else alpha / rank)
        if scale:
            expected[path] = scale * up.float() @ down.float()
    same(effect(pipe, (written(tmp_path, tensors), strength)), expected)
    if alpha != 0:
        loras = formats.read_lora(tmp_path / "a.safetensors", root(pipe)).loras
        same({path: strength * lora.delta() for path, lora in loras.items()}, expected)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux-dev"])
@pytest.mark.parametrize("prefix", ["lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.", "base_model.model.text_encoder."])
@pytest.mark.parametrize("step", ["text_model.", ""])
def test_text_encoders_by_any_prefix_with_and_without_their_inner_model(tmp_path, family, prefix, step):
    pipe = pipeline(family)
    width = pipe.text_encoder.config.hidden_size
    layers = {"self_attn.q_proj": (width, width), "mlp.fc1": (width, 2 * width)}
    tensors, expected = {}, {}
    for layer, (inputs, outputs) in layers.items():
        rest = f"{step}encoder.layers.1.{layer}"
        down, up = torch.randn(2, inputs), torch.randn(outputs, 2)
        name = prefix + (rest.replace(".", "_") if prefix.endswith("_") else rest)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        expected[f"text_encoder.text_model.encoder.layers.1.{layer}"] = up @ down
    same(effect(pipe, written(tmp_path, tensors)), expected)


@pytest.mark.parametrize(("family", "component"), [("flux-dev", "text_encoder_2"), ("sd3", "text_encoder_3")])
@pytest.mark.parametrize("prefix", ["lora_te3_", "text_encoders.t5xxl.transformer.", None])
def test_t5_is_found_wherever_a_family_has_it(tmp_path, family, component, prefix):
    layer = "encoder.block.0.layer.0.SelfAttention.k"
    prefix = prefix or f"{component}."
    name = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
    down, up = torch.randn(2, 32), torch.randn(16, 2)
    path = written(tmp_path, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    same(effect(pipeline(family), path), {f"{component}.{layer}": up @ down})
    with pytest.raises(InputError, match=r"one with T5.*lacks"):  # a base without T5 is refused with this reason
        effect(pipeline("sd3-no-t5"), path)


# --- names of the original code


@pytest.mark.parametrize("family", UNET)
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "model.diffusion_model."])
def test_every_layer_of_a_unet_is_found_by_its_original_name(family, prefix):
    names = Names(root(pipeline(family)))
    layers = {path: module for path, module in names.modules.items() if path.startswith("unet.") and module.weight.ndim > 1}
    assert len(layers) > 50
    for path in layers:
        original = (
            unet_name(f"{path[5:]}.weight", pipeline(family).unet.config).removeprefix("model.diffusion_model.").removesuffix(".weight")
        )
        name = prefix + (original.replace(".", "_") if prefix.endswith("_") else original)
        assert [place.path for place in names.find(name)] == [path], name


FUSED = {
    "flux-dev": {
        "double_blocks.0.img_attn.qkv": "transformer_blocks.0.attn.{to_q,to_k,to_v}",
        "double_blocks.0.txt_attn.qkv": "transformer_blocks.0.attn.{add_q_proj,add_k_proj,add_v_proj}",
        "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
        "double_blocks.0.img_mod.lin": "transformer_blocks.0.norm1.linear",
        "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.net.2",
        "single_blocks.0.linear1": "single_transformer_blocks.0.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}",
        "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
        "img_in": "x_embedder",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear swapped",
    },
    "sd3.5": {
        "joint_blocks.0.x_block.attn.qkv": "transformer_blocks.0.attn.{to_q,to_k,to_v}",
        "joint_blocks.0.x_block.attn2.qkv": "transformer_blocks.0.attn2.{to_q,to_k,to_v}",
        "joint_blocks.1.context_block.attn.qkv": "transformer_blocks.1.attn.{add_q_proj,add_k_proj,add_v_proj}",
        "joint_blocks.0.context_block.mlp.fc2": "transformer_blocks.0.ff_context.net.2",
        "joint_blocks.0.context_block.adaLN_modulation.1": "transformer_blocks.0.norm1_context.linear",
        "joint_blocks.1.context_block.adaLN_modulation.1": "transformer_blocks.1.norm1_context.linear swapped",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "context_embedder": "context_embedder",
        "final_layer.adaLN_modulation.1": "norm_out.linear swapped",
    },
}


@pytest.mark.parametrize(("family", "original"), [(family, original) for family, layers in FUSED.items() for original in layers])
@pytest.mark.parametrize("dora", [False, True])
def test_layers_that_are_several_in_one_are_taken_apart(tmp_path, family, original, dora):
    pipe = pipeline(family)
    pattern, _, swapped = FUSED[family][original].partition(" ")
    stem, _, inner = pattern.partition("{")
    paths = [f"transformer.{stem}{part}" for part in inner.removesuffix("}").split(",")] if inner else [f"transformer.{stem}"]
    modules = [pipe.transformer.get_submodule(path.partition(".")[2]) for path in paths]
    outputs, inputs = sum(module.out_features for module in modules), modules[0].in_features
    down, up, scale = torch.randn(3, inputs), torch.randn(outputs, 3), torch.rand(outputs, 1) + 1
    prefix = "lora_unet_" + original.replace(".", "_")
    tensors = {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.alpha": torch.tensor(1.5)}
    change, whole = 0.5 * up @ down, torch.cat([module.weight.detach() for module in modules])
    if swapped:  # the original code has shift before scale
        whole = whole.roll(outputs // 2, 0)
    if dora:
        tensors[f"{prefix}.dora_scale"] = scale
        change = (whole + change) * scale / (whole + change).norm(dim=1, keepdim=True) - whole
    rows = [change.roll(outputs // 2, 0)] if swapped else change.split([module.out_features for module in modules])
    same(effect(pipe, written(tmp_path, tensors)), dict(zip(paths, rows, strict=True)))


@pytest.mark.parametrize("family", ["sd3", "sd3.5"])
def test_every_original_name_of_sd3_is_a_layer(family):
    names = Names(root(pipeline(family)))
    blocks = [name for name in TABLES["sd3"] if "_block_" in name and ("attn2" not in name or family == "sd3.5")]
    found = {place.path for name in blocks for place in names.find(f"lora_unet_joint_blocks_0_{name}")}
    found |= {place.path for name in TABLES["sd3"] if "_block_" not in name for place in names.find(f"lora_unet_{name}")}
    layers = {path for path, module in names.modules.items() if path.startswith("transformer.") and module.weight.ndim > 1}
    assert {path for path in layers if "blocks.1." not in path} == found | {"transformer.context_embedder"}


# --- kinds: PEFT makes the tensors, and the expected effect on a layer

LINEAR, CONVOLUTION = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj", "down_blocks.1.resnets.0.conv1"
LORA = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["layer"]}
LYCORIS = {"r": 3, "alpha": 6, "init_weights": False, "target_modules": ["layer"]}
KINDS = {
    "LoRA": (LINEAR, LoraConfig(**LORA)),
    "LoRA of a convolution": (CONVOLUTION, LoraConfig(**LORA)),
    "LoRA with a bias": (LINEAR, LoraConfig(**LORA, lora_bias=True)),
    "DoRA": (LINEAR, LoraConfig(**LORA, use_dora=True)),
    "DoRA of a convolution": (CONVOLUTION, LoraConfig(**LORA, use_dora=True)),
    "LoHa": (LINEAR, LoHaConfig(**LYCORIS)),
    "LoHa of a convolution": (CONVOLUTION, LoHaConfig(**LYCORIS)),
    "LoHa of a convolution with cores": (CONVOLUTION, LoHaConfig(**LYCORIS, use_effective_conv2d=True)),
    "LoKr": (LINEAR, LoKrConfig(**LYCORIS)),
    "LoKr of two products": (LINEAR, LoKrConfig(**{**LYCORIS, "r": 2}, decompose_both=True)),
    "LoKr of a convolution": (CONVOLUTION, LoKrConfig(**LYCORIS)),
    "LoKr of a convolution with a core": (CONVOLUTION, LoKrConfig(**{**LYCORIS, "r": 2}, use_effective_conv2d=True)),
}


def content(kind):
    """A layer of the tiny SDXL, itself with an adapter of PEFT's of random values, and the same as a file has it."""
    layer, config = KINDS[kind]
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layer": copy.deepcopy(pipeline("sdxl").unet.get_submodule(layer))})
    inject_adapter_in_model(copy.deepcopy(config), holder)
    for name, parameter in holder.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
        elif ".lora_B" in name and "bias" in name:
            parameter.data.normal_()
    state = get_peft_model_state_dict(holder)
    alpha = torch.tensor(float(config.lora_alpha if isinstance(config, LoraConfig) else config.alpha))
    named = {name.replace("layer.", f"unet.{layer}.", 1): value.detach() for name, value in state.items()}
    return layer, holder, {**named, f"unet.{layer}.alpha": alpha}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_a_kind_does_what_peft_does(tmp_path, kind, strength):
    pipe = pipeline("sdxl")
    layer, holder, tensors = content(kind)
    before = weights(pipe)
    holder["layer"].set_scale("default", strength)
    holder["layer"].merge()
    base = holder["layer"].get_base_layer()
    expected = {f"unet.{layer}": base.weight.detach() - before[f"unet.{layer}"]}
    if "bias" in kind:
        expected[f"unet.{layer} bias"] = base.bias.detach() - before[f"unet.{layer} bias"]
    path = written(tmp_path, tensors)
    same(effect(pipe, (path, strength)), expected)
    if kind != "LoRA":  # other kinds can't be a person; the error names the kind
        with pytest.raises(InputError, match=f"is a {kind.split()[0]}.*generate --style"):
            formats.read_lora(path, root(pipe))
        assert kind.split()[0] in formats.describe(path)["kind"]


def test_full_differences_kohyas_cores_and_doras_of_inputs(tmp_path):
    """What PEFT has no layer for."""
    pipe = pipeline("sdxl")
    conv, linear = (pipe.unet.get_submodule(layer) for layer in (CONVOLUTION, LINEAR))
    weight, bias, core = torch.randn_like(conv.weight), torch.randn_like(conv.bias), torch.randn(3, 3, 3, 3)
    name = f"lora_unet_{CONVOLUTION.replace('.', '_')}"
    same(
        effect(pipe, (written(tmp_path, {f"{name}.diff": weight, f"{name}.diff_b": bias}), 0.5)),
        {f"unet.{CONVOLUTION}": weight / 2, f"unet.{CONVOLUTION} bias": bias / 2},
    )
    norm = "unet.down_blocks.1.attentions.0.transformer_blocks.0.norm1"
    same(effect(pipe, written(tmp_path, {f"lycoris_{norm[5:].replace('.', '_')}.w_norm": torch.ones(64)})), {norm: torch.ones(64)})
    down, up = torch.randn(3, conv.in_channels, 1, 1), torch.randn(conv.out_channels, 3, 1, 1)
    sides = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": core}
    found = effect(pipe, written(tmp_path, sides))[f"unet.{CONVOLUTION}"]
    x = torch.randn(1, conv.in_channels, 5, 5)
    expected = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(x, down), core, padding=1), up)
    torch.testing.assert_close(nn.functional.conv2d(x, found, padding=1), expected, atol=1e-3, rtol=1e-3)
    lengths, changed = torch.rand(1, conv.in_channels, 1, 1) + 1, conv.weight.detach() + found
    norms = torch.linalg.vector_norm(changed, dim=(0, 2, 3), keepdim=True)
    found = effect(pipe, written(tmp_path, {**sides, f"{name}.dora_scale": lengths}))[f"unet.{CONVOLUTION}"]
    torch.testing.assert_close(found, changed * lengths / norms - conv.weight.detach(), atol=1e-5, rtol=1e-3)
    down, up, lengths = torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2), torch.rand(1, linear.in_features) + 1
    name = f"unet.{LINEAR}"
    changed = linear.weight.detach() + up @ down
    same(
        effect(pipe, written(tmp_path, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.dora_scale": lengths})),
        {name: changed * lengths / changed.norm(dim=0, keepdim=True) - linear.weight.detach()},
    )


# --- whole files against diffusers


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux-dev"])
def test_several_files_with_strengths_are_diffusers_own(tmp_path, family):
    original = {
        "sd1": ["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v", "lora_unet_down_blocks_1_resnets_0_conv1"],
        "sdxl": ["lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_v", "lora_unet_input_blocks_3_0_in_layers_2"],
        "flux-dev": ["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear2"],
    }[family]
    pipe, other = pipeline(family), make(family)
    for part in root(other):
        getattr(other, part).load_state_dict(getattr(pipe, part).state_dict())
    names, files = Names(root(pipe)), {}
    for index, file in enumerate(("one", "two")):
        tensors = {}
        for name in original:
            shapes = [names.modules[place.path].weight.shape for place in names.find(name)]
            tensors[f"{name}.lora_down.weight"] = torch.randn(2 + index, *shapes[0][1:])
            tensors[f"{name}.lora_up.weight"] = torch.randn(sum(shape[0] for shape in shapes), 2 + index, *[1] * (len(shapes[0]) - 2))
            tensors[f"{name}.alpha"] = torch.tensor(1.0 + index)
        files[file] = written(tmp_path, tensors, f"{file}.safetensors")
        other.load_lora_weights(str(files[file]), adapter_name=file)
    found = effect(pipe, (files["one"], 0.8), (files["two"], -0.3))
    before = weights(pipe)
    other.set_adapters(["one", "two"], [0.8, -0.3])
    other.fuse_lora(components=[part for part in root(other) if part in other._lora_loadable_modules], adapter_names=["one", "two"])
    after = weights(other)
    same(found, {path: after[path] - before[path] for path in after if not torch.equal(after[path], before[path])})


def test_a_style_with_a_strength_may_be_a_list_as_from_json(tmp_path):
    pipe, path = pipeline("sd1"), written(tmp_path, PLAIN)
    same(effect(pipe, [str(path), 0.5]), effect(pipe, (path, 0.5)))


def test_a_style_is_taken_out_again_after_an_error_and_leaves_other_adapters(tmp_path):
    pipe, path = pipeline("sd1"), written(tmp_path, PLAIN)
    before = weights(pipe)

    def draw():
        with formats.styled(pipe, [path]):
            assert not torch.equal(weights(pipe)[LAYER], before[LAYER])
            raise RuntimeError("while drawing")

    with pytest.raises(RuntimeError, match="drawing"):
        draw()
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
    other = make("sd1")
    other.load_lora_weights(str(path), adapter_name="mine")
    same(effect(other, path), {LAYER: torch.full((64, 64), 2.0)})
    assert other.get_active_adapters() == ["mine"]


def test_the_second_of_two_doras_is_of_the_untouched_weights(tmp_path):
    pipe = pipeline("sd1")
    files = []
    for index in range(2):
        scaled = {key: value * (index + 1) / 9 for key, value in PLAIN.items()}
        files.append(written(tmp_path, {**scaled, f"{LAYER}.lora_magnitude_vector": torch.rand(64) + index}, f"{index}.safetensors"))
    one, other, both = effect(pipe, files[0]), effect(pipe, files[1]), effect(pipe, *files)
    same(both, {LAYER: one[LAYER] + other[LAYER]})


# --- files that are refused


LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PLAIN = {f"{LAYER}.lora_A.weight": torch.ones(2, 64), f"{LAYER}.lora_B.weight": torch.ones(64, 2)}
FLUX = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 32)} | {
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(96, 2)
}
ELSEWHERE = {f"{LAYER.replace('blocks.1', 'blocks.3')}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
REFUSED = {
    "another family": (FLUX, r"another base \(Flux\).*lacks lora_unet_double_blocks_0_img_attn_qkv"),
    "SD 3": (
        {f"lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")},
        "Stable Diffusion 3",
    ),
    "Wan": ({f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, "Wan"),
    "a layer more than the base has": ({**PLAIN, **ELSEWHERE}, r"of its kind, but larger\): of its 2 layers .* lacks unet.down_blocks.3"),
    "another size": ({**PLAIN, f"{LAYER}.lora_A.weight": torch.ones(2, 99)}, "another size: 99 x 64 there, 64 x 64 here"),
    "a matrix for a convolution": ({f"unet.conv_in.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}, "another size"),
    "SDXL": (
        {**PLAIN, f"{LAYER.replace('blocks.0.attn1', 'blocks.1.attn1')}.lora_A.weight": torch.ones(2, 64)},
        r"another base \(SDXL, or one of its kind",
    ),
    "Qwen-Image": (
        {f"transformer.transformer_blocks.0.{layer}.lora_A.weight": torch.ones(2, 2) for layer in ("attn.to_q", "img_mlp.net.2")},
        "another model, such as Wan, Qwen-Image",
    ),
    "names that nobody reads": (
        {"foo.bar.lora_A.weight": torch.ones(2, 2), "foo.bar.lora_B.weight": torch.ones(2, 2)},
        "as no tool reads them",
    ),
    "tensors that nobody reads": ({**PLAIN, f"{LAYER}.lora_C.weight": torch.ones(2)}, r"lora_C.weight: of no LoRA layout"),
    "OFT": ({"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.ones(2, 4, 4)}, "an OFT"),
    "AdaLoRA": ({**PLAIN, f"{LAYER}.lora_E": torch.ones(2, 1)}, "an AdaLoRA"),
    "whole numbers": ({key: value.to(torch.int8) for key, value in PLAIN.items()}, r"no floating-point numbers \(torch.int8\)"),
    "scales beside": ({**PLAIN, f"{LAYER}.lora_A.scale_weight": torch.ones(())}, "lora_A.scale_weight: of no LoRA layout"),
    "IA3": ({"lora_unet_x.weight": torch.ones(4), "lora_unet_x.on_input": torch.tensor(True)}, "an IA3"),
    "GLoRA": ({f"lora_unet_x.{part}.weight": torch.ones(2, 2) for part in ("a1", "a2", "b1", "b2")}, "a GLoRA"),
    "a bundled embedding": ({**PLAIN, "bundle_emb.ann.string_to_param.*": torch.ones(2, 768)}, "embedding bundled"),
    "Textual Inversion": ({"emb_params": torch.ones(2, 768)}, "Textual Inversion"),
    "Textual Inversion of SDXL": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "Textual Inversion"),
    "Textual Inversion of diffusers": ({"<cat-toy>": torch.ones(768)}, "Textual Inversion"),
    "a checkpoint": (
        {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4), "first_stage_model.x.weight": torch.ones(1)},
        "--base",
    ),
    "a UNet": ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(4, 4), "conv_in.bias": torch.ones(4)}, "a part of a model"),
    "a ControlNet": ({"control_model.input_blocks.0.0.weight": torch.ones(4)}, "a ControlNet"),
    "half a layer": ({f"{LAYER}.lora_A.weight": torch.ones(2, 64)}, "no up matrix"),
    "half a LoHa": ({f"{LAYER}.hada_w1_a": torch.ones(64, 2), f"{LAYER}.hada_w1_b": torch.ones(2, 64)}, "no hada_w2_a"),
    "parts that don't fit": ({**PLAIN, f"{LAYER}.lora_A.weight": torch.ones(3, 64)}, "don't fit together"),
    "two kinds in one": ({**PLAIN, f"{LAYER}.diff": torch.ones(64, 64)}, "several kinds of adapter in one"),
    "two numbers of alpha": ({**PLAIN, f"{LAYER}.alpha": torch.ones(2)}, "alpha holds 2 numbers"),
    "no number": ({**PLAIN, f"{LAYER}.lora_A.weight": torch.full((2, 64), torch.nan)}, "isn't finite"),
    "the same layer twice": (
        {**PLAIN, **{key.replace("unet.", "lora_unet_", 1): value.clone() for key, value in PLAIN.items()}},
        "comes twice",
    ),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_each_file_is_refused_for_what_it_is(tmp_path, what):
    tensors, says = REFUSED[what]
    path = written(tmp_path, tensors)
    for opened in (lambda: effect(pipeline("sd1"), path), lambda: formats.read_lora(path, root(pipeline("sd1")))):
        with pytest.raises(InputError, match=says) as refused:
            opened()
        assert str(path) in str(refused.value)


def test_the_header_tells_whose_a_file_is(tmp_path):
    path = written(tmp_path, FLUX, **{"modelspec.architecture": "flux-1-dev/lora"})
    with pytest.raises(InputError, match=r"another base \(flux-1-dev/lora\)"):
        effect(pipeline("sd1"), path)


def test_layers_without_an_update_may_lack_a_place(tmp_path):
    zero = {key: value * 0 for key, value in ELSEWHERE.items()}
    same(effect(pipeline("sd1"), written(tmp_path, {**PLAIN, **zero})), {LAYER: torch.full((64, 64), 2.0)})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "a web page"),
        (b"\n  <html>", "a web page"),
        (b'{"error": "Entry not found"}', "error message"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"PK\x03\x04archive/data.pkl", "a pickle"),
        (b"\x80\x02}q\x00.", "a pickle"),
        (b"GGUF\x03\x00", "GGUF"),
        (b"", "is empty"),
        (b"\x01\x02\x03", "cut off"),
    ],
)
def test_a_file_that_only_has_the_name_is_called_what_it_is(tmp_path, content, says):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=f"not a whole safetensors file.*{says}"):
        effect(pipeline("sd1"), tmp_path / "a.safetensors")


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path):
    """A safetensors file begins with its header's length, which may be any bytes."""
    path = next(path for count in range(0, 2000, 8) if (path := written(tmp_path, PLAIN, note="x" * count)).read_bytes()[:2] == b"\x80\x02")
    same(effect(pipeline("sd1"), path), {LAYER: torch.full((64, 64), 2.0)})


def test_a_file_that_was_cut_off(tmp_path):
    path = written(tmp_path, PLAIN)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut off"):
        effect(pipeline("sd1"), path)


# --- locations of LoRA files


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "my-style.safetensors"])
def test_a_file_of_pefts_is_scaled_by_the_config_beside_it_whatever_it_is_called(tmp_path, name):
    path = written(tmp_path, {f"base_model.model.{key}": value for key, value in PLAIN.items()}, name)
    same(effect(pipeline("sd1"), path), {LAYER: torch.full((64, 64), 2.0)})
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8, "init_lora_weights": "gaussian"}')
    same(effect(pipeline("sd1"), path), {LAYER: torch.full((64, 64), 8.0)})
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}')
    with pytest.raises(InputError, match=r"changed first \(init_lora_weights pissa_niter_4\)\. Convert it"):
        effect(pipeline("sd1"), path)


def test_a_folder_means_the_lora_in_it(tmp_path):
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        formats.find_lora(tmp_path)
    for name in ("optimizer.safetensors", "style.safetensors"):
        written(tmp_path, PLAIN, name)
    assert formats.find_lora(str(tmp_path)).name == "style.safetensors"
    written(tmp_path, PLAIN, "other.safetensors")
    with pytest.raises(InputError, match=r"several LoRAs: other.safetensors, style.safetensors\. Name one"):
        formats.find_lora(tmp_path)
    (tmp_path / "more" / "step").mkdir(parents=True)
    for name in ("._a.safetensors", "scheduler.safetensors", "step/one.SAFETENSORS"):
        written(tmp_path / "more", PLAIN, name)
    assert formats.find_lora(tmp_path / "more").name == "one.SAFETENSORS"
    usual = written(tmp_path, PLAIN, "pytorch_lora_weights.safetensors")
    assert formats.find_lora(tmp_path) == usual
    same(effect(pipeline("sd1"), tmp_path), {LAYER: torch.full((64, 64), 2.0)})


@contextmanager
def online(monkeypatch):
    import huggingface_hub.constants

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield


def test_a_name_on_the_hub_means_the_lora_in_it(tmp_path, server, monkeypatch):
    content = written(tmp_path, PLAIN, "local.safetensors").read_bytes()
    with online(monkeypatch):
        server.files |= {"style.safetensors": content, "README.md": b"a style"}
        same(effect(pipeline("sd1"), ("ann/style", 0.5)), {LAYER: torch.ones(64, 64)})
        server.files["more.safetensors"] = content
        with pytest.raises(InputError, match=r"ann/style has several LoRAs: more.safetensors, style.safetensors\. Name one"):
            formats.find_lora("ann/style")
        for name in ("ann/other/more.safetensors", "https://huggingface.co/ann/other/blob/main/more.safetensors"):
            same(effect(pipeline("sd1"), name), {LAYER: torch.full((64, 64), 2.0)})
        with pytest.raises(InputError, match=r"there is no less.safetensors in ann/other"):
            formats.find_lora("ann/other/less.safetensors")
        server.files["adapter_model.safetensors"], server.files["adapter_config.json"] = content, b'{"lora_alpha": 8}'
        same(effect(pipeline("sd1"), "ann/peft"), {LAYER: torch.full((64, 64), 8.0)})
        server.files.clear()
        with pytest.raises(InputError, match="ann/none is no file or folder here, and no LoRA on the hub that can be reached"):
            formats.find_lora("ann/none")
    with pytest.raises(InputError, match="no such file"):
        effect(pipeline("sd1"), "loras/none.safetensors")
