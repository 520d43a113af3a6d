"""Tokens: aux matrices from their recipe, gauge fixing, fingerprints; and the sources of updates built on them."""

from __future__ import annotations

import pytest
import torch

from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import Shape, compress
from hyperdreambooth.objectives import weight_loss
from hyperdreambooth.trainable_lora import HyperNetwork, IdentityTable, LightweightLora, RelaxedLora, orthonormal
from hyperdreambooth.training_settings import HyperNetworkConfig, LightweightConfig

TARGETS = {"unet.a": Shape(16, 24), "unet.b": Shape(20, 12)}
CONFIG = LightweightConfig(rank=1, down_dim=10, up_dim=8)


def tokens(batch: int = 3, config: LightweightConfig = CONFIG, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 2, config.width, generator=torch.Generator().manual_seed(seed))


def test_the_papers_numbers():
    layers = 192
    assert layers * LightweightConfig(down_dim=100, up_dim=50).width == 28_800


def test_aux_matrices_are_orthonormal_and_follow_from_the_recipe():
    a, b = LightweightLora(TARGETS, CONFIG), LightweightLora(dict(reversed(TARGETS.items())), CONFIG)
    for path in TARGETS:
        down, up = a.aux(path)
        torch.testing.assert_close(down @ down.mT, torch.eye(10), atol=1e-5, rtol=0)
        torch.testing.assert_close(up.mT @ up, torch.eye(8), atol=1e-5, rtol=0)
        assert torch.equal(down, b.aux(path)[0])  # aux matrices depend on the layer's path, not its index
    assert not torch.equal(a.aux("unet.a")[0], LightweightLora(TARGETS, LightweightConfig(1, 10, 8, seed=1)).aux("unet.a")[0])
    # pinned values: all machines and versions must generate the same numbers
    torch.testing.assert_close(orthonormal(2, 3, "key"), torch.tensor(PINNED), atol=1e-5, rtol=0)


PINNED = [[-0.5051346, -0.3675882, -0.7808444], [-0.8425330, 0.4060982, 0.3538678]]


@pytest.mark.parametrize("learnable", [False, True])
def test_building_leaves_the_global_generator_alone(learnable):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    light = LightweightLora(TARGETS, LightweightConfig(1, 10, 8, learnable=learnable))
    HyperNetwork(light.start(), 10, 6, HyperNetworkConfig(dim=16, blocks=1, heads=2))
    RelaxedLora(light(tokens()), 2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_aux_larger_than_a_layer_is_refused():
    with pytest.raises(InputError, match=r"unet\.a.*Lower"):
        LightweightLora(TARGETS, LightweightConfig(1, 18, 8))
    with pytest.raises(InputError, match=r"unet\.b"):
        LightweightLora(TARGETS, LightweightConfig(1, 10, 13))


def test_frozen_aux_is_neither_trained_nor_stored_and_learnt_aux_is_both():
    frozen = LightweightLora(TARGETS, CONFIG)
    assert not list(frozen.parameters())
    assert not frozen.state_dict()
    learnt = LightweightLora(TARGETS, LightweightConfig(1, 10, 8, learnable=True))
    assert len(list(learnt.parameters())) == len(learnt.state_dict()) == 4


@pytest.mark.parametrize("rank", [1, 3])
def test_tokens_make_the_update_they_say(rank):
    config = LightweightConfig(rank, 10, 8)
    light = LightweightLora(TARGETS, config)
    t = tokens(2, config)
    loras = light(t)
    down_token, up_token = light.split(t[1, 0])
    down_aux, up_aux = light.aux("unet.a")
    torch.testing.assert_close(loras.select(1)["unet.a"].delta(), up_aux @ up_token @ down_token @ down_aux)
    assert loras["unet.b"].rank == rank


def test_fingerprints_tell_recipes_and_contents_apart():
    base = LightweightLora(TARGETS, CONFIG).fingerprint()
    assert base == LightweightLora(TARGETS, CONFIG).fingerprint()
    assert base != LightweightLora(TARGETS, LightweightConfig(1, 10, 8, seed=2)).fingerprint()
    assert base != LightweightLora({"unet.a": TARGETS["unet.a"]}, CONFIG).fingerprint()
    learnt = LightweightLora(TARGETS, LightweightConfig(1, 10, 8, learnable=True))
    before = learnt.fingerprint()
    with torch.no_grad():
        learnt.aux("unet.a")[0].add_(0.1)
    assert learnt.fingerprint() != before


def test_weight_loss_is_gauge_invariant_and_the_frobenius_distance():
    light = LightweightLora(TARGETS, CONFIG)
    a, b = tokens(seed=1), tokens(seed=2)
    scaled = torch.cat([a[..., :10] * 3, a[..., 10:] / 3], -1)
    torch.testing.assert_close(weight_loss(light(a), light(b)), weight_loss(light(scaled), light(b)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight_loss(light(a), light(scaled)), torch.zeros(3), atol=1e-3, rtol=0)
    expected = torch.stack([(light(a)[p].delta() - light(b)[p].delta()).square().sum((-2, -1)) for p in TARGETS]).mean(0)
    torch.testing.assert_close(weight_loss(light(a), light(b)), expected, rtol=1e-4, atol=1e-4)


def test_identities_start_alike_with_a_gradient():
    table = IdentityTable(3, LightweightLora(TARGETS, CONFIG))
    loras = table(torch.tensor([0, 2]))
    assert loras["unet.a"].delta().abs().max() == 0
    assert torch.equal(table.tokens[0], table.tokens[2])
    sum(lora.delta().sum() for lora in loras.values()).backward()
    assert table.tokens.grad[0].abs().max() > 0
    assert table.tokens.grad[1].abs().max() == 0  # this identity isn't in the batch


def test_an_untrained_hypernetwork_predicts_no_update_but_learns():
    light = LightweightLora(TARGETS, LightweightConfig(1, 10, 8, learnable=True))
    net = HyperNetwork(light.start(), 10, 6, HyperNetworkConfig(dim=16, blocks=1, heads=2, passes=3))
    features = torch.randn(4, 5, 6)
    loras = light(net(features))
    assert all(lora.delta().abs().max() == 0 for lora in loras.values())
    sum((lora.delta() - 1).square().sum() for lora in loras.values()).backward()
    assert net.head.grad.abs().max() > 0
    alone = net(features[:1])
    torch.testing.assert_close(net(features)[:1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", ["residual", "merged"])
def test_relaxation_starts_at_the_prediction_and_raises_the_rank(order):
    light = LightweightLora(TARGETS, CONFIG)
    predicted = light(tokens())
    source = RelaxedLora(predicted, 3, order=order)
    start = source()
    for path in TARGETS:
        torch.testing.assert_close(start[path].delta(), predicted[path].delta())
        assert start[path].rank == 4
    with torch.no_grad():
        for up in source.ups:
            up.add_(torch.randn(up.shape, generator=torch.Generator().manual_seed(0)))
    moved = source().detach().select(0)
    for path in TARGETS:
        assert torch.linalg.matrix_rank(moved[path].delta()) == 4
        small = compress(moved[path])
        assert small.rank == 4
        torch.testing.assert_close(small.delta(), moved[path].delta(), atol=1e-5, rtol=1e-4)
    trained = sum(p.numel() for p in source.parameters())
    assert trained == 3 * (4 if order == "merged" else 3) * sum(sum(shape) for shape in TARGETS.values())


def test_relaxation_from_scratch_needs_targets():
    source = RelaxedLora(None, 2, targets=TARGETS)
    assert source()["unet.a"].delta().abs().max() == 0
    with pytest.raises(ValueError, match="targets"):
        RelaxedLora(None, 2)
