"""DreamBooth and its relatives, each a row of one table, on the one training loop.

Every method gets the same photo, the same description of it, prompts and seeds, and a rate, noise levels and steps that
were searched on validation people (`harness.search`). LoRAs of several people are trained side by side in one batch, where
people don't affect one another; full DreamBooth and textual inversion are one person at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..api import HyperDreamBooth
from ..lightweight import LightweightLora
from ..lora import Hooks, Lora, LoraSet, find_targets
from ..stages.dreambooth import PhotoLosses, Subject, draw_photos, trains_text
from ..trainable_lora import IdentityTable, RelaxedLora
from ..training import Run, fit
from ..training_settings import LightweightConfig, NoiseLevels, TrainingConfig

LEVELS = {"uniform": NoiseLevels(uniform=1.0), "high": NoiseLevels()}
"""Where noise levels may be drawn from: all alike (DreamBooth), or where it is decided who it is."""


@dataclass(frozen=True)
class Method:
    """One way to personalize; all but `kind` is an ordinary setting."""

    kind: Literal["true", "base", "words", "full", "lora", "light", "prediction", "relaxed"]
    steps: int = 0
    rate: float = 0.0
    levels: str = "uniform"
    copies: int = 2
    rank: int = 4
    prior: bool = False
    """Prior preservation (Ruiz et al., 2023): pictures of the class that the base drew are denoised beside the photo."""
    faithful: bool = False
    """The hypernetwork is the faithful one."""
    rates: tuple[float, ...] = ()
    """Learning rates that a search tries."""
    like: str = ""
    """The method whose searched settings are taken, as far as steps, rate and levels go."""

    @property
    def alone(self) -> bool:
        """Whether people can't be trained side by side."""
        return self.kind in ("words", "full")


METHODS = {
    "true render": Method("true"),
    "base": Method("base"),
    "textual inversion": Method("words", 120, 1e-2, rates=(1e-2, 3e-2)),
    "DreamBooth": Method("full", 120, 1e-4, rates=(3e-5, 1e-4)),
    "DreamBooth, 40 steps": Method("full", 40, 3e-4, rates=(1e-4, 3e-4)),
    "DreamBooth-LoRA 4": Method("lora", 120, 2e-3, rates=(1e-3, 3e-3, 1e-2)),
    "DreamBooth-LoRA 4 + prior": Method("lora", 120, 2e-3, prior=True, like="DreamBooth-LoRA 4"),
    "DreamBooth-LoRA 16": Method("lora", 120, 2e-3, rank=16, like="DreamBooth-LoRA 4"),
    "DreamBooth-LoRA 16 + prior": Method("lora", 120, 2e-3, rank=16, prior=True, like="DreamBooth-LoRA 4"),
    "lightweight DreamBooth": Method("light", 120, 1e-2, rates=(3e-3, 1e-2)),
    "no hypernetwork, 25 steps": Method("lora", 25, 6e-3, copies=8, rank=8, rates=(3e-3, 1e-2, 3e-2)),
    "no hypernetwork, 40 steps": Method("lora", 40, 6e-3, copies=8, rank=8, like="no hypernetwork, 25 steps"),
    "faithful hypernetwork": Method("prediction", faithful=True),
    "hypernetwork": Method("prediction"),
    "hypernetwork + fine-tuning": Method("relaxed"),
}
"""By name, from the floor to the ceiling of what there is; the first is the ceiling itself."""


class Whole(nn.Module):
    """All weights of a denoiser: full DreamBooth adds nothing to the base, it changes it."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, people: Tensor) -> LoraSet:
        return LoraSet()


class Words(nn.Module):
    """The embeddings of the trigger's tokens in every text encoder, and nothing else (textual inversion; Gal et al., 2022)."""

    def __init__(self, hdb: HyperDreamBooth):
        super().__init__()
        self.vectors, self.handles = nn.ParameterList(), []
        for name in hdb.backbone.text_components:
            tokenizer = getattr(hdb.backbone.pipe, name.replace("text_encoder", "tokenizer"))
            encoder: Any = hdb.backbone.components[name]
            table = encoder.get_input_embeddings()
            ids = tokenizer(hdb.identifier, add_special_tokens=False).input_ids
            self.vectors.append(nn.Parameter(table.weight[ids].detach().float().clone()))
            self.handles.append(table.register_forward_hook(self._hook(ids, len(self.vectors) - 1)))

    def _hook(self, ids: list[int], number: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for token, vector in zip(ids, list(self.vectors)[number], strict=True):
                output = torch.where((args[0] == token)[..., None], vector.to(output.dtype), output)
            return output

        return replace

    def forward(self, people: Tensor) -> LoraSet:
        return LoraSet()


@contextmanager
def opened(hdb: HyperDreamBooth, method: Method, people: int, predicted: LoraSet | None) -> Iterator[tuple[nn.Module, list[str]]]:
    """What the method trains and the layers that get an update; afterwards the base is what it was, bit for bit.

    Full DreamBooth trains the weights as they are, so the base should be in float32.
    """
    backbone = hdb.backbone
    if method.kind == "full":
        before = {name: tensor.clone() for name, tensor in backbone.denoiser.state_dict().items()}
        try:
            yield Whole(backbone.denoiser.requires_grad_(True)), []
        finally:
            backbone.denoiser.requires_grad_(False).load_state_dict(before)
            backbone.denoiser.zero_grad()
    elif method.kind == "words":
        words = Words(hdb)
        try:
            yield words, []
        finally:
            for handle in words.handles:
                handle.remove()
    else:
        targets = find_targets(backbone.components, backbone.default_targets)
        if method.kind == "light":  # the paper's token, or as much of it as the smallest layer takes
            small = [min(sizes) for sizes in zip(*targets.values(), strict=True)]
            aux = LightweightLora(targets, LightweightConfig(down_dim=min(100, small[0]), up_dim=min(50, small[1])))
            source: nn.Module = IdentityTable(people, aux)
        elif predicted is None:  # a prediction of rank 0: a plain LoRA for each person
            nothing = {p: Lora(torch.zeros(people, 0, shape.inputs), torch.zeros(people, shape.outputs, 0)) for p, shape in targets.items()}
            source = RelaxedLora(LoraSet(nothing), method.rank)
        else:
            from ..stages.personalize import trained_targets

            config = hdb.personalize_config()
            trained = trained_targets(backbone, predicted, config.targets)
            source, targets = RelaxedLora(predicted, config.rank, targets=trained, order=config.order, seed=config.seed), predicted.shapes()
        yield source.to(backbone.device), list(targets)


def train(
    hdb: HyperDreamBooth,
    method: Method,
    subject: Subject,
    predicted: LoraSet | None,
    marks: Sequence[int],
    on_mark: Callable[[int, LoraSet | None], None],
) -> tuple[float, int]:
    """Personalizes the P people of `subject`: (seconds of a step, trained numbers a person).

    Args:
        predicted: the hypernetwork's updates, where the method begins with them.
        marks: numbers of steps after which `on_mark` is called, with the updates so far; None where the base itself carries them.
    """
    people, backbone = len(subject.latents), hdb.backbone
    own = hdb.personalize_config()
    steps, rate, copies, levels = method.steps, method.rate, method.copies, LEVELS[method.levels]
    if method.kind == "relaxed":  # as the hypernetwork says
        steps, rate, copies = steps or own.steps, own.learning_rate, own.copies
        levels = NoiseLevels(mean=own.noise_mean, std=own.noise_std)
    spent, counted, since = 0.0, 0, time.perf_counter()
    with opened(hdb, method, people, predicted) as (source, paths), Hooks(backbone.components, paths) as hooks:
        text = method.kind == "words" or trains_text(paths, backbone)
        rows = torch.arange(people, device=subject.latents.device)

        def after(done: int) -> bool:
            nonlocal spent, since, counted
            if done > 1:  # the first step also builds the optimizer
                spent, counted = spent + time.perf_counter() - since, counted + 1
            hooks.clear()
            if done in marks:
                with torch.no_grad():
                    on_mark(done, source(rows).detach() or None)
            since = time.perf_counter()
            return False

        fit(
            PhotoLosses(backbone, subject.prior_weight, hooks),
            source,
            draw_photos(backbone, subject, levels, copies, trains_text=text, seed=own.seed),
            TrainingConfig(steps=steps, learning_rate=rate, cooldown=0.2, max_grad_norm=0.0, seed=own.seed, log_every=max(1, steps)),
            # see stages.personalize: the loss is a mean over people, so Adam's epsilon is divided by their number
            Run(
                device=subject.latents.device,
                groups=[{"params": [p for p in source.parameters() if p.requires_grad], "eps": 1e-8 / people}],
                on_step=after,
                name=method.kind,
                quiet=True,
            ),
        )
        numbers = sum(p.numel() for p in source.parameters() if p.requires_grad) // people
    return spent / max(1, counted), numbers
