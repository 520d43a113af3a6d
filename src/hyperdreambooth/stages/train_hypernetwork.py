"""Hypernetwork training (paper, section 4.2), pro or faithful.

pro: learnable aux matrices, denoising loss, and a penalty on the update's norm (never on raw tokens: (token / s, aux * s)
is the same update). faithful: frozen aux matrices, denoising loss and a weight loss against pre-optimized tokens, for
the identities that have a row.

The denoising loss alone hardly moves. Watch the *identity gain*: the loss with a stranger's photo minus the loss with
one's own, same noise, same pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..data import IdentityData, PromptCache
from ..encoder import FaceEncoder
from ..errors import InputError
from ..hypernetwork import HyperNetworkConfig
from ..lightweight import LightweightConfig
from ..lora import applied, find_targets, shared_norm, update_norms
from ..objectives import NoiseLevels, denoising, weight_loss
from ..pretrained import build
from ..trainable_lora import PredictedLora
from ..training import TrainingConfig, TrainingReport, fit
from .personalize import trains_text


@dataclass
class TrainHypernetworkConfig:
    """Training of a hypernetwork."""

    mode: Literal["pro", "faithful"] = "pro"
    """pro: learnable aux, no table needed. faithful: frozen aux and a weight loss against a table."""
    prompt: str = "a [V] face"
    """The prompt that names a person."""
    targets: tuple[str, ...] = ()
    """Glob patterns of layers; default: the base's own."""
    lightweight: LightweightConfig = field(default_factory=LightweightConfig)
    """Token size."""
    hypernetwork: HyperNetworkConfig = field(default_factory=HyperNetworkConfig)
    """Decoder size."""
    levels: NoiseLevels = field(default_factory=NoiseLevels)
    """Where noise levels are drawn from. Low noise shows who it is without the tokens' help: keep the mean high."""
    batch: int = 16
    """Pictures in every step."""
    penalty: float = 1e-5
    """pro: weight of the update's mean squared Frobenius norm a layer."""
    shared: float = 1e-3
    """pro: weight of the squared Frobenius norm, a mean over layers, of the update that all people have in common. It tells
    nobody apart, takes up rank, and shifts what prompts mean that were never trained on. 0 leaves it free."""
    weight_loss: float = 1e-2
    """faithful: weight of the squared Frobenius distance between predicted and pre-optimized updates, a mean over layers."""
    dropout: float = 0.1
    """Fraction of the pictures, 0 to 1, whose prompt is left empty: plain guidance keeps the LoRA in its branch without a prompt, so
    the person must be right there too."""
    aux_scale: float = 2.0
    """pro: the aux matrices' learning rate over the decoder's."""
    train_encoder: bool = False
    """Train the encoder too, from pictures instead of features that are computed once: slower, and it may see what a
    ready encoder overlooks."""
    encoder_scale: float = 0.3
    """A trained encoder's learning rate over the decoder's."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=20_000, learning_rate=1e-3, warmup=100, average=0.998, validate_every=500)
    )
    """The loop."""

    def __post_init__(self) -> None:
        if self.mode not in ("pro", "faithful"):
            raise InputError(f"mode must be pro or faithful, not {self.mode}.")
        if self.mode == "pro" and self.shared and self.batch < 2:
            raise InputError("what people have in common takes a batch of 2 or more to tell: raise batch, or set shared to 0.")
        if not 0 <= self.dropout <= 1:
            raise InputError(f"dropout is a fraction of the pictures, 0 to 1, not {self.dropout}.")
        if self.lightweight.learnable != (self.mode == "pro"):
            self.lightweight = LightweightConfig(**{**self.lightweight.__dict__, "learnable": self.mode == "pro"})


@dataclass
class Batch:
    """B pictures to denoise, the photos (or their features) to predict from, and, where there is one, the row of the table."""

    latents: Tensor
    photos: Tensor
    prompts: list[str]
    rows: Tensor | None
    has_row: Tensor | None


def train_hypernetwork(
    backbone: Backbone,
    encoder: FaceEncoder,
    data: IdentityData,
    config: TrainHypernetworkConfig,
    *,
    directory: str | Path | None = None,
    validation: IdentityData | None = None,
    table: dict[str, Tensor] | None = None,
    start: PredictedLora | None = None,
    minutes: float | None = None,
) -> tuple[PredictedLora, TrainingReport]:
    """Trains and returns the source (averaged weights in place where the training finished).

    Args:
        encoder: trained too where `encoder.trained`; its batch statistics stay as they are.
        start: begin with the weights of this hypernetwork, of the same sizes, or of a lower rank or fewer
            blocks.
    """
    if config.mode == "faithful" and not table:
        raise InputError("the faithful mode needs a table of pre-optimized tokens: run `preoptimize` first, or take mode pro.")
    targets = find_targets(backbone.components, config.targets or backbone.default_targets)
    device = next(backbone.components.parameters()).device
    source = build(targets, encoder, config.lightweight, config.hypernetwork).to(device)
    source.encoder.eval()  # a trained one's batch statistics would follow each small batch
    if start is not None:
        begin_with(source, start)
    prompts = PromptCache(backbone, live=trains_text(targets, backbone))
    rows = has_row = None
    if config.mode == "faithful" and table:
        empty = torch.zeros(source.lightweight.token_shape)
        rows = torch.stack([table.get(name, empty) for name in data.names])
        has_row = torch.tensor([name in table for name in data.names])

    def batches(index: int) -> Batch:
        generator = torch.Generator().manual_seed(config.training.seed * 1_000_003 + index)
        chosen = torch.randint(len(data.people), (config.batch,), generator=generator)
        people = data.people[chosen]
        photos = data.inputs(data.pair(chosen, generator)).to(device)
        dropped = torch.rand(config.batch, generator=generator) < config.dropout
        return Batch(
            data.latents[chosen].to(device).float(),
            photos,
            ["" if left_out else data.prompts[i] for i, left_out in zip(chosen.tolist(), dropped.tolist(), strict=True)],
            rows[people].to(device) if rows is not None else None,
            has_row[people].to(device) if has_row is not None else None,
        )

    @contextmanager
    def step(model: nn.Module, batch: Batch, generator: torch.Generator) -> Iterator[Tensor]:
        levels = config.levels.draw(len(batch.latents), generator)
        loras = model(batch.photos)
        with applied(backbone.components, loras):
            losses = denoising(backbone, batch.latents, prompts(batch.prompts), levels, generator)
            if config.mode == "pro":
                losses = losses + config.penalty * update_norms(loras) / len(loras)
                if config.shared:
                    losses = losses + config.shared * shared_norm(loras) / len(loras)
            elif batch.rows is not None and batch.has_row is not None:
                losses = losses + config.weight_loss * batch.has_row * weight_loss(loras, source.lightweight(batch.rows))
            yield losses

    gain = IdentityGain(backbone, validation, config.levels, prompts) if validation else None
    scales = {source.hypernetwork: 1.0, source.lightweight: config.aux_scale, source.encoder: config.encoder_scale}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in part.parameters() if p.requires_grad], "lr_scale": scale} for part, scale in scales.items()
    ]
    report = fit(
        step,
        source,
        batches,
        config.training,
        directory=directory,
        device=device,
        groups=[group for group in groups if group["params"]],
        validate=gain,
        minutes=minutes,
        name=f"hypernetwork ({config.mode})",
    )
    return source, report


def begin_with(source: PredictedLora, start: PredictedLora) -> None:
    """Copies another hypernetwork's weights: of the very same sizes, or of a lower rank or fewer blocks.

    What is added changes no prediction at first: directions begin as a fresh hypernetwork's do, down random and up zero,
    and blocks pass on what they get. Raises InputError where layers or other sizes differ.
    """
    mine, theirs = source.state_dict(), start.state_dict()
    old, new = start.lightweight.config, source.lightweight.config
    if old.rank < new.rank and (old.down_dim, old.up_dim) == (new.down_dim, new.up_dim):
        downs = torch.arange(old.rank * old.down_dim)
        ups = (torch.arange(old.up_dim)[:, None] * new.rank + torch.arange(old.rank)).flatten() + new.rank * new.down_dim
        columns = torch.cat([downs, ups])
        for name in ("hypernetwork.start", "hypernetwork.embed.weight", "hypernetwork.head"):
            wide = torch.zeros_like(mine[name]) if name.endswith("weight") else mine[name].clone()
            if wide.shape[:-1] == theirs[name].shape[:-1]:
                wide[..., columns] = theirs[name].to(wide)
                theirs[name] = wide
    for name in mine.keys() - theirs.keys():
        if name.startswith("hypernetwork.decoder.layers."):
            last = name.rsplit(".", 2)[-2] in ("out_proj", "linear2")
            theirs[name] = torch.zeros_like(mine[name]) if last else mine[name]
    sizes, others = ({name: tuple(t.shape) for name, t in one.items()} for one in (mine, theirs))
    if sizes != others or source.lightweight.targets != start.lightweight.targets:
        names = sorted(set(sizes.items()) ^ set(others.items()))
        raise InputError(
            f"the hypernetwork to start from has other layers or sizes{f' ({names[0][0]})' if names else ''}: give the same settings."
        )
    source.load_state_dict(theirs)


class IdentityGain:
    """Loss with a stranger's photo minus loss with one's own: on fixed pictures, noise and levels."""

    def __init__(self, backbone: Backbone, data: IdentityData, levels: NoiseLevels, prompts: PromptCache, count: int = 128):
        generator = torch.Generator().manual_seed(99)
        device = next(backbone.components.parameters()).device
        chosen = torch.randperm(len(data.people), generator=generator)[:count]
        self.own = data.pair(chosen, generator)
        # the next picture's photo, unless that is the same person's
        strangers = self.own.roll(1)
        for shift in range(2, 6):
            same = data.people[strangers] == data.people[chosen]
            strangers = torch.where(same, self.own.roll(shift), strangers)
        self.strangers, self.chosen, self.data = strangers, chosen, data
        self.latents = data.latents[chosen].to(device).float()
        self.levels = levels.draw(len(chosen), generator)
        self.backbone, self.prompts, self.device = backbone, prompts, device

    def __call__(self, step: int, model: nn.Module) -> dict[str, float]:
        own, stranger = (self.loss(model, photos) for photos in (self.own, self.strangers))
        return {"identity_gain": stranger - own, "loss": own}

    def loss(self, source: nn.Module, photos: Tensor) -> float:
        """Mean denoising loss when predicted from `photos` (indices into the data)."""
        total = 0.0
        prompts = [self.data.prompts[i] for i in self.chosen.tolist()]
        for start in range(0, len(photos), 32):
            part = slice(start, start + 32)
            loras = source(self.data.inputs(photos[part]).to(self.device))
            with applied(self.backbone.components, loras):
                losses = denoising(
                    self.backbone, self.latents[part], self.prompts(prompts[part]), self.levels[part], torch.Generator().manual_seed(start)
                )
            total += losses.sum().item()
        return total / len(photos)
