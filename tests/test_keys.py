"""Layer names in LoRA files of other tools, compared with diffusers' converters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.readers import components, random_lora, sd, sdxl
from hyperdreambooth import formats
from hyperdreambooth.errors import InputError
from hyperdreambooth.formats import keys
from hyperdreambooth.lora import Lora, LoraSet, applied, canonical_modules, linear_shape

from .conftest import tiny_pipe


def kohya(pipe, loras: LoraSet, path, rename=lambda name: name):
    """A kohya file of `loras` by names of one's own."""
    formats.save_lora(path, loras, {}, layout="kohya", dtype=torch.float32)
    save_file({rename(name): value for name, value in load_file(path).items()}, path)
    return path


def original(name: str) -> str:
    """kohya's names of a UNet of two layers a block, as its SDXL trainer writes them; written down by hand."""
    for ours, theirs in {
        "down_blocks_0_attentions_0": "input_blocks_1_1",
        "down_blocks_1_attentions_0": "input_blocks_4_1",
        "down_blocks_1_attentions_1": "input_blocks_5_1",
        "mid_block_attentions_0": "middle_block_1",
        "up_blocks_0_attentions_0": "output_blocks_0_1",
        "up_blocks_0_attentions_1": "output_blocks_1_1",
        "up_blocks_0_attentions_2": "output_blocks_2_1",
        "up_blocks_1_attentions_2": "output_blocks_5_1",
    }.items():
        name = name.replace(ours, theirs)
    return name


def test_sdxl_files_by_the_original_names_are_read_as_diffusers_reads_them(tmp_path):
    pipe = sdxl()
    loras = random_lora(pipe, 1)
    path = kohya(pipe, loras, tmp_path / "a.safetensors", original)
    assert not any("down_blocks" in name or "up_blocks" in name for name in load_file(path))
    found = formats.read_lora(path, components(pipe))
    assert found.layout == "kohya"
    assert found.loras.keys() == loras.keys()
    pipe.load_lora_weights(str(path))
    modules = canonical_modules(components(pipe))
    for layer, lora in found.loras.items():
        torch.testing.assert_close(lora.delta(), loras[layer].delta(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lora.delta(), modules[layer].get_delta_weight("default_0"), atol=1e-5, rtol=1e-4)


def test_every_name_is_one_layers_alone():
    for pipe in (sd(), sdxl(), tiny_pipe()):
        names = keys.Names(components(pipe))
        assert set(names.paths.values()) == set(names.modules)
        for two in (False, True):
            spelled = {keys.kohya_name(path, two_text_encoders=two): path for path in names.modules}
            assert {name: [place.path for place in names.find(name)] for name in spelled} == {
                name: [path] for name, path in spelled.items()
            }


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_one_by_one_convolutions_are_linear_layers(tmp_path, layout):
    """SD 1.x's proj_in and proj_out, which kohya trains, in a style LoRA: read, applied, and written again for diffusers."""
    pipe = sd()
    root = components(pipe)
    modules = canonical_modules(root)
    paths = [path for path in modules if path.endswith((".proj_in", ".proj_out", "attn1.to_q"))]
    loras = LoraSet()
    for path in paths:
        shape = linear_shape(modules[path])
        loras[path] = Lora(torch.randn(2, shape.inputs) / 4, torch.randn(shape.outputs, 2) / 4)
    convolutions = frozenset(path for path in paths if not path.endswith("to_q"))
    path = formats.save_lora(tmp_path / "a.safetensors", loras, {}, layout=layout, dtype=torch.float32, convolutions=convolutions)
    file = formats.read_lora(path, root)
    assert file.convolutions == convolutions
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([400, 400]), torch.randn(2, 7, 32)
    with torch.no_grad():
        plain = pipe.unet(x, t, text).sample
        with applied(root, file.loras):
            found = pipe.unet(x, t, text).sample
        other = sd()
        other.load_lora_weights(str(path))
        expected = other.unet(x, t, text).sample
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
    assert (found - plain).abs().max() > 1e-2
    again = formats.save_lora(tmp_path / "b.safetensors", file.loras, {}, dtype=torch.float32, convolutions=file.convolutions)
    sd().load_lora_weights(str(again))  # would raise if a convolution's update were a matrix


def test_larger_convolutions_are_one_error(tmp_path):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 32, 3, 3), f"{name}.lora_up.weight": torch.ones(32, 2, 1, 1)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(InputError, match="convolution"):
        formats.read_lora(tmp_path / "a.safetensors", components(sd()))


def test_transformers_have_no_names_in_kohyas_layout(tmp_path):
    loras = LoraSet({"transformer.transformer_blocks.0.attn.to_q": Lora(torch.ones(1, 4), torch.ones(4, 1))})
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.attn\.to_q.*diffusers"):
        formats.save_lora(tmp_path / "a.safetensors", loras, {}, layout="kohya")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="diffusers"):
        formats.check_layout("kohya", ["transformer", "text_encoder"])
    formats.check_layout("kohya", ["unet", "text_encoder"])
    formats.check_layout("diffusers", ["transformer"])


def test_without_a_base_a_path_is_what_its_name_tells():
    for layer, path in {
        "base_model.model.transformer_blocks.0.attn.to_q": "transformer.transformer_blocks.0.attn.to_q",
        "base_model.model.mid_block.attentions.0.proj_in": "unet.mid_block.attentions.0.proj_in",
        "text_encoder.encoder.layers.0.self_attn.q_proj": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "lora_unet_mid_block_attentions_0_proj_in": "lora_unet_mid_block_attentions_0_proj_in",
    }.items():
        assert keys.plain_path(layer) == path


def test_kohya_files_have_one_rank_and_the_same_update(tmp_path):
    """diffusers' converter scales attention layers of mixed ranks by another layer's alpha."""
    loras = random_lora(sd(), 1)
    assert len({lora.rank for lora in loras.values()}) == 3
    path = formats.save_lora(tmp_path / "a.safetensors", loras, {}, layout="kohya", dtype=torch.float32)
    assert {value.shape[0] for name, value in load_file(path).items() if name.endswith("lora_down.weight")} == {3}
    found = formats.read_lora(path, components(sd())).loras
    for layer, lora in loras.items():
        torch.testing.assert_close(found[layer].delta(), lora.delta(), atol=1e-6, rtol=1e-5)
