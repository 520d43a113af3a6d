"""Two ways from pictures to noise, as plain functions that a family's class takes as its methods.

discrete: alpha_t * latents + sigma_t * noise over the scheduler's own 1000 steps; the denoiser predicts the noise or the velocity.
flow: (1 - u) * latents + u * noise; the denoiser predicts noise - latents (Lipman et al., arXiv 2210.02747; Esser et al., arXiv
2403.03206). Time steps are 1000 u, as diffusers' flow schedulers count.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..errors import InputError

FLOW_STEPS = 1000


class Discrete(Protocol):
    """A backbone with a discrete schedule and the noise level of each of its steps."""

    schedule: Any
    levels: Tensor

    @property
    def device(self) -> torch.device: ...


def discrete(pipe: Any) -> tuple[Any, Tensor]:
    """The forward process of a pipeline, and each step's noise level. Raises InputError for one that isn't trained on here."""
    config = pipe.scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if "beta_schedule" not in config or kind not in ("epsilon", "v_prediction"):
        raise InputError(
            f"this base's scheduler ({type(pipe.scheduler).__name__}, prediction {kind}) has no discrete schedule with epsilon or v prediction, "
            "so it can't be trained on here."
        )
    schedule = DDPMScheduler.from_config(config)
    alphas = schedule.alphas_cumprod.double()
    return schedule, (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())


def discrete_steps_for(self: Discrete, levels: Tensor) -> Tensor:
    steps = torch.searchsorted(self.levels, levels.detach().cpu().double().clamp(0, 1))
    return steps.clamp(max=len(self.levels) - 1).to(self.device)


def discrete_add_noise(self: Discrete, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    noisy: Tensor = self.schedule.add_noise(latents, noise, timesteps)
    return noisy


def discrete_target(self: Discrete, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    if self.schedule.config.prediction_type == "v_prediction":
        velocity: Tensor = self.schedule.get_velocity(latents, noise, timesteps)
        return velocity
    return noise


def discrete_set_timesteps(self: object, schedule: Any, steps: int, noise: Tensor) -> None:
    schedule.set_timesteps(steps, device=noise.device)


def flow_steps_for(self: object, levels: Tensor) -> Tensor:
    return FLOW_STEPS * levels.detach().float().clamp(0, 1)


def flow_add_noise(self: object, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    level = (timesteps / FLOW_STEPS).to(latents).reshape(-1, *[1] * (latents.ndim - 1))
    return (1 - level) * latents + level * noise


def flow_target(self: object, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    return noise - latents


def flow_set_timesteps(schedule: Any, steps: int, noise: Tensor, **more: Any) -> None:
    """Sets a flow scheduler's time steps for latents like `noise`: larger pictures take more of them at high noise.

    The shift is linear in the number of 2 x 2 patches between two published anchors (Esser et al., section 5.3.2; the
    scheduler's config has the anchors).
    """
    config = schedule.config
    if config.get("use_dynamic_shifting"):
        patches = math.prod(noise.shape[-2:]) // 4
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        more["mu"] = low + (high - low) * (patches - few) / (many - few)
    schedule.set_timesteps(steps, device=noise.device, **more)
