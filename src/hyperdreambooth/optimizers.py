"""Optimizers and learning rates of the training loop."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from .training_settings import TrainingConfig

MOMENTUM = 0.95  # Muon's.


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, a plateau, and a linear decay to zero over the last fraction `cooldown` of the steps."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    tail = config.cooldown * config.steps
    fall = min(1.0, (config.steps - step) / tail) if tail else 1.0
    return config.learning_rate * rise * max(fall, 0.0)


def make_optimizer(groups: list[dict[str, Any]], config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that `config` names, for these parameter groups."""
    if config.optimizer == "muon":
        return Muon(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    settings: dict[str, Any] = {}
    if device.type == "cuda":  # step counts and learning rates on the device, so that a step can be recorded as a CUDA graph
        groups = [{**group, "lr": torch.tensor(config.learning_rate, device=device)} for group in groups]
        settings = {"capturable": True, "fused": True}
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, **settings)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's learning rate to `rate` times its `lr_scale`. One that is a tensor is changed in place, for CUDA graphs."""
    for group in optimizer.param_groups:
        value = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


class Muon(torch.optim.AdamW):
    """Muon orthogonalizes the update of every matrix, so that directions with small gradients move as far as those with large ones.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaled so that AdamW's learning rates fit (Liu et
    al., arXiv 2502.16982, section 2.2). Each matrix of a stack (count, rows, columns), such as a hypernetwork's heads, is updated on its
    own, in the precision of the parameters (`torch.optim.Muon` takes single matrices, and rounds to bfloat16). A kernel (out, in,
    height, width) is one matrix of `out` rows. Vectors are updated by AdamW. A step sets the gradients of matrices to None.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay, foreach=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's own would expect its moments for matrices too
        for group in self.param_groups:
            group |= {key: value for key, value in self.defaults.items() if key not in group}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.ndim > 1:
                    alike[_stack(parameter).shape[1:], parameter.device, parameter.dtype].append(parameter)
            for parameters in alike.values():
                updates = self._updates(parameters)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-group["lr"])
                for parameter in parameters:
                    parameter.grad = None  # AdamW updates the parameters that still have one
        super().step()

    def _updates(self, parameters: list[Tensor]) -> list[Tensor]:
        """The updates of parameters whose matrices have the same size, orthogonalized in one batch."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        stacks = [_stack(one) for one in torch._foreach_lerp(gradients, momenta, MOMENTUM)]  # Nesterov momentum
        updates = orthogonalized(torch.cat(stacks)) * (0.2 * max(stacks[0].shape[1:]) ** 0.5)  # to the root mean square of AdamW's updates
        return [part.view_as(one) for part, one in zip(updates.split([len(stack) for stack in stacks]), parameters, strict=True)]


def orthogonalized(matrices: Tensor) -> Tensor:
    """Approximates U V^T for each matrix U S V^T: (..., rows, columns) -> the same shape, with singular values of about 0.7 to 1.2."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315  # Muon's coefficients, for five rounds of a quintic Newton-Schulz iteration
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _stack(tensor: Tensor) -> Tensor:
    """A parameter's matrices, (count, rows, columns)."""
    matrices = tensor.flatten(1) if tensor.ndim > 3 else tensor
    return matrices if matrices.ndim == 3 else matrices[None]
