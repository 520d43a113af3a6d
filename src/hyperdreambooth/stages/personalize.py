"""Photo -> hypernetwork -> rank-relaxed fine-tuning -> one standard LoRA (paper, section 4.3)."""

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path

from ..backbones import Backbone
from ..errors import InputError
from ..lora import LoraSet, Shape, compress, find_targets
from ..settings import PersonalizeConfig
from ..trainable_lora import RelaxedLora
from ..training import Run, TrainingReport
from ..training_settings import NoiseLevels, TrainingConfig
from .dreambooth import Subject, ellipse_mask, prior_latents, train_on_photos


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
    targets = trained_targets(backbone, predicted, config.targets)
    if config.steps == 0:
        if predicted is None:
            raise InputError("0 steps without a hypernetwork leave nothing: give --steps, or a hypernetwork.")
        return predicted.detach(), TrainingReport(finished=True)
    if config.prior_pictures and subject.prior is None:
        subject.prior = prior_latents(backbone, subject.prior_prompt, config.prior_pictures, config.seed)
        subject.prior_weight = config.prior_weight
    if config.mask == "ellipse" and subject.mask is None:
        people, photos, _, height, width = subject.latents.shape
        subject.mask = ellipse_mask(height, width).to(subject.latents).expand(people, photos, 1, height, width)
    source = RelaxedLora(predicted, config.rank, targets=targets, order=config.order, seed=config.seed, people=len(subject.latents))
    source.to(subject.latents.device)
    carried = {**targets, **(predicted or {})}
    levels = NoiseLevels(mean=config.noise_mean, std=config.noise_std)
    # no clipping: its norm would run over all people of a batch
    training = TrainingConfig(steps=config.steps, learning_rate=config.learning_rate, seed=config.seed, cooldown=0.2, max_grad_norm=0.0)
    training.log_every = max(1, config.steps // 10)
    # the loss is a mean over people, so everyone's gradient is divided by their number, and Adam's epsilon must be too:
    # then a person of a batch gets the very update that the same person gets alone
    groups = [{"params": list(source.parameters()), "eps": 1e-8 / len(subject.latents)}]
    step = (lambda done: on_step(done, source().detach())) if on_step else None
    run = Run(directory, groups=groups, on_step=step, name="fine-tuning", quiet=quiet)
    report = train_on_photos(backbone, subject, source, carried, levels, config.copies, training, run)
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


def finish(loras: LoraSet) -> LoraSet:
    """One person's update, merged and decomposed exactly, ready for export. Raises InputError for one that isn't finite."""
    finished = LoraSet()
    for path, lora in loras.items():
        if lora.is_finite():
            finished[path] = compress(lora)
        if path not in finished or not finished[path].is_finite():
            raise InputError(f"the update of {path} isn't finite: the hypernetwork or the tokens that it comes from are damaged.")
    return finished
