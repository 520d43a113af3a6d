"""Two ways from pictures to noise, of which each family has one.

Discrete: alpha_t * latents + sigma_t * noise over the scheduler's own 1000 steps; the denoiser predicts the noise or the velocity.
Flow: (1 - u) * latents + u * noise; the denoiser predicts noise - latents (Lipman et al., arXiv 2210.02747; Esser et al., arXiv
2403.03206). Time steps are 1000 u, as diffusers' flow schedulers count.
"""

import math
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..errors import InputError
from .base import Backbone

FLOW_STEPS = 1000


class Discrete(Backbone):
    """A base with a discrete schedule. Raises InputError for one that isn't trained on here."""

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        config = pipe.scheduler.config
        kind = config.get("prediction_type", "epsilon")
        if "beta_schedule" not in config or kind not in ("epsilon", "v_prediction"):
            raise InputError(
                f"this base's scheduler ({type(pipe.scheduler).__name__}, prediction {kind}) has no discrete schedule with epsilon or v "
                "prediction, so it can't be trained on here."
            )
        self.schedule: Any = DDPMScheduler.from_config(config)
        alphas = self.schedule.alphas_cumprod.double()
        self.levels = (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())
        """The noise level of each step."""

    def steps_for(self, levels: Tensor) -> Tensor:
        steps = torch.searchsorted(self.levels, levels.detach().cpu().double().clamp(0, 1))
        return steps.clamp(max=len(self.levels) - 1).to(self.device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy: Tensor = self.schedule.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        velocity = self.schedule.config.prediction_type == "v_prediction"
        wanted: Tensor = self.schedule.get_velocity(latents, noise, timesteps) if velocity else noise
        return wanted


class Flow(Backbone):
    """A base that is trained by flow matching."""

    def steps_for(self, levels: Tensor) -> Tensor:
        return FLOW_STEPS * levels.detach().float().clamp(0, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        level = (timesteps / FLOW_STEPS).to(latents).reshape(-1, *[1] * (latents.ndim - 1))
        return (1 - level) * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def set_timesteps(self, schedule: Any, steps: int, noise: Tensor, **more: Any) -> None:
        """Larger pictures take more time steps at high noise.

        The shift is linear in the number of 2 x 2 patches between two published anchors (Esser et al., section 5.3.2; the
        scheduler's config has the anchors).
        """
        config = schedule.config
        if config.get("use_dynamic_shifting"):
            patches = math.prod(noise.shape[-2:]) // 4
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            more["mu"] = low + (high - low) * (patches - few) / (many - few)
        super().set_timesteps(schedule, steps, noise, **more)
