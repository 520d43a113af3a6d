"""Lightweight DreamBooth on one subject's photos (paper, section 4.1): one row of tokens."""

from pathlib import Path

from ..backbones import Backbone
from ..lightweight import LightweightLora
from ..lora import Hooks, find_targets
from ..trainable_lora import IdentityTable
from ..training import Run, TrainingReport, fit
from ..training_settings import TrainLightConfig
from .dreambooth import PhotoLosses, Subject, draw_photos, prior_latents, trains_text


def train_light(
    backbone: Backbone, subject: Subject, config: TrainLightConfig, *, directory: str | Path | None = None, quiet: bool = False
) -> tuple[IdentityTable, TrainingReport]:
    """Trains one row of tokens; the table holds it. Resumes from `directory`."""
    targets = find_targets(backbone.components, config.targets or backbone.default_targets)
    if config.prior_pictures and subject.prior is None:
        subject.prior = prior_latents(backbone, config.prior_prompt, config.prior_pictures, config.training.seed)
        subject.prior_prompt, subject.prior_weight = config.prior_prompt, config.prior_weight
    source = IdentityTable(1, LightweightLora(targets, config.lightweight)).to(subject.latents.device)
    draw = draw_photos(
        backbone, subject, config.levels, config.copies, trains_text=trains_text(targets, backbone), seed=config.training.seed
    )
    run = Run(directory=directory, device=subject.latents.device, name="train-light", quiet=quiet)
    with Hooks(backbone.components, targets) as hooks:
        report = fit(PhotoLosses(backbone, subject.prior_weight, hooks), source, draw, config.training, run)
    return source, report
