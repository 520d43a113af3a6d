"""Pictures of a person from prompts: sampling with diffusers' schedulers and three kinds of guidance.

Plain (classifier-free) guidance of scale g, (1 - g) e(empty, person) + g e(prompt, person), has the personal LoRA in both
branches and strengthens the prompt alone. Identity guidance has the base *without* the LoRA as its unconditional branch.
With prompt scale g and identity scale i the prediction is

    (1 - g) e(empty, base) + (g - i) e(prompt, base) + i e(prompt, person)

so g is the strength of the prompt, and i that of the person. A branch whose weight is zero isn't computed: g = i and g = 1
cost two branches, as plain guidance does.

Context guidance is identity guidance with i = 1 in the first steps, before plain guidance: the first steps decide what a prompt asks for
(a hat, a background), by the base's prediction, since a LoRA may have weakened the prompt's effect. In later steps, i above 1 only distorts
what the prompt asked for, so it may fall to 1 after some of them (a guidance interval: Kynkäänniemi et al., arXiv 2404.07724).
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor

from . import replay
from .backbones import Backbone, Conditioning
from .data import PromptCache
from .errors import InputError, refusing
from .lora import Hooks, Lora, LoraSet, applied, mergeable, merged
from .progress import say
from .settings import GenerateConfig

# Schedulers for bases that are trained by flow matching.
FLOW = [f"FlowMatch{name}DiscreteScheduler" for name in ("Euler", "Heun")]
FLOW += ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"]


def schedulers(flow: bool) -> list[str]:
    """The class names of diffusers' schedulers that can be used with the installed packages, for bases with or without flow matching."""
    # diffusers calls the EDM scheduler compatible too, but with it only noise comes out
    discrete = [one.name for one in KarrasDiffusionSchedulers if "EDM" not in one.name] + ["LCMScheduler", "TCDScheduler"]
    return [name for name in (FLOW if flow else discrete) if not hasattr(getattr(diffusers, name), "_backends")]


def check_scheduler(name: str | None, flow: bool | None) -> None:
    """Raises InputError for a scheduler that can't be used, naming those that can. No model is loaded for that.

    Args:
        flow: whether the base is trained by flow matching; None if that isn't known yet.
    """
    able = [one for kind in (False, True) if flow in (kind, None) for one in schedulers(kind)]
    if name is None or name in able:
        return
    kind = getattr(diffusers, name, None)
    why = "can't draw here"
    if lacking := [package for package in getattr(kind, "_backends", ()) if importlib.util.find_spec(package) is None]:
        why = f"needs {' and '.join(lacking)}, which isn't installed"
    elif not hasattr(kind, "from_config"):
        why = "is no scheduler of diffusers"
    elif flow or (flow is False and "Flow" in name):
        verb = "is" if flow else "isn't"
        why = f"can't run this base, which {verb} trained by flow matching"
    raise InputError(f"{name} {why}. Those that can: {', '.join(able)}.")


def make_scheduler(pipe: Any, name: str | None = None) -> Any:
    """A new scheduler: of the base's own class, or one of diffusers' by class name, with the base's noise schedule.

    Raises InputError for a name that diffusers doesn't know or that can't run this base.
    """
    own, config = type(pipe.scheduler), pipe.scheduler.config
    flow = "FlowMatch" in own.__name__
    if name not in (None, own.__name__):
        check_scheduler(name, flow)
    kind: Any = getattr(diffusers, name) if name else own
    if flow and "FlowMatch" not in kind.__name__:
        config = {**config, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config.shift}
    try:
        # latents leave [-1, 1]; schedulers that were made for pixels (DDIM) clip them unless the config says otherwise
        return kind.from_config({"clip_sample": False, **config})
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{name} can't run this base: {error}") from error


Branch = tuple[float, bool, bool]


def branches(guidance: float, identity: float | None) -> list[Branch]:
    """The predictions to mix: (weight, with prompt, with person). Zero weights are left out."""
    if identity is None:
        mix = [(1 - guidance, False, True), (guidance, True, True)]
    else:
        mix = [(1 - guidance, False, False), (guidance - identity, True, False), (identity, True, True)]
    return [branch for branch in mix if abs(branch[0]) > 1e-9]


def phases(settings: GenerateConfig) -> tuple[list[Branch], float, list[Branch]]:
    """The branches of the early steps, the fraction of the steps that they take, and the branches of the later ones."""
    plain = branches(settings.guidance, settings.identity)
    if settings.identity is not None:
        return plain, settings.identity_until, branches(settings.guidance, min(settings.identity, 1.0))
    return branches(settings.context_guidance, 1.0), settings.context_until, plain


@dataclass
class Prompts:
    """Conditioning of B samples."""

    positive: Conditioning
    negative: Conditioning  # Of the negative prompt, which may be empty.
    plain: Conditioning | None = None
    """Of the prompt by text encoders without the person's LoRA, for the branches without the person. Default: `positive`."""
    plain_negative: Conditioning | None = None
    """Of the negative prompt by text encoders without the person's LoRA, for the same branches. Default: `negative`."""


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Prompts,
    noise: Tensor,
    settings: GenerateConfig,
    *,
    personal: LoraSet | None = None,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """Denoises `noise` (B, C, h, w) into latents of the same shape.

    Args:
        settings: steps, scheduler and the scales of guidance.
        personal: one person's LoRA, or a batch of B; it is in every branch that is "with person".
        generators: one for each of the B samples, for the noise that stochastic schedulers add in every step.
    """
    schedule = make_scheduler(backbone.pipe, settings.scheduler)
    what = f"{type(schedule).__name__} can't take {settings.steps} steps"
    with refusing(what, ValueError, IndexError, ZeroDivisionError, advice="Take more steps, or another scheduler."):
        backbone.set_timesteps(schedule, settings.steps, noise)
    # flow schedulers start from unit noise and scale nothing
    latents = noise * getattr(schedule, "init_noise_sigma", 1.0)
    scale_input = getattr(schedule, "scale_model_input", lambda value, timestep: value)
    extra = {"generator": generators} if "generator" in schedule.step.__code__.co_varnames else {}
    count = len(noise)
    first, until, then = phases(settings) if personal else (branches(settings.guidance, None), 1.0, [])
    early = round(until * len(schedule.timesteps))
    for mix, timesteps in ((first, schedule.timesteps[:early]), (then, schedule.timesteps[early:])):
        if not len(timesteps):
            continue
        plain, plain_negative = prompts.plain or prompts.positive, prompts.plain_negative or prompts.negative
        own, base = (prompts.negative, prompts.positive), (plain_negative, plain)
        parts = [(own if with_person else base)[prompted] for _, prompted, with_person in mix]
        conditioning = {key: torch.cat([part[key] for part in parts]) for key in prompts.positive}
        person = torch.tensor([float(with_person) for _, _, with_person in mix], device=noise.device).repeat_interleave(count)
        weights = torch.tensor([weight for weight, _, _ in mix], device=noise.device, dtype=noise.dtype).reshape(-1, 1, 1, 1, 1)
        if "guidance" in conditioning:
            conditioning["guidance"] = torch.full_like(conditioning["guidance"], settings.embedded_guidance)
        with denoiser(backbone, personal or LoraSet(), None if all(with_person for _, _, with_person in mix) else person) as predict:
            for timestep in timesteps:
                tiled = scale_input(latents.repeat(len(mix), 1, 1, 1), timestep)
                predicted = predict({"noisy": tiled, "timesteps": timestep.expand(len(tiled)), **conditioning})
                mixed = (predicted.unflatten(0, (len(mix), count)) * weights).sum(0)
                latents = schedule.step(mixed, timestep, latents, **extra, return_dict=False)[0]
    return latents


@contextmanager
def denoiser(backbone: Backbone, personal: LoraSet, person: Tensor | None) -> Iterator[replay.Work]:
    """The denoiser with a person's LoRA, as a function of a batch: noisy latents, time steps and conditioning.

    One person's LoRA for the whole batch is merged into the weights, so that steps cost nothing extra. Several people, and branches
    without the person, need hooks.

    Args:
        person: (B,) 1 for samples with the person's LoRA and 0 for those without; None if all have it.
    """
    # other hooks on the denoiser (a user's, or a fine-tuning's) may compute something else in every call, which a recording would miss
    record = not any(module._forward_hooks for module in backbone.denoiser.modules())
    key = (replay.token(backbone), replay.fingerprint(backbone.denoiser))

    def recorded(work: replay.Work, way: str) -> replay.Work:
        return replay.Replayed(work, (*key, way)) if record else work

    def predicted(batch: replay.Inputs) -> Tensor:
        own = ("noisy", "timesteps", "person")
        conditioning = {key: value for key, value in batch.items() if key not in own and not key.startswith("lora.")}
        return backbone.predict(batch["noisy"], batch["timesteps"], conditioning)

    mine = LoraSet({path: lora for path, lora in personal.items() if not is_text(path, backbone)})
    if person is None and mergeable(backbone.components, mine):
        with merged(backbone.components, mine):
            yield recorded(predicted, "merged")
        return
    with Hooks(backbone.components, mine) as hooks:
        static = {f"lora.{path}.{side}": getattr(lora, side) for path, lora in mine.items() for side in ("down", "up")}
        static |= {"person": person} if person is not None else {}

        def work(batch: replay.Inputs) -> Tensor:
            # the updates are inputs of the recording, so that the next person can use it too
            hooks.set({path: Lora(batch[f"lora.{path}.down"], batch[f"lora.{path}.up"]) for path in mine}, batch.get("person"))
            return predicted(batch)

        predict = recorded(work, "hooks")
        yield lambda batch: predict({**batch, **static})


def is_text(path: str, backbone: Backbone) -> bool:
    """Whether a layer is one of a text encoder."""
    return path.split(".")[0] in backbone.text_components


def noise_for(backbone: Backbone, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
    """Initial noise (B, C, h, w), each sample's from its own seed, so that a picture doesn't depend on the others in its batch."""
    shape = backbone.latent_shape(height, width)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(backbone.device)


def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: GenerateConfig,
    *,
    personal: LoraSet | None = None,
    on_picture: Callable[[int], None] | None = None,
) -> Tensor:
    """One picture for each (prompt, seed): (N, 3, H, W) in -1..1.

    Args:
        personal: one person's LoRA, or a batch of N, one for each picture.
        on_picture: called with the number of pictures done.

    Raises InputError where width or height don't fit the base.
    """
    for name, value in (("width", config.width), ("height", config.height)):
        if value is not None and (value < 1 or value % backbone.unit):
            raise InputError(f"{name} must be a multiple of {backbone.unit} for this base, not {value}.")
    cache, pictures, groups = PromptCache(backbone), dict[int, Tensor](), dict[int, list[int]]()
    scaled = personal.scaled(config.strength) if personal else None
    batched = scaled is not None and next(iter(scaled.values())).down.ndim == 3
    # a batch is padded to its longest prompt, and the denoiser attends to empty chunks: prompts of as many chunks are drawn together
    for index, prompt in enumerate(prompts):
        groups.setdefault(cache.longest([prompt, config.negative]), []).append(index)
    for chunks, part in ((n, group[i : i + config.batch]) for n, group in groups.items() for i in range(0, len(group), config.batch)):
        mine = scaled.select(torch.tensor(part)) if scaled and batched else scaled
        wanted, own_seeds = [prompts[index] for index in part], [seeds[index] for index in part]
        noise = noise_for(backbone, own_seeds, config.height, config.width)
        without = [config.negative] * len(wanted)
        conditioning = plain = cache(wanted, without)
        negative = plain_negative = cache(without, wanted)
        text = LoraSet({path: lora for path, lora in (mine or {}).items() if is_text(path, backbone)})
        if text:  # it belongs to the branches with the person
            with applied(backbone.components, text), torch.no_grad():
                conditioning = backbone.encode_prompts(wanted, chunks)
                negative = negative if config.identity is not None else backbone.encode_prompts(without, chunks)
        generators = [torch.Generator().manual_seed(seed) for seed in own_seeds]
        embedded = Prompts(conditioning, negative, plain, plain_negative)
        latents = sample(backbone, embedded, noise, config, personal=mine, generators=generators)
        pictures |= zip(part, decoded(backbone, latents).cpu(), strict=True)
        if on_picture:
            on_picture(len(pictures))
    return torch.stack([pictures[index] for index in range(len(prompts))])


def decoded(backbone: Backbone, latents: Tensor) -> Tensor:
    """Decodes latents into pictures (B, 3, H, W) in -1..1.

    If the autoencoder overflows in half precision, it computes in float32 from then on, with a message. Raises InputError, naming the
    culprit, if values still aren't finite or a picture has one color alone.
    """
    dtype = str(backbone.denoiser.dtype).removeprefix("torch.")
    if not latents.isfinite().all():
        culprit = f"the denoiser, or a LoRA in it, gave values that aren't finite in {dtype}"
        raise InputError(f"no picture came out: {culprit}. Try --dtype float32, or a lower strength of the LoRA.")
    pixels = backbone.decode_images(latents)
    precision = backbone.pipe.vae.dtype
    if not pixels.isfinite().all() and precision != torch.float32 and not backbone.vae_in_float32:
        say(f"the autoencoder overflowed in {str(precision).removeprefix('torch.')}: it goes on in float32.")
        backbone.vae_in_float32 = True
        pixels = backbone.decode_images(latents)
    if not pixels.isfinite().all():
        raise InputError("no picture came out: the autoencoder gave values that aren't finite. Are the base's weights whole?")
    if (pixels.flatten(1).amax(1) == pixels.flatten(1).amin(1)).any():
        raise InputError(f"a picture came out as one color alone, which is no picture (in {dtype}). Try --dtype float32, or another base.")
    return pixels
