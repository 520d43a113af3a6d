"""The only training loop. It knows no LoRA, no diffusion and no picture.

A *step* is a context manager: `with step(model, batch, generator) as losses:` yields one loss per sample, shape (B,),
and stays open until `backward()` is done, so that a step may hold hooks on a frozen model (and gradient checkpointing
may run its forward again). Batches and noise are functions of (seed, step): a training that was stopped and resumed
gives the very weights of one that wasn't.

Left to accelerate: devices, several GPUs, mixed precision, gradient accumulation, trackers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from . import checkpoint
from .errors import InputError, TrainingError
from .muon import Muon
from .progress import Progress

Batch = Any
Step = Callable[[nn.Module, Batch, torch.Generator], AbstractContextManager[Tensor]]
Batches = Callable[[int], Batch]
Validate = Callable[[int, nn.Module], Mapping[str, float]]


@dataclass
class TrainingConfig:
    """How a training runs; the same for every stage."""

    steps: int = 1000
    """Optimizer steps in all."""
    optimizer: Literal["adamw", "muon", "adamw8bit", "adafactor"] = "adamw"
    """adamw; muon (orthogonal updates of matrices: fewer steps); adamw8bit (its state in 8 bits, on CUDA, with the extra `8bit`);
    adafactor (its second moment as rows and columns)."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    cooldown: float = 0.2
    """Last fraction of the steps, over which the learning rate falls to zero. It is constant before: to cool a long
    training at any moment, lower `steps` and resume."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns it off."""
    gradient_accumulation: int = 1
    """Batches for one optimizer step."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass."""
    average: float = 0.0
    """Decay of an exponential moving average of the weights; 0 turns it off."""
    seed: int = 0
    """Batches, noise and timesteps follow from this number and the step."""
    log_every: int = 50
    """Steps between two log lines."""
    validate_every: int = 0
    """Steps between two validations; 0 validates at the end only."""
    checkpoint_minutes: float = 3.0
    """Minutes between two checkpoints."""
    tracker: str | None = None
    """An experiment tracker of accelerate: tensorboard, wandb, ..."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.gradient_accumulation < 1:
            raise InputError(
                f"steps must be 0 or more and gradient_accumulation 1 or more, not {self.steps} and {self.gradient_accumulation}."
            )
        if not 0 <= self.cooldown <= 1 or not 0 <= self.average < 1:
            raise InputError(f"cooldown must lie in 0..1 and average in 0..1 (exclusive), not {self.cooldown} and {self.average}.")


@dataclass
class TrainingReport:
    """What a training did: steps run in all, seconds of this run, the mean loss a log interval, the validations."""

    steps: int = 0
    seconds: float = 0.0
    finished: bool = False
    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, a plateau, and a linear fall over the last `cooldown` of the steps."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    tail = config.cooldown * config.steps
    fall = min(1.0, (config.steps - step) / tail) if tail else 1.0
    return config.learning_rate * rise * max(fall, 0.0)


def generator_for(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on (seed, step) alone; the CPU's, so that every device draws the same noise."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % (1 << 63))


def make_optimizer(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over parameter groups. Raises InputError where its package is missing."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # the learning rate as it is given: scaled by a weight's size, a LoRA that starts at zero would hardly move
        own = [{key: value for key, value in group.items() if key != "eps"} for group in groups]
        found: torch.optim.Optimizer = Adafactor(own, **settings, scale_parameter=False, relative_step=False)
        return found
    if config.optimizer == "muon":
        return Muon(groups, **settings)
    if config.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise InputError("adamw8bit needs bitsandbytes: pip install 'hyperdreambooth[8bit]', or take adamw.") from error
        eight: torch.optim.Optimizer = AdamW8bit(groups, **settings)
        return eight
    return torch.optim.AdamW(groups, **settings)


def make_accelerator(config: TrainingConfig, directory: Path | None, device: str | torch.device | None) -> Accelerator:
    """accelerate keeps one global state; a second training with another precision or device needs a fresh one.

    Under a launcher the state holds the process group, so there it stays.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    else:
        # imported after the group exists (by DDP), its functions hold the group as a default: `leave` could not end its threads
        from torch.distributed.nn import functional  # noqa: F401
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        cpu=device is not None and torch.device(device).type == "cpu",
        log_with=config.tracker,
        project_dir=str(directory) if directory else None,
    )


def leave() -> None:
    """Ends the process group that a launcher's `fit` opened, if there is one, and waits for its threads.

    Left to the interpreter's end they may abort a process whose training succeeded, and the launcher calls that a failure.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Interrupts:
    """Ctrl-C and SIGTERM wait for the end of a step: between an update and its count a checkpoint would not be exact.

    A second one ends at once, without a checkpoint. Signals can be caught in the main thread alone; elsewhere they stay as they are.
    """

    def __enter__(self) -> Interrupts:
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def fit(
    step: Step,
    model: nn.Module,
    batches: Batches,
    config: TrainingConfig,
    *,
    directory: str | Path | None = None,
    device: str | torch.device | None = None,
    groups: list[dict[str, Any]] | None = None,
    validate: Validate | None = None,
    on_step: Callable[[int], bool] | None = None,
    minutes: float | None = None,
    name: str = "training",
    quiet: bool = False,
) -> TrainingReport:
    """Trains the parameters of `model` that require gradients, in place.

    Args:
        step: yields per-sample losses, shape (B,), in a context that stays open through backward.
        batches: `batches(i)` is the i-th batch. With n processes the i-th step takes n of them.
        directory: where `state.safetensors` is kept; found there, the training resumes from it.
        groups: parameter groups of the optimizer where learning rates differ (`lr_scale` multiplies the schedule).
        validate: `validate(step, model)` returns named figures that are logged.
        on_step: called after every step with the number of steps done; where it returns True, the training stops (and checkpoints).
        minutes: stop (and checkpoint) after this time; a later call goes on.

    Ctrl-C checkpoints and raises KeyboardInterrupt. Raises TrainingError at the first loss that isn't finite. With
    `average`, the averaged weights are in the model when a training finishes. Under a launcher, call `leave` after the last one.
    """
    accelerator = make_accelerator(config, Path(directory) if directory else None, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError(f"{name}: nothing to train, no parameter requires gradients.")
    groups = groups or [{"params": parameters}]
    optimizer = make_optimizer(groups, config)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    state_file = Path(directory) / "state.safetensors" if directory else None
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    average = {n: p.detach().clone() for n, p in trained.items()} if config.average else {}
    done = 0
    report = TrainingReport()
    if state_file and state_file.is_file():
        done = _restore(state_file, trained, buffers, optimizer, average, report, name, config)
    if config.tracker and accelerator.is_main_process:
        accelerator.init_trackers(name, {k: v for k, v in dataclasses.asdict(config).items() if v is not None})

    def save() -> None:
        if state_file and accelerator.is_main_process:
            meta = {"step": done, "losses": report.losses, "validations": report.validations, "config": dataclasses.asdict(config)}
            checkpoint.save(state_file, {**trained, **buffers}, optimizer.state_dict(), average, meta)

    def check(losses: Tensor) -> None:
        if not torch.isfinite(losses).all():
            bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
            raise TrainingError(
                f"{name}: the loss of sample {bad[0]} of step {done} is {losses[bad[0]].item()}. "
                "Lower the learning rate, or look at that sample."
            )

    world, rank = accelerator.num_processes, accelerator.process_index
    started = last_save = time.monotonic()
    total, counted = torch.zeros((), device=accelerator.device), 0
    show = Progress(name, config.steps, done, quiet=quiet or not accelerator.is_main_process)
    with show as progress, Interrupts() as interrupts:
        try:
            while done < config.steps:
                if interrupts.asked:
                    raise KeyboardInterrupt
                rate = learning_rate(config, done)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                for micro in range(config.gradient_accumulation):
                    index = (done * config.gradient_accumulation + micro) * world + rank
                    with (
                        accelerator.accumulate(wrapped),
                        accelerator.autocast(),
                        step(wrapped, batches(index), generator_for(config.seed, index)) as losses,
                    ):
                        check(losses.detach())
                        total += losses.detach().float().mean()
                        counted += 1
                        accelerator.backward(losses.mean())
                        if accelerator.sync_gradients and config.max_grad_norm:
                            accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                        prepared.step()
                        prepared.zero_grad()
                done += 1
                if average:
                    # a young average would otherwise remember the initial weights for long
                    weight = 1 - min(config.average, (1 + done) / (10 + done))
                    torch._foreach_lerp_(list(average.values()), [p.detach() for p in trained.values()], weight)
                if done % config.log_every == 0 or done == config.steps:
                    loss = (total / max(counted, 1)).item()
                    report.losses.append((done, round(loss, 6)))
                    accelerator.log({"loss": loss, "learning_rate": rate}, step=done)
                    total.zero_()
                    counted = 0
                    progress.log(done, loss=loss, rate=rate)
                progress.update(done)
                if validate and config.validate_every and done % config.validate_every == 0 and done < config.steps:
                    _validate(validate, done, model, trained, average, report, accelerator, progress)
                if time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                    save()
                    last_save = time.monotonic()
                if on_step and on_step(done):
                    break
                if minutes is not None and time.monotonic() - started > 60 * minutes:
                    break
        except KeyboardInterrupt:
            save()
            progress.note(f"stopped at step {done}; the same command goes on from there")
            raise
        report.steps, report.finished = done, done >= config.steps
        if validate and report.finished:
            _validate(validate, done, model, trained, average, report, accelerator, progress)
        save()
        if interrupts.asked:  # during the last step
            raise KeyboardInterrupt
    if average and report.finished:
        _swap(trained, average)
    for tracker in accelerator.trackers:  # not `end_training`, which ends the process group too: a command may train again
        tracker.finish()
    report.seconds = time.monotonic() - started
    return report


def _restore(
    file: Path,
    trained: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    report: TrainingReport,
    name: str,
    config: TrainingConfig,
) -> int:
    model, optimizer_state, saved_average, meta = checkpoint.load(file)
    expected = {n: tuple(t.shape) for n, t in {**trained, **buffers}.items()}
    found = {n: tuple(t.shape) for n, t in model.items()}
    if expected != found:
        names = sorted(set(expected.items()) ^ set(found.items()))
        raise InputError(
            f"{file} belongs to another {name}: {names[0][0]} differs. Give another folder, or delete that file to start anew."
        )
    before = meta["config"].get("optimizer", "adamw")
    if before != config.optimizer:
        raise InputError(
            f"{file} was trained with {before}, and its state means nothing to {config.optimizer}. Go on with {before}, or start anew."
        )
    with torch.no_grad():
        for n, tensor in {**trained, **buffers}.items():
            tensor.copy_(model[n])
        for n, tensor in average.items():
            tensor.copy_(saved_average.get(n, model[n]))
    optimizer.load_state_dict(optimizer_state)
    report.losses = [(int(s), float(v)) for s, v in meta["losses"]]
    report.validations = meta["validations"]
    return int(meta["step"])


def _swap(trained: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
    """Exchanges the weights and their average, in place."""
    for name, parameter in trained.items():
        current = parameter.detach().clone()
        parameter.data.copy_(average[name])
        average[name].copy_(current)


def _validate(
    validate: Validate,
    done: int,
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    report: TrainingReport,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    if average:
        _swap(trained, average)
    with torch.no_grad():
        figures = {key: float(value) for key, value in validate(done, model).items()}
    if average:
        _swap(trained, average)
    if any(math.isnan(value) for value in figures.values()):
        raise TrainingError(f"validation at step {done} gave {figures}.")
    report.validations.append({"step": done, **figures})
    accelerator.log(figures, step=done)
    progress.note(f"step {done} validation: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
