"""Muon: every matrix's update is made orthogonal, so that rare directions move as far as the loudest ones.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaled so that AdamW's learning rates serve
(Liu et al., arXiv 2502.16982, section 2.2). torch has it for single matrices; a hypernetwork's heads and the LoRAs of a batch of people
are stacks of them, and each matrix of a stack is updated as if it were alone. A convolution's kernel is one matrix, from all that one
output sees. Vectors get AdamW's update. Matrices of one size are orthogonalized side by side: a GPU waits for launches otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration: after five rounds all singular values are some 0.7 to 1.2."""


def orthogonalized(matrices: Tensor, rounds: int = 5) -> Tensor:
    """About U V^T of each matrix's U S V^T: (..., rows, columns) -> the same shape."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for parameters (rows, columns), stacks of them (count, rows, columns) and kernels (out, in, height, width), AdamW for vectors."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of whatever has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            vectors = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.ndim > 1:
                    alike[_stack(parameter).shape[1:], parameter.device, parameter.dtype].append(parameter)
                else:
                    vectors.append(parameter)
            for parameters in alike.values():
                _apply(parameters, self._matrices(parameters, group), group)
            if vectors:
                _apply(vectors, self._vectors(vectors, group), group)
        return loss

    def _matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Updates of parameters whose matrices are of one size."""
        gradients = [_gradient(parameter) for parameter in parameters]
        states = [self.state[parameter] for parameter in parameters]
        for state, gradient in zip(states, gradients, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
        momenta = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        stacks = [_stack(one) for one in nesterov]
        updates = orthogonalized(torch.cat(stacks)) * (0.2 * max(stacks[0].shape[1:]) ** 0.5)  # the root mean square of AdamW's updates
        return [part.view_as(one) for part, one in zip(updates.split([len(stack) for stack in stacks]), nesterov, strict=True)]

    def _vectors(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """AdamW's updates."""
        gradients = [_gradient(parameter) for parameter in parameters]
        states = [self.state[parameter] for parameter in parameters]
        for state, gradient in zip(states, gradients, strict=True):
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(gradient))
            state["step"] += 1
        first, second = group["betas"]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - second)
        done = [state["step"].item() for state in states]
        scales = torch._foreach_sqrt(torch._foreach_div(squares, [1 - second**steps for steps in done]))
        torch._foreach_add_(scales, group["eps"])
        return list(torch._foreach_div(torch._foreach_div(means, [1 - first**steps for steps in done]), scales))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _stack(tensor: Tensor) -> Tensor:
    """A parameter's matrices, (count, rows, columns)."""
    matrices = tensor.flatten(1) if tensor.ndim > 3 else tensor
    return matrices if matrices.ndim == 3 else matrices[None]


def _apply(parameters: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
    torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(parameters, updates, alpha=-group["lr"])
