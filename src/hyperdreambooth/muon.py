"""Muon: every matrix's update is made orthogonal, so that rare directions move as far as the loudest ones.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaled so that AdamW's learning rates serve
(Liu et al., arXiv 2502.16982, section 2.2). torch has it for single matrices; a hypernetwork's heads and the LoRAs of a batch of people
are stacks of them, and each matrix of a stack is updated as if it were alone. A convolution's kernel is one matrix, from all that one
output sees. Vectors get AdamW's update.
"""

from __future__ import annotations

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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                rule = self._matrices if parameter.ndim > 1 else self._vector
                update = rule(self.state[parameter], parameter.grad, group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return loss

    def _matrices(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        if gradient.ndim > 3:
            return self._matrices(state, gradient.flatten(1), group).view_as(gradient)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        nesterov = gradient.lerp(momentum, group["momentum"])
        return orthogonalized(nesterov) * (0.2 * max(gradient.shape[-2:]) ** 0.5)  # the root mean square of AdamW's updates

    def _vector(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(gradient))
        state["step"] += 1
        done, (first, second) = state["step"].item(), group["betas"]
        mean: Tensor = state["exp_avg"].lerp_(gradient, 1 - first)
        square: Tensor = state["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
        return mean / (1 - first**done) / ((square / (1 - second**done)).sqrt() + group["eps"])
