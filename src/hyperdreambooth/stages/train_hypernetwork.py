"""Hypernetwork training (paper, section 4.2), pro or faithful.

pro: learnable aux matrices, denoising loss, and a penalty on the update's norm (never on raw tokens: (token / s, aux * s)
is the same update). faithful: frozen aux matrices, denoising loss and a weight loss against pre-optimized tokens, for
the identities that have a row.

Context guidance can be distilled: a trained hypernetwork is then the start and the teacher of another one, which learns to give by plain
guidance what the teacher gives by context guidance, see `HyperNetworkLosses.target`.

The denoising loss hardly moves in training. What measures progress is the *identity gain*: the loss with a stranger's photo minus the
loss with the person's own, for the same pictures and noise.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import photos
from ..backbones import Backbone
from ..checkpoint import stamp_of
from ..data import IdentityData, PromptCache, conditioning_in
from ..encoder import FaceEncoder
from ..errors import InputError, TrainingError
from ..lora import Hooks, LoraSet, applied, find_targets, shared_norm, update_norms
from ..objectives import denoising, denoising_loss, weight_loss
from ..personal_lora import PLACEHOLDER, RARE_TOKEN
from ..pretrained import build
from ..sampling import generate
from ..settings import GenerateConfig, resolve
from ..trainable_lora import LightweightLora, PredictedLora
from ..training import Draw, Run, TrainingReport, fit
from ..training_settings import NoiseLevels, TrainHypernetworkConfig, identifying
from .dreambooth import trains_text, within_memory

NAME = re.compile(rf"({re.escape(PLACEHOLDER)}|\b{RARE_TOKEN}\b) ?")  # The word for the person in a prompt.
EACH_LAYER = ("hypernetwork.start", "hypernetwork.layers", "hypernetwork.head")  # Weights with one row per layer.


@dataclass(frozen=True, eq=False)
class HyperNetworkLosses:
    """The losses of a batch of people: the denoising loss, with `target` where there is one, and the terms that the mode adds."""

    backbone: Backbone
    config: TrainHypernetworkConfig
    lightweight: LightweightLora
    hooks: Hooks
    teacher: PredictedLora | None = None

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        config, loras = self.config, model(batch["photos"])
        target = self.target(batch) if "named" in batch else None
        self.hooks.set(loras)
        losses = denoising_loss(
            self.backbone, batch["latents"], conditioning_in(batch, "prompt.", self.backbone), batch["noise"], batch["timesteps"], target
        )
        if "early" in batch:  # guidance enlarges these targets by about c / g, and their loss would outweigh the others'
            losses = torch.where(batch["early"], (config.guidance / config.context_guidance) ** 2, 1.0) * losses
        if config.mode == "pro":
            losses = losses + config.penalty * update_norms(loras) / len(loras)
            if config.shared:
                losses = losses + config.shared * shared_norm(loras) / len(loras)
        else:
            losses = losses + config.weight_loss * batch["has_row"] * weight_loss(loras, self.lightweight(batch["rows"]))
        return losses

    @torch.no_grad()
    def target(self, batch: dict[str, Tensor]) -> Tensor:
        """What the denoiser with an update should predict, (B, C, h, w).

        For a prompt that names nobody it is the base's own prediction: prior preservation (Ruiz et al., arXiv 2208.12242, section 3.2)
        without generated pictures. For other prompts it is the usual target or, with a teacher T, the prediction with which plain guidance
        gives what the teacher gives by context guidance. At low noise levels that is T(p), the teacher's prediction for the prompt p. At
        high ones, context guidance of scale c gives T(p) + (c - 1) (base(p) - base()), and plain guidance of scale g gives
        g S(p) - (g - 1) S() for the student S. If S() for the empty prompt equals T(), both are equal for

            S(p) = (T(p) + (c - 1) (base(p) - base()) + (g - 1) T()) / g

        So guidance is distilled, as by Meng et al. (arXiv 2210.03142), into one person's update.
        """
        backbone, config = self.backbone, self.config
        noisy = backbone.add_noise(batch["latents"], batch["noise"], batch["timesteps"])

        def predict(updates: LoraSet, prompts: str) -> Tensor:
            self.hooks.set(updates)
            return backbone.predict(noisy, batch["timesteps"], conditioning_in(batch, prompts, backbone))

        base, wanted = predict(LoraSet(), "prompt."), backbone.target(batch["latents"], batch["noise"], batch["timesteps"])
        if self.teacher is not None:
            loras = self.teacher(batch["photos"])
            wanted, effect = predict(loras, "prompt."), base - predict(LoraSet(), "empty.")  # the effect of the prompt on the base
            guided = wanted + (config.context_guidance - 1) * effect + (config.guidance - 1) * predict(loras, "empty.")
            wanted = torch.where(batch["early"].reshape(-1, 1, 1, 1), guided / config.guidance, wanted)
        return torch.where(batch["named"].reshape(-1, 1, 1, 1), wanted, base)


def train_hypernetwork(
    backbone: Backbone,
    encoder: FaceEncoder,
    data: IdentityData,
    config: TrainHypernetworkConfig,
    *,
    run: Run | None = None,
    validation: IdentityData | None = None,
    table: Mapping[str, Tensor] | None = None,
    start: PredictedLora | None = None,
) -> tuple[PredictedLora, TrainingReport]:
    """Trains a hypernetwork and returns it, with its averaged weights if the training finished, and the report.

    Args:
        encoder: trained too if `encoder.trained`; the statistics of its batch normalization stay as they are.
        run: the checkpoint's folder and the time limit.
        validation: other people, for the identity gain.
        table: pre-optimized tokens by identity, for the faithful mode.
        start: a hypernetwork of the same sizes whose weights are the initial ones; with `context_guidance` it is the teacher too.

    Raises InputError for the faithful mode without a table, context guidance without `start`, and a `start` of other sizes.
    """
    if config.mode == "faithful" and not table:
        raise InputError("the faithful mode needs a table of pre-optimized tokens: run `preoptimize` first, or take mode pro.")
    targets = find_targets(backbone.components, config.targets or backbone.default_targets)
    source = build(targets, encoder, config.lightweight, config.hypernetwork).to(backbone.device)
    source.encoder.eval()  # otherwise batch normalization in a trained encoder would follow each small batch
    if start is not None:
        begin_with(source, start)
    if config.context_guidance and start is None:
        raise InputError("context guidance is learned from a hypernetwork: name it with --start.")
    teacher = start.to(backbone.device).eval().requires_grad_(False) if start is not None and config.context_guidance else None
    prompts = PromptCache(backbone, trains_text=trains_text(targets, backbone))
    draw = draw_people(backbone, data, config, prompts, table if config.mode == "faithful" else None, source.lightweight.start())
    gain = IdentityGain(backbone, validation, config.levels, prompts) if validation else None
    scales = {source.hypernetwork: 1.0, source.lightweight: config.aux_scale, source.encoder: config.encoder_scale}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in part.parameters() if p.requires_grad], "lr_scale": scale} for part, scale in scales.items()
    ]
    with Hooks(backbone.components, targets) as hooks:

        def validate(done: int, model: nn.Module) -> dict[str, float | Image.Image]:
            hooks.set({})  # validation adds its updates by hooks of its own
            found = gain(done, model) if gain else {}
            check_gain(found, done, config)
            figures: dict[str, float | Image.Image] = dict(found)
            if config.training.tracker and validation:
                figures["preview"] = preview(backbone, model, validation)
            return figures

        here = replace(run or Run(), device=backbone.device, groups=[group for group in groups if group["params"]])
        here = replace(here, validate=validate if gain else None, name=f"hypernetwork ({config.mode})")
        if here.directory:
            given = start.state_dict().values() if start is not None else ()
            people = [data.names[person] for person in data.people.tolist()]  # of each picture
            # of the latents only rounded means of each channel: their last bits depend on the device and the number of threads
            means = (8 * data.latents.float().mean((0, 2, 3))).round().tolist()
            here = replace(here, stamp=stamp_of(backbone.name, identifying(config), people, means, data.prompts, *given))
        losses = HyperNetworkLosses(backbone, config, source.lightweight, hooks, teacher)
        report = within_memory(backbone, source, lambda: fit(losses, source, draw, config.training, here))
    return source, report


def draw_people(
    backbone: Backbone,
    data: IdentityData,
    config: TrainHypernetworkConfig,
    prompts: PromptCache,
    table: Mapping[str, Tensor] | None,
    absent: Tensor,
) -> Draw:
    """Batches for `HyperNetworkLosses`: pictures, noise and noise levels, and for each picture a photo of the same person to predict from.

    Args:
        table: pre-optimized tokens (layers, width) by identity; None where there is no weight loss.
        absent: tokens (layers, width) in place of a row that doesn't exist; their weight loss is multiplied by zero.
    """
    device, guided = backbone.device, bool(config.context_guidance)

    def draw(index: int, noise: torch.Generator) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(config.training.seed * 1_000_003 + index)
        chosen = torch.randint(len(data.people), (config.batch,), generator=generator)
        photos = data.inputs(data.pair(chosen, generator)).to(device)
        dropped = torch.rand(config.batch, generator=generator) < config.dropout
        texts = ["" if left_out else data.prompts[i] for i, left_out in zip(chosen.tolist(), dropped.tolist(), strict=True)]
        if guided:  # every second picture's prompt
            texts[::2] = [config.written[i] for i in torch.randint(len(config.written), (len(texts[::2]),), generator=generator).tolist()]
        if config.prior:
            nameless = torch.rand(config.batch, generator=generator) < config.prior
            texts = [NAME.sub("", text) if name_goes else text for text, name_goes in zip(texts, nameless.tolist(), strict=True)]
        levels = config.levels.draw(config.batch, noise)
        latents = data.latents[chosen].to(device).float()
        batch = {
            "latents": latents,
            "photos": photos,
            "timesteps": backbone.steps_for(levels),
            "noise": torch.randn(latents.shape, generator=noise).to(latents),
            **prompts.inputs(texts, "prompt."),
        }
        if guided or config.prior:
            batch["named"] = torch.tensor([not text or bool(NAME.search(text)) for text in texts]).to(device)
        if guided:
            batch |= {"early": (levels > 1 - config.context_until).to(device), **prompts.inputs([""] * len(texts), "empty.")}
        if table is not None:
            names = [data.names[person] for person in data.people[chosen].tolist()]
            rows = torch.stack([table.get(name, absent) for name in names])
            batch |= {"rows": rows.to(device), "has_row": torch.tensor([name in table for name in names]).to(device)}
        return batch

    return draw


def check_gain(found: Mapping[str, float], done: int, config: TrainHypernetworkConfig) -> None:
    """Raises TrainingError if the identity gain's 95 % interval still includes 0 after the fraction `give_up` of the steps."""
    gain, interval = found.get("identity_gain", 0.0), found.get("identity_gain_interval", 0.0)
    steps = config.training.steps
    if gain <= interval and 0 < config.give_up * steps <= done < steps:
        raise TrainingError(
            f"the identity gain is {gain:.2g} ± {interval:.2g} after {done} of {steps} steps: the hypernetwork tells nobody apart, "
            "and more steps rarely mend that. Look at the pictures (are the faces large and sharp?), take more people, raise "
            "--levels.mean or the learning rate; --give-up 0 goes on all the same."
        )


def preview(backbone: Backbone, source: nn.Module, data: IdentityData, count: int = 4, prompts: Sequence[str] = ()) -> Image.Image:
    """A grid of a few people's pictures and, below, of what the base draws of them by their predicted LoRAs: with the prompts of these
    pictures, then with each of `prompts`."""
    chosen = torch.tensor([mine[0] for mine in data.of_person[:count]])
    loras = source(data.inputs(chosen).to(backbone.device))
    settings = resolve(GenerateConfig, ("family", backbone.generation))
    texts = [[data.prompts[index] for index in chosen.tolist()], *([prompt] * len(chosen) for prompt in prompts)]
    drawn = [photos.to_images(generate(backbone, row, [0] * len(row), settings, personal=loras)) for row in texts]
    shown = backbone.decode_images(data.latents[chosen].to(backbone.device).float())
    return photos.grid([photos.to_images(shown), *drawn], ["", "", *prompts], data.names[: len(chosen)])


def begin_with(source: PredictedLora, start: PredictedLora) -> None:
    """Copies the weights of `start` into `source`; layers that `start` doesn't predict keep theirs.

    Raises InputError if `start` has layers that `source` lacks, or other sizes.
    """
    order, state = list(source.lightweight.targets), source.state_dict()
    known = {path: shape for path, shape in start.lightweight.targets.items() if source.lightweight.targets.get(path) == shape}
    rows = [order.index(path) for path in known]
    for name, value in start.state_dict().items():
        into = state[name][rows] if name in EACH_LAYER else state.get(name)
        if len(known) < len(start.lightweight.targets) or into is None or into.shape != value.shape:
            differing = next((path for path in start.lightweight.targets if path not in known), name)
            raise InputError(f"the hypernetwork to start from has other layers or sizes ({differing}): give the same settings.")
        if name in EACH_LAYER:
            state[name][rows] = value.to(into)
        else:
            into.copy_(value)


class IdentityGain:
    """The denoising loss with a stranger's photo minus that with the person's own, for fixed pictures, noise and noise levels."""

    def __init__(self, backbone: Backbone, data: IdentityData, levels: NoiseLevels, prompts: PromptCache, count: int = 128):
        generator = torch.Generator().manual_seed(99)
        chosen = torch.randperm(len(data.people), generator=generator)[:count]
        self.own = data.pair(chosen, generator)
        # the next picture's photo, unless that is the same person's
        strangers = self.own.roll(1)
        for shift in range(2, 6):
            same = data.people[strangers] == data.people[chosen]
            strangers = torch.where(same, self.own.roll(shift), strangers)
        self.strangers, self.chosen, self.data = strangers, chosen, data
        self.latents = data.latents[chosen].to(backbone.device).float()
        self.levels = levels.draw(len(chosen), generator)
        self.backbone, self.prompts = backbone, prompts

    def __call__(self, step: int, model: nn.Module) -> dict[str, float]:
        """The gain, half its 95 % interval over people (if there are two or more), and the loss with the person's own photo."""
        own, stranger = (self.losses(model, photos) for photos in (self.own, self.strangers))
        gains, people = stranger - own, self.data.people[self.chosen]
        each = torch.stack([gains[people == person].mean() for person in people.unique()])
        interval = {"identity_gain_interval": 1.96 * (each.std() / len(each) ** 0.5).item()} if len(each) > 1 else {}
        return {"identity_gain": gains.mean().item(), **interval, "loss": own.mean().item()}

    def losses(self, source: nn.Module, photos: Tensor) -> Tensor:
        """Denoising losses (pictures,), on the CPU, with the updates that are predicted from `photos` (indices into the data)."""
        found = []
        prompts = [self.data.prompts[i] for i in self.chosen.tolist()]
        for start in range(0, len(photos), 32):
            part = slice(start, start + 32)
            loras = source(self.data.inputs(photos[part]).to(self.backbone.device))
            with applied(self.backbone.components, loras):
                losses = denoising(
                    self.backbone, self.latents[part], self.prompts(prompts[part]), self.levels[part], torch.Generator().manual_seed(start)
                )
            found.append(losses.float().cpu())
        return torch.cat(found)
