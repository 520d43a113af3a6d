"""Muon compared with torch's Muon, which supports single matrices only, and with AdamW for vectors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperdreambooth import checkpoint
from hyperdreambooth.optimizers import Muon, make_optimizer, orthogonalized
from hyperdreambooth.training import Run, fit

from .test_training import CONFIG, batches, model, step, weights


def descend(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], steps: int = 4, seed: int = 0) -> None:
    """The same gradients for whoever asks."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_a_matrix_gets_the_update_of_torch_s_muon(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    descend(Muon([mine], lr=0.1, weight_decay=0.2), [mine])
    descend(torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"), [theirs])
    torch.testing.assert_close(mine, theirs, atol=5e-3, rtol=0.05)  # torch's Muon iterates in bfloat16
    assert (mine - start).abs().max() > 0.1


def test_a_vector_gets_adamw_s_update():
    mine, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    descend(Muon([mine], lr=0.1, weight_decay=0.2), [mine])
    descend(torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2), [theirs])
    torch.testing.assert_close(mine, theirs)


def test_matrices_of_a_stack_do_not_affect_one_another():
    start = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    gradients = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3)) * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1, 1)
    stack = torch.nn.Parameter(start.clone())
    stack.grad = gradients.clone()
    Muon([stack], lr=0.1).step()
    for index in range(3):
        alone = torch.nn.Parameter(start[index].clone())
        alone.grad = gradients[index].clone()
        Muon([alone], lr=0.1).step()
        torch.testing.assert_close(stack[index], alone)


def test_a_kernel_gets_the_update_of_one_matrix():
    start = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(4))
    kernel, matrix = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.flatten(1).clone())
    optimizers = Muon([kernel], lr=0.1), Muon([matrix], lr=0.1)
    for seed in (5, 6):  # the second step uses the momentum of the first
        kernel.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        matrix.grad = kernel.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel.flatten(1), matrix)
    assert not torch.equal(kernel, start)


def test_parameters_of_one_matrix_size_do_not_affect_one_another():
    shapes = [(4, 12), (3, 4, 12), (4, 3, 2, 2), (4, 12), (5, 5), (7,), (7,)]
    starts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate(shapes)]
    together = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = Muon(together, lr=0.1, weight_decay=0.2)
    alone = [torch.nn.Parameter(start.clone()) for start in starts]
    others = [Muon([parameter], lr=0.1, weight_decay=0.2) for parameter in alone]
    for seed in (5, 6):  # the second step uses the optimizer state of the first
        for index, (one, other) in enumerate(zip(together, alone, strict=True)):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(10 * seed + index))
            other.grad = one.grad.clone()
        for each in (optimizer, *others):
            each.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.sampled_from([1e-4, 1.0, 1e4]))
def test_singular_values_become_alike(rows, columns, seed, scale):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    spread = u * (0.1 + s / s.max()) @ vh * scale
    found = torch.linalg.svdvals(orthogonalized(spread))
    assert found.min() > 0.5
    assert found.max() < 1.3


def test_a_training_with_muon_learns_and_resumes_exactly(tmp_path):
    config = dataclasses.replace(CONFIG, optimizer="muon", learning_rate=0.1, steps=60, cooldown=0.0)
    resumed, whole = model(), model()
    assert isinstance(make_optimizer([{"params": list(whole.parameters())}], config, torch.device("cpu")), Muon)
    fit(step, resumed, batches, config, Run(directory=tmp_path, quiet=True, device="cpu", minutes=0.0))
    assert 0 < checkpoint.load(tmp_path / "state.safetensors")[3]["step"] < 60
    fit(step, resumed, batches, config, Run(directory=tmp_path, quiet=True, device="cpu"))
    report = fit(step, whole, batches, config, Run(quiet=True, device="cpu"))
    assert report.losses[-1][1] < 0.5 * report.losses[0][1]
    for a, b in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(a, b)
