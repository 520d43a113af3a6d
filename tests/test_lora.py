"""The LoRA hooks compared with PEFT and with manually merged weights."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import Lora, LoraSet, applied, canonical, compress, find_targets, shared_norm, update_norms

from .conftest import conditioning, random_loras, tiny_pipe


def denoise(backbone, latents, count=None):
    count = count or len(latents)
    cond = conditioning(backbone, 4)
    cond = {key: value[torch.arange(count) % 4] for key, value in cond.items()}
    return backbone.predict(latents, torch.tensor([500]).expand(count), cond)


def latents(count, seed=0):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def merged(backbone, loras):
    """The output with updates added to a copy's weights."""
    clone = copy.deepcopy(backbone)
    modules = {canonical(p): m for p, m in clone.components.named_modules()}
    with torch.no_grad():
        for path, lora in loras.items():
            modules[path].weight += lora.delta()
    return clone


def test_per_sample_updates_equal_merged_weights(backbone):
    loras = random_loras(backbone, batch=3)
    x = latents(3)
    with torch.no_grad(), applied(backbone.components, loras):
        together = denoise(backbone, x)
    plain = denoise(backbone, x)
    for index in range(3):
        alone = merged(backbone, loras.select(index))
        cond = {k: v[index : index + 1] for k, v in conditioning(backbone, 4).items()}
        expected = alone.predict(x[index : index + 1], torch.tensor([500]), cond)
        torch.testing.assert_close(together[index : index + 1], expected, atol=2e-5, rtol=1e-4)
        assert (plain[index] - together[index]).abs().max() > 1e-3


def test_shared_updates_equal_peft():
    pipe = tiny_pipe()
    from hyperdreambooth.backbones import StableDiffusion

    backbone = StableDiffusion(pipe)
    x = latents(2)
    reference = copy.deepcopy(backbone)
    inject_adapter_in_model(
        LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False), reference.components["unet"]
    )
    loras = LoraSet()
    for path, module in reference.components.named_modules():
        if hasattr(module, "lora_A"):
            loras[path] = Lora(module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
    with torch.no_grad():
        expected = denoise(reference, x)
        with applied(backbone.components, loras):
            found = denoise(backbone, x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_merged_weights_with_and_without_checkpointing(checkpointing):
    from hyperdreambooth.backbones import StableDiffusion

    backbone = StableDiffusion(tiny_pipe())
    backbone.components.train()
    if checkpointing:
        backbone.components["unet"].enable_gradient_checkpointing()
    loras = random_loras(backbone, batch=2).map(lambda t: t.clone().requires_grad_())
    x = latents(2)
    with applied(backbone.components, loras):
        denoise(backbone, x).square().sum().backward()
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    found = loras[path].down.grad.clone()
    # the same gradients by functional merging, one sample at a time
    for index in range(2):
        single = loras.select(index).map(lambda t: t.detach().clone().requires_grad_())
        plain = StableDiffusion(tiny_pipe())
        modules = dict(plain.components.named_modules())
        weights = {f"{p}.weight": modules[p].weight + single[p].delta() for p in single}
        cond = {k: v[index : index + 1] for k, v in conditioning(plain, 4).items()}

        def run(parameters, plain=plain, index=index, cond=cond):
            unet = {k.removeprefix("unet."): v for k, v in parameters.items()}
            return torch.func.functional_call(plain.components["unet"], unet, (x[index : index + 1], torch.tensor([500])), cond).sample

        run(weights).square().sum().backward()
        torch.testing.assert_close(found[index], single[path].down.grad, atol=1e-4, rtol=1e-3)


def test_batch_equals_single(backbone):
    loras = random_loras(backbone, batch=3)
    x = latents(3)
    with torch.no_grad():
        with applied(backbone.components, loras):
            together = denoise(backbone, x)
        with applied(backbone.components, loras.select(0)):
            alone = denoise(backbone, x[:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)


def test_batch_tiles_for_guidance(backbone):
    loras = random_loras(backbone, batch=2)
    x = latents(2)
    cond = {k: v[:1].expand(4, -1, -1) for k, v in conditioning(backbone, 1).items()}
    step = torch.tensor([500])
    single = {k: v[:2] for k, v in cond.items()}
    with torch.no_grad(), applied(backbone.components, loras):
        once = backbone.predict(x, step.expand(2), single)
        tiled = backbone.predict(x.repeat(2, 1, 1, 1), step.expand(4), cond)
    torch.testing.assert_close(tiled, once.repeat(2, 1, 1, 1), atol=1e-5, rtol=1e-4)


def test_weights_leave_samples_to_the_base(backbone):
    loras = random_loras(backbone)
    x = latents(2)
    with torch.no_grad():
        plain = denoise(backbone, x)
        with applied(backbone.components, loras):
            full = denoise(backbone, x)
        with applied(backbone.components, loras, torch.tensor([0.0, 1.0])):
            mixed = denoise(backbone, x)
    torch.testing.assert_close(mixed[0], plain[0])
    torch.testing.assert_close(mixed[1], full[1], atol=1e-5, rtol=1e-4)


def test_hooks_go_when_the_context_closes_even_after_an_error(backbone):
    with pytest.raises(ZeroDivisionError), applied(backbone.components, random_loras(backbone)):
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in backbone.components.modules())


def test_wrong_batch_raises(backbone):
    with applied(backbone.components, random_loras(backbone, batch=3)), pytest.raises(ValueError, match="multiple"), torch.no_grad():
        denoise(backbone, latents(2))


def test_addition_concatenates_ranks():
    a, b = (Lora(torch.randn(r, 6), torch.randn(5, r)) for r in (1, 3))
    total = a + b
    assert total.rank == 4
    torch.testing.assert_close(total.delta(), a.delta() + b.delta())
    with pytest.raises(RuntimeError, match="dimensions"):
        a + Lora(torch.randn(2, 1, 6), torch.randn(2, 5, 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_compress_keeps_the_product_and_never_raises_the_rank(rank, inputs, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    lora = Lora(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))
    small = compress(lora)
    torch.testing.assert_close(small.delta(), lora.delta(), atol=1e-4, rtol=1e-4)
    assert small.rank <= min(rank, inputs, outputs)
    torch.testing.assert_close(small.down @ small.down.mT, torch.eye(small.rank), atol=1e-4, rtol=0)


def test_compress_drops_rank_that_is_not_there():
    one = Lora(torch.randn(1, 8), torch.randn(7, 1))
    assert compress(one + one.__class__(one.down, 2 * one.up)).rank == 1
    assert compress(Lora(torch.randn(4, 8), torch.zeros(7, 4))).rank == 1


def test_update_norms_are_frobenius_norms(backbone):
    loras = random_loras(backbone, batch=2)
    expected = sum(lora.delta().square().sum((-2, -1)) for lora in loras.values())
    torch.testing.assert_close(update_norms(loras), expected, rtol=1e-4, atol=1e-4)


def test_the_shared_norm_is_that_of_pairs_of_people(backbone):
    loras = random_loras(backbone, batch=3)
    deltas = torch.cat([lora.delta().flatten(1) for lora in loras.values()], 1)
    products = deltas @ deltas.mT
    torch.testing.assert_close(shared_norm(loras), (products.sum() - products.trace()) / 6, rtol=1e-3, atol=1e-3)


def test_the_shared_norm_finds_what_everyone_has():
    draw = torch.Generator().manual_seed(0)
    common = Lora(torch.randn(2, 6, generator=draw), torch.randn(5, 2, generator=draw))
    own = Lora(torch.randn(400, 1, 6, generator=draw), torch.randn(400, 5, 1, generator=draw))
    both = LoraSet(layer=Lora(common.down.expand(400, -1, -1), common.up.expand(400, -1, -1)) + own)
    whole = common.delta().square().sum()
    assert float(shared_norm(both)) == pytest.approx(float(whole), rel=0.1)
    assert shared_norm(LoraSet(layer=own)).abs() < 0.02 * update_norms(LoraSet(layer=own)).mean()


def test_targets_are_found_by_glob_in_any_component(backbone):
    shapes = find_targets(backbone.components, ["unet*attn2.to_k", "text_encoder*q_proj"])
    assert all(path.endswith(("attn2.to_k", "q_proj")) for path in shapes)
    assert {path.split(".")[0] for path in shapes} == {"unet", "text_encoder"}
    assert all("text_model" in path for path in shapes if path.startswith("text_encoder"))


@pytest.mark.parametrize(
    ("pattern", "says"), [("unet.*to_nothing", "matches no layer"), ("unet.conv_in", "Conv2d"), ("unet*to_out.*", "Dropout")]
)
def test_bad_patterns_raise(backbone, pattern, says):
    with pytest.raises(InputError, match=says):
        find_targets(backbone.components, [pattern])


def test_a_lora_of_another_base_raises():
    with (
        pytest.raises(InputError, match="another base"),
        applied(nn.ModuleDict({"unet": nn.Linear(2, 2)}), {"unet.nowhere": Lora(torch.ones(1, 2), torch.ones(2, 1))}),
    ):
        pass


def test_bf16_base_with_fp32_updates(backbone):
    half = copy.deepcopy(backbone)
    half.components.to(torch.bfloat16)
    loras = random_loras(backbone)
    x = latents(2)
    cond = conditioning(backbone, 2)
    with torch.no_grad():
        with applied(backbone.components, loras):
            exact = backbone.predict(x, torch.tensor([500, 500]), cond)
        with applied(half.components, loras):
            rough = half.predict(x.bfloat16(), torch.tensor([500, 500]), {k: v.bfloat16() for k, v in cond.items()})
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.02
