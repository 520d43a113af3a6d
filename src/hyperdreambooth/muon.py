"""Muon: every matrix's update is made orthogonal, so that directions with small gradients move as far as those with large ones.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaled so that AdamW's learning rates serve
(Liu et al., arXiv 2502.16982, section 2.2). `torch.optim.Muon` does this for single matrices, one after another, and rounds to
bfloat16 in between. A hypernetwork's heads and the LoRAs of a batch of people are stacks of matrices: here each matrix of a stack is
updated as if it were alone, all of one size are orthogonalized together, and in the precision of the parameters. A convolution's kernel
is one matrix: its rows are the weights of one output. Vectors get torch's AdamW.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

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
        with torch.enable_grad():
            loss = closure() if closure else None
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
                updates = self._matrices(parameters, group)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            if vectors:
                self._vectors(vectors, group)
        return loss

    def _matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Updates of parameters whose matrices are of one size."""
        gradients = [_gradient(parameter) for parameter in parameters]
        states = [self.state[parameter] for parameter in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        stacks = [_stack(one) for one in nesterov]
        updates = orthogonalized(torch.cat(stacks)) * (0.2 * max(stacks[0].shape[1:]) ** 0.5)  # the root mean square of AdamW's updates
        return [part.view_as(one) for part, one in zip(updates.split([len(stack) for stack in stacks]), nesterov, strict=True)]

    def _vectors(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW, as torch has it."""
        states = [self.state[parameter] for parameter in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        settings = {"amsgrad": False, "maximize": False, **{key: group[key] for key in ("lr", "weight_decay", "eps")}}
        settings["beta1"], settings["beta2"] = group["betas"]
        adamw(parameters, [_gradient(one) for one in parameters], means, squares, [], steps, foreach=True, **settings)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _stack(tensor: Tensor) -> Tensor:
    """A parameter's matrices, (count, rows, columns)."""
    matrices = tensor.flatten(1) if tensor.ndim > 3 else tensor
    return matrices if matrices.ndim == 3 else matrices[None]
