"""Photo -> hypernetwork -> rank-relaxed fine-tuning -> one standard LoRA (paper, section 4.3)."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..backbones import Backbone
from ..errors import InputError
from ..lora import LoraSet, Shape, compress, find_targets
from ..objectives import NoiseLevels
from ..trainable_lora import RelaxedLora
from ..training import TrainingConfig, TrainingReport, fit
from .dreambooth import Subject, ellipse_mask, make_step, prior_latents


@dataclass
class PersonalizeConfig:
    """Rank-relaxed fast fine-tuning."""

    steps: int | None = None
    """Fine-tuning steps. 0 stops at the prediction. Default: the hypernetwork's own (25), or 300 from scratch."""
    rank: int | None = None
    """Rank of the residual that is trained beside the prediction. Default: the hypernetwork's own, or 4."""
    targets: tuple[str, ...] | None = None
    """Glob patterns of the layers that are fine-tuned, such as "*up_blocks.1*": of those that the hypernetwork predicts ("*": all of
    them); without one, of the base's linear layers. Default: the hypernetwork's own, or all; without one, the base's own."""
    order: Literal["residual", "merged"] = "residual"
    """residual: the prediction stays frozen, a residual is trained (the paper). merged: all of it is trained."""
    learning_rate: float | None = None
    """Peak learning rate; constant, then it falls over the last fifth. Default: the hypernetwork's own, or 1e-3."""
    copies: int | None = None
    """Noised copies of the photo in every step. Default: the hypernetwork's own, or 4."""
    noise_mean: float | None = None
    """Mean of logit(u), where noise levels u are drawn from: high ones ask who it is, those near 0 what the details are.
    Default: the hypernetwork's own, or 1.5."""
    noise_std: float | None = None
    """Standard deviation of logit(u). Default: the hypernetwork's own, or 1."""
    mask: Literal["ellipse", "none"] | None = None
    """Where the loss counts: an ellipse in the middle of the photo, where a face crop has the face, or all of it. Default: the
    hypernetwork's own, or all of it."""
    prior_pictures: int = 0
    """Prior preservation: pictures of the class that the base generates first. 0: none."""
    prior_weight: float = 1.0
    """Weight of the prior loss."""
    seed: int = 0
    """Noise and the residual's start follow from this number."""

    def __post_init__(self) -> None:
        if any(value is not None and value < low for value, low in ((self.rank, 1), (self.copies, 1), (self.steps, 0))):
            raise InputError(f"rank and copies must be at least 1 and steps at least 0, not {self.rank}, {self.copies} and {self.steps}.")

    def resolved(self, *, predicted: bool, **own: Any) -> PersonalizeConfig:
        """The same with whatever is unset filled in: from a hypernetwork's own defaults, then from general ones."""
        general: dict[str, Any] = {
            "steps": 25 if predicted else 300,
            "rank": 4,
            "learning_rate": 1e-3,
            "copies": 4,
            "noise_mean": 1.5,
            "noise_std": 1.0,
            "mask": "none",
        }
        return dataclasses.replace(self, **{key: value for key, value in {**general, **own}.items() if getattr(self, key) is None})


def personalize(
    backbone: Backbone,
    subject: Subject,
    predicted: LoraSet | None,
    config: PersonalizeConfig,
    *,
    directory: str | Path | None = None,
    on_step: Callable[[int, LoraSet], bool] | None = None,
    quiet: bool = False,
) -> tuple[LoraSet, TrainingReport]:
    """Fine-tunes P people at once: (P updates, report). Without `predicted`, from scratch.

    Args:
        predicted: the hypernetwork's updates of the P people, batched.
        directory: where an interrupted fine-tuning resumes from; None keeps nothing.
        on_step: called after every step with the number of steps done and the updates so far; where it returns True, it ends there.
    """
    config = config.resolved(predicted=predicted is not None)
    steps, rank, rate, copies = config.steps, config.rank, config.learning_rate, config.copies
    assert steps is not None
    assert rank is not None
    assert rate is not None
    assert copies is not None
    assert config.noise_mean is not None
    assert config.noise_std is not None
    targets = trained_targets(backbone, predicted, config.targets or ())
    if steps == 0:
        if predicted is None:
            raise InputError("0 steps without a hypernetwork leave nothing: give --steps, or a hypernetwork.")
        return predicted.detach(), TrainingReport(finished=True)
    if config.prior_pictures and subject.prior is None:
        subject.prior = prior_latents(backbone, subject.prior_prompt, config.prior_pictures, config.seed)
        subject.prior_weight = config.prior_weight
    if config.mask == "ellipse" and subject.mask is None:
        people, photos, _, height, width = subject.latents.shape
        subject.mask = ellipse_mask(height, width).to(subject.latents).expand(people, photos, 1, height, width)
    source = RelaxedLora(predicted, rank, targets=targets, order=config.order, seed=config.seed).to(subject.latents.device)
    live = trains_text({*targets, *(predicted or ())}, backbone)
    levels = NoiseLevels(mean=config.noise_mean, std=config.noise_std)
    step, batches = make_step(backbone, subject, levels, copies, live_text=live, seed=config.seed)
    # no clipping: its norm would run over all people of a batch
    training = TrainingConfig(
        steps=steps, learning_rate=rate, cooldown=0.2, max_grad_norm=0.0, seed=config.seed, log_every=max(1, steps // 10)
    )
    # the loss is a mean over people, so everyone's gradient is divided by their number, and Adam's epsilon must be too:
    # then a person of a batch gets the very update that the same person gets alone
    groups = [{"params": list(source.parameters()), "eps": 1e-8 / len(subject.latents)}]
    report = fit(
        step,
        source,
        batches,
        training,
        directory=directory,
        device=subject.latents.device,
        groups=groups,
        on_step=(lambda done: on_step(done, source().detach())) if on_step else None,
        name="fine-tuning",
        quiet=quiet,
    )
    return source().detach(), report


def trained_targets(backbone: Backbone, predicted: LoraSet | None, patterns: Sequence[str]) -> dict[str, Shape]:
    """The layers that are fine-tuned. Raises InputError for a pattern that matches none of those that can be."""
    if predicted is None:
        return find_targets(backbone.components, patterns or backbone.default_targets)
    chosen: set[str] = set()
    for pattern in patterns or ("*",):
        hits = fnmatch.filter(predicted, pattern)
        if not hits:
            raise InputError(f"target pattern {pattern!r} matches none of the {len(predicted)} layers that the hypernetwork predicts.")
        chosen.update(hits)
    return {path: shape for path, shape in predicted.shapes().items() if path in chosen}


def trains_text(paths: Iterable[str], backbone: Backbone) -> bool:
    """Whether any layer of a text encoder is a target: then prompts can't be cached."""
    return any(path.split(".")[0] in backbone.text_components for path in paths)


def finish(loras: LoraSet) -> LoraSet:
    """One person's update, merged and decomposed exactly, ready for export."""
    return LoraSet({path: compress(lora) for path, lora in loras.items()})
