"""Methods of personalization, DreamBooth and others, each a line of assets/methods.json, all trained by the library's one training loop.

LoRAs of several people are trained in one batch, where people don't affect one another; full DreamBooth and textual inversion
train one person at a time. The methods' settings were searched on validation people, see `comparison.search`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import assets
from ..api import HyperDreamBooth
from ..checkpoint import read_json
from ..errors import in_range
from ..lora import LoraSet, canonical_modules, find_targets
from ..settings import parsed
from ..stages.dreambooth import Subject, train_on_photos, trained_targets
from ..trainable_lora import IdentityTable, LightweightLora, RelaxedLora
from ..training import Run
from ..training_settings import LightweightConfig, NoiseLevels, TrainingConfig

Levels = Literal["uniform", "high"]
OnMark = Callable[[int, LoraSet | None], None]  # Gets the number of steps done, and the updates so far.
LEVELS: dict[Levels, NoiseLevels] = {"uniform": NoiseLevels(uniform=1.0), "high": NoiseLevels()}
"""Distributions of the noise levels in training: uniform (DreamBooth), or mostly high, where the identity is decided."""


@dataclass(frozen=True)
class Method:
    """A method of personalization. The kind `relaxed` takes its settings from the hypernetwork, and `steps` too where it is 0 here."""

    kind: Literal["true", "reconstruction", "base", "words", "full", "lora", "light", "prediction", "relaxed"]
    steps: int = 0
    rate: float = 0.0
    levels: Levels = "uniform"
    copies: int = 4
    rank: int = 4
    prior: bool = False  # Prior preservation (Ruiz et al., 2023): it also trains on pictures of the class that the base generated.
    faithful: bool = False  # With the faithful hypernetwork instead of the base's own.
    guided: bool = False  # Its pictures are generated with identity guidance.
    rates: tuple[float, ...] = ()  # Learning rates that a search tries.
    like: str = ""  # Another method, whose searched rate and noise levels it takes.

    def __post_init__(self) -> None:
        in_range(self.steps, 0, 100_000, "steps")
        in_range(self.rate, 0.0, 10.0, "rate")


GROUPS = {
    group: {name: parsed(Method, values, f"methods.json: {name}") for name, values in table.items()}
    for group, table in read_json(Path(assets.__file__).parent / "methods.json").items()
}
METHODS = {name: method for table in GROUPS.values() for name, method in table.items()}
"""Every method by name. Groups: "ours", the variants of this project's method, with ceiling and floor; "all", every method compared."""


class TrainedInPlace(nn.Module):
    """Holds trained weights that take effect in the base themselves, so it returns no updates."""

    def __init__(self, trained: nn.Module):
        super().__init__()
        self.trained = trained

    def forward(self, people: Tensor) -> LoraSet:
        return LoraSet()


def replace_embeddings(table: nn.Module, ids: list[int], vectors: nn.Parameter) -> Callable[[], None]:
    """Makes an embedding layer embed the tokens `ids` as `vectors` (len(ids), D). Returns the function that undoes it."""

    def replaced(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        for token, vector in zip(ids, vectors, strict=True):
            output = torch.where((args[0] == token)[..., None], vector.to(output.dtype), output)
        return output

    return table.register_forward_hook(replaced).remove


@contextmanager
def trainable(hdb: HyperDreamBooth, method: Method, people: int, predicted: LoraSet | None) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The module that the method trains, and the base's layers whose output it changes, by path. On exit the base is restored exactly."""
    backbone, config, denoiser = hdb.backbone, hdb.personalize_config(), hdb.backbone.denoiser
    if method.kind == "full":  # all weights of the denoiser, see `Bench.lacks` for their precision
        before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
        try:
            yield TrainedInPlace(denoiser.requires_grad_(True)), {}
        finally:
            denoiser.requires_grad_(False).load_state_dict(before)
            denoiser.zero_grad()
        return
    if method.kind == "words":  # the embeddings of the trigger's tokens in every text encoder (textual inversion; Gal et al., 2022)
        learned, changed = nn.ParameterList(), dict[str, nn.Module]()
        paths = {module: path for path, module in canonical_modules(backbone.components).items()}
        with ExitStack() as hooks:
            for name in backbone.text_components:
                encoder: Any = backbone.components[name]
                tokenizer = getattr(backbone.pipe, name.replace("text_encoder", "tokenizer"))
                ids, table = tokenizer(hdb.identifier, add_special_tokens=False).input_ids, encoder.get_input_embeddings()
                learned.append(nn.Parameter(table.weight[ids].detach().float().clone()))
                hooks.callback(replace_embeddings(table, ids, learned[-1]))
                changed[paths[table]] = table
            yield TrainedInPlace(learned), changed
        return
    source: nn.Module
    targets = find_targets(backbone.components, backbone.default_targets)
    if method.kind == "light":  # the paper's token sizes, or those of the smallest layer where it has fewer inputs or outputs
        down, up = (min(sizes) for sizes in zip(*targets.values(), strict=True))
        light = LightweightLora(targets, LightweightConfig(down_dim=min(100, down), up_dim=min(50, up)))
        source = IdentityTable(people, light)
    elif predicted is None:  # an ordinary LoRA for each person
        source = RelaxedLora(None, method.rank, targets=targets, people=people)
    else:
        trained, targets = trained_targets(backbone, predicted, config.targets), predicted.shapes()
        source = RelaxedLora(predicted, config.rank, targets=trained, order=config.order, seed=config.seed)
    yield source.to(backbone.device), targets


def train(
    hdb: HyperDreamBooth, method: Method, subject: Subject, predicted: LoraSet | None, marks: Sequence[int], on_mark: OnMark
) -> tuple[float, int]:
    """Trains the method on the P people of `subject`. Returns the mean seconds of a step, and the trained parameters of one person.

    On a CPU the seconds are processor time of this process, so that other programs don't count.

    Args:
        predicted: the hypernetwork's updates, where the method begins with them.
        marks: numbers of steps after which `on_mark` is called with the updates so far, or with None where the base itself was changed.
    """
    people, own = len(subject.latents), hdb.personalize_config()
    steps, rate, copies, levels = method.steps, method.rate, method.copies, LEVELS[method.levels]
    if method.kind == "relaxed":
        steps, rate, copies = steps or own.steps, own.learning_rate, own.copies
        levels = NoiseLevels(mean=own.noise_mean, std=own.noise_std)
    clock = time.process_time if hdb.device.type == "cpu" else time.perf_counter
    rows, spent, since = torch.arange(people, device=subject.latents.device), list[float](), 0.0
    with trainable(hdb, method, people, predicted) as (source, changed):
        trained = [p for p in source.parameters() if p.requires_grad]

        def after(done: int) -> bool:
            nonlocal since
            spent.append(clock() - since)
            if done in marks:
                with torch.no_grad():
                    on_mark(done, source(rows).detach() or None)
            since = clock()
            return False

        # as in `personalize`: the loss is a mean over people, so Adam's epsilon is divided by their number
        groups = [{"params": trained, "eps": 1e-8 / people}]
        run = Run(groups=groups, on_step=after, name=method.kind, quiet=True)
        training = TrainingConfig(steps=steps, learning_rate=rate, cooldown=0.2, max_grad_norm=0.0, seed=own.seed, log_every=max(1, steps))
        train_on_photos(hdb.backbone, subject, source, changed, levels, copies, training, run)
    counted = spent[1:] or [0.0]  # the first step also builds the optimizer
    return sum(counted) / len(counted), sum(p.numel() for p in trained) // people
