"""Lightweight DreamBooth on one subject's photos (paper, section 4.1): one row of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..backbones import Backbone
from ..lightweight import LightweightConfig, LightweightLora
from ..lora import find_targets
from ..objectives import NoiseLevels
from ..trainable_lora import IdentityTable
from ..training import TrainingConfig, TrainingReport, fit
from .dreambooth import Subject, make_step, prior_latents
from .personalize import trains_text


@dataclass
class TrainLightConfig:
    """Lightweight DreamBooth: the tokens of one subject over frozen random aux matrices."""

    prompt: str = "a [V] face"
    """The prompt that names the subject."""
    targets: tuple[str, ...] = ()
    """Glob patterns of layers; default: the base's own. Add "text_encoder.*" patterns to train the text encoder too."""
    lightweight: LightweightConfig = field(default_factory=LightweightConfig)
    """Token size."""
    levels: NoiseLevels = field(default_factory=lambda: NoiseLevels(mean=1.0))
    """Where noise levels are drawn from."""
    copies: int = 4
    """Noised photos in every step."""
    prior_pictures: int = 0
    """Prior preservation: pictures of the class that the base generates first. 0: none."""
    prior_prompt: str = "a face"
    """The class's prompt."""
    prior_weight: float = 1.0
    """Weight of the prior loss."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=300, learning_rate=5e-3, log_every=20))
    """The loop."""


def train_light(
    backbone: Backbone, subject: Subject, config: TrainLightConfig, *, directory: str | Path | None = None, quiet: bool = False
) -> tuple[IdentityTable, TrainingReport]:
    """Trains one row of tokens; the table holds it. Resumes from `directory`."""
    targets = find_targets(backbone.components, config.targets or backbone.default_targets)
    if config.prior_pictures and subject.prior is None:
        subject.prior = prior_latents(backbone, config.prior_prompt, config.prior_pictures, config.training.seed)
        subject.prior_prompt, subject.prior_weight = config.prior_prompt, config.prior_weight
    source = IdentityTable(1, LightweightLora(targets, config.lightweight)).to(subject.latents.device)
    step, batches = make_step(
        backbone, subject, config.levels, config.copies, live_text=trains_text(targets, backbone), seed=config.training.seed
    )
    report = fit(
        step, source, batches, config.training, directory=directory, device=subject.latents.device, name="train-light", quiet=quiet
    )
    return source, report
