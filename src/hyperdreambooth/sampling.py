"""From noise to latents: diffusers' schedulers, our guidance.

Identity guidance takes the base *without* the personal LoRA as the unconditional branch. With prompt scale g and
identity scale i the prediction is

    (1 - g) e(empty, base) + (g - i) e(prompt, base) + i e(prompt, person)

so g pushes along the prompt, i along the person, and a branch whose weight is zero isn't computed: g = i and g = 1
cost two branches, as plain guidance does. Plain guidance, (1 - g) e(empty, person) + g e(prompt, person), keeps the LoRA in
both branches; it strengthens the prompt alone.

The person is decided while there is much noise. Later, i above 1 only distorts what the prompt asked for, so it may fall to 1 on
the way (a guidance interval: Kynkäänniemi et al., arXiv 2404.07724).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from .backbones import Backbone, Conditioning
from .errors import InputError
from .lora import LoraSet, applied


def make_scheduler(pipe: Any, name: str | None = None) -> Any:
    """A fresh scheduler: the base's own, or one of diffusers' by class name, with the base's noise schedule.

    Raises InputError for a name that diffusers doesn't know or that can't run this base.
    """
    own = type(pipe.scheduler)
    kind: Any = own if name is None else getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        raise InputError(
            f"{name} is no scheduler of diffusers. Usual ones: DPMSolverMultistepScheduler, DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler."
        )
    config = pipe.scheduler.config
    flows = "FlowMatch" in own.__name__
    if flows and "FlowMatch" not in kind.__name__:
        if "use_flow_sigmas" not in inspect.signature(kind.__init__).parameters:
            raise InputError(f"{name} can't run this base, which is trained by flow matching. DPMSolverMultistepScheduler can.")
        config = {**config, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config.shift}
    if not flows and "FlowMatch" in kind.__name__:
        raise InputError(f"{name} can't run this base, which isn't trained by flow matching.")
    try:
        # latents leave [-1, 1]; schedulers that were made for pixels (DDIM) would clip them, where the base's config is silent
        return kind.from_config({"clip_sample": False, **config})
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{name} can't run this base: {error}") from error


def branches(guidance: float, identity: float | None) -> list[tuple[float, bool, bool]]:
    """The predictions to mix: (weight, with prompt, with person). Zero weights are left out."""
    if identity is None:
        mix = [(1 - guidance, False, True), (guidance, True, True)]
    else:
        mix = [(1 - guidance, False, False), (guidance - identity, True, False), (identity, True, True)]
    return [branch for branch in mix if abs(branch[0]) > 1e-9]


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Conditioning,
    negative: Conditioning,
    noise: Tensor,
    *,
    plain: Conditioning | None = None,
    personal: LoraSet | None = None,
    styles: LoraSet | None = None,
    steps: int = 20,
    guidance: float = 3.0,
    identity_guidance: float | None = None,
    identity_until: float = 1.0,
    embedded_guidance: float = 3.5,
    scheduler: str | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Denoises `noise` (B, C, h, w) into latents of the same shape.

    Args:
        prompts, negative: conditioning of B samples each.
        plain: the prompts' conditioning without the person, where a text encoder carries the person's LoRA.
        personal: one person's LoRA, or B of them; in every branch "with person".
        styles: LoRAs that stay in every branch; shared by the batch.
        identity_guidance: the scale i above; None is plain guidance.
        identity_until: the fraction of the steps, 0..1, after which that scale is 1 at most.
        embedded_guidance: the scale that a guidance-distilled base (Flux dev) takes as a condition; others have none.
        on_step: called after each step with its number.
    """
    schedule = make_scheduler(backbone.pipe, scheduler)
    backbone.set_timesteps(schedule, steps, noise)
    # flow schedulers start from unit noise and scale nothing
    latents = noise * getattr(schedule, "init_noise_sigma", 1.0)
    scale_input = getattr(schedule, "scale_model_input", lambda value, timestep: value)
    extra = {"generator": generator} if "generator" in schedule.step.__code__.co_varnames else {}
    identity = identity_guidance if personal else None
    strong = len(schedule.timesteps) if identity is None else round(identity_until * len(schedule.timesteps))
    number, count = 0, len(noise)
    later = None if identity is None else min(identity, 1.0)
    for scale, timesteps in ((identity, schedule.timesteps[:strong]), (later, schedule.timesteps[strong:])):
        if not len(timesteps):
            continue
        mix = branches(guidance, scale)
        parts = [negative if not prompted else prompts if who or plain is None else plain for _, prompted, who in mix]
        conditioning = {key: torch.cat([part[key] for part in parts]) for key in prompts}
        person = torch.tensor([float(who) for _, _, who in mix], device=noise.device).repeat_interleave(count)
        weights = torch.tensor([weight for weight, _, _ in mix], device=noise.device, dtype=noise.dtype).reshape(-1, 1, 1, 1, 1)
        if "guidance" in conditioning:
            conditioning["guidance"] = torch.full_like(conditioning["guidance"], embedded_guidance)
        with applied(backbone.components, styles or {}), applied(backbone.components, personal or {}, person if personal else None):
            for timestep in timesteps:
                tiled = scale_input(latents.repeat(len(mix), 1, 1, 1), timestep)
                predicted = backbone.predict(tiled, timestep.expand(len(tiled)), conditioning)
                mixed = (predicted.unflatten(0, (len(mix), count)) * weights).sum(0)
                latents = schedule.step(mixed, timestep, latents, **extra, return_dict=False)[0]
                number += 1
                if on_step:
                    on_step(number)
    return latents
