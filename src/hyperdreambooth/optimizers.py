"""Optimizers and learning rates of the training loop."""

from typing import Any

import torch

from .errors import InputError
from .muon import Muon
from .training_settings import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, a plateau, and a linear fall over the last `cooldown` of the steps."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    tail = config.cooldown * config.steps
    fall = min(1.0, (config.steps - step) / tail) if tail else 1.0
    return config.learning_rate * rise * max(fall, 0.0)


def make_optimizer(groups: list[dict[str, Any]], config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of `config` over parameter groups. Raises InputError where its package is missing.

    On CUDA, AdamW keeps its step counts and learning rates on the device, so that a step can be recorded as a CUDA graph.
    """
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # the learning rate as it is given: scaled by a weight's size, a LoRA that starts at zero would hardly move
        own = [{key: value for key, value in group.items() if key != "eps"} for group in groups]
        found: torch.optim.Optimizer = Adafactor(own, **settings, scale_parameter=False, relative_step=False)
        return found
    if config.optimizer == "muon":
        return Muon(groups, **settings)
    if config.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise InputError("adamw8bit needs bitsandbytes: pip install 'hyperdreambooth[8bit]', or take adamw.") from error
        eight: torch.optim.Optimizer = AdamW8bit(groups, **settings)
        return eight
    if device.type == "cuda":
        groups = [{**group, "lr": torch.tensor(config.learning_rate, device=device)} for group in groups]
        return torch.optim.AdamW(groups, **settings, capturable=True, fused=True)
    return torch.optim.AdamW(groups, **settings)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's learning rate: `rate` times its `lr_scale`. One that is a tensor stays the same tensor."""
    for group in optimizer.param_groups:
        value = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
