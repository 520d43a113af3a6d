"""The only training loop. It knows nothing of LoRAs, diffusion or pictures.

A step has two halves. `draw(index, generator)` makes a batch: pictures, noise, time steps. It runs on the host and depends on
(seed, step) alone, so that a training that was stopped and resumed gives exactly the weights of one that wasn't.
`losses(model, batch)` computes one loss per sample, shape (B,), with static shapes and on the device alone; on CUDA, losses,
backward pass and optimizer step are recorded as one graph and replayed (`replay.py`).

accelerate handles devices, several GPUs, mixed precision, gradient accumulation and trackers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

from . import checkpoint, replay
from .errors import InputError, TrainingError
from .optimizers import learning_rate, make_optimizer, set_rate
from .progress import Progress
from .training_settings import TrainingConfig

Batch = Any
Losses = Callable[[nn.Module, Batch], Tensor]
Draw = Callable[[int, torch.Generator], Batch]
Validate = Callable[[int, nn.Module], Mapping[str, "float | Image.Image"]]


@dataclass
class Run:
    """One run of a training: its checkpoint's folder, its device, its time limit and its callbacks."""

    directory: str | Path | None = None  # Folder of the checkpoint `state.safetensors`; if it is there, the training resumes from it.
    device: str | torch.device | None = None  # Default: the device that accelerate chooses.
    groups: list[dict[str, Any]] | None = None
    """Parameter groups of the optimizer, for learning rates that differ (`lr_scale` multiplies the schedule). Default: one group."""
    validate: Validate | None = None  # `validate(step, model)` returns, by name, figures to log and pictures for the tracker.
    on_step: Callable[[int], bool] | None = None
    """Called after every step with the number of steps done; if it returns True, the training writes a checkpoint and stops."""
    minutes: float | None = None  # Time after which the training writes a checkpoint and stops; a later call resumes it.
    name: str = "training"
    quiet: bool = False
    stamp: str = ""  # Identifies data, initial weights and settings, see `stamp_of`: a checkpoint with another stamp is refused.


@dataclass
class TrainingReport:
    """What a training did: steps done over all runs, seconds of this run, (step, mean loss) per log interval, figures per validation."""

    steps: int = 0
    seconds: float = 0.0
    finished: bool = False
    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)


def generator_for(seed: int, step: int) -> torch.Generator:
    """A generator that depends on (seed, step) alone, on the CPU, so that training on any device draws the same noise."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % (1 << 63))


def make_accelerator(config: TrainingConfig, run: Run) -> Accelerator:
    """An Accelerator for this run. accelerate's global state is reset first: an earlier training may have had another precision or device.

    Under a launcher the state holds the process group, so it is kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    else:
        # DDP imports this module later, when its functions would keep the process group as a default: `leave` couldn't end its threads
        from torch.distributed.nn import functional  # noqa: F401
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        cpu=run.device is not None and torch.device(run.device).type == "cpu",
        log_with=config.tracker,
        project_dir=str(run.directory) if run.directory else None,
    )


def leave() -> None:
    """Ends the process group that `fit` opened under a launcher, if there is one, and waits for its threads.

    Threads that are still running when the interpreter exits may abort the process, and the launcher would report a failed training.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM in a list, for the end of a step: between an update and its count a checkpoint would not be exact.

    A second signal raises KeyboardInterrupt at once. Python handles signals in the main thread only; in others nothing is changed.
    """
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.inference_mode(False)  # this turns gradients on too
def fit(losses: Losses, model: nn.Module, draw: Draw, config: TrainingConfig, run: Run | None = None) -> TrainingReport:
    """Trains the parameters of `model` that require gradients, in place.

    Args:
        losses: `losses(model, batch)` gives per-sample losses, shape (B,). An attribute `key` identifies the computation (see `replay.py`).
        draw: `draw(i, generator)` gives the i-th batch; n processes take n batches at a time, one each.

    Gradients are on here, even where the caller turned them off by `torch.no_grad` or `torch.inference_mode`.
    Ctrl-C writes a checkpoint after the current step and raises KeyboardInterrupt; a second one raises it at once, without a checkpoint.
    Raises TrainingError at the first loss that isn't finite. With `average`, a training that finishes leaves the averaged weights in the
    model. Under a launcher, call `leave` after the last training.
    """
    run = run or Run()
    accelerator = make_accelerator(config, run)
    state = State(model, config, run, accelerator.device)
    update = make_update(losses, accelerator, state)
    if config.tracker and accelerator.is_main_process:
        accelerator.init_trackers(run.name, {k: v for k, v in dataclasses.asdict(config).items() if v is not None})
    world, rank, saves = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    started = last_save = time.monotonic()
    means, report = [], state.report  # mean losses since the last log
    with Progress(run.name, config.steps, state.done, quiet=run.quiet or not saves) as progress, interrupts() as received:
        try:
            while state.done < config.steps:
                if received:
                    raise KeyboardInterrupt
                rate = learning_rate(config, state.done)
                set_rate(state.optimizer, rate)
                for micro in range(config.gradient_accumulation):
                    index = (state.done * config.gradient_accumulation + micro) * world + rank
                    values = update(draw(index, generator_for(config.seed, index)))
                    check_finite(values, run.name, state.done)
                    means.append(values.float().mean())
                state.done += 1
                state.update_average()
                done = state.done
                if done % config.log_every == 0 or done == config.steps:
                    loss = torch.stack(means).mean().item()
                    report.losses.append((done, round(loss, 6)))
                    accelerator.log({"loss": loss, "learning_rate": rate}, step=done)
                    means.clear()
                    progress.log(done, loss=loss, rate=rate)
                progress.update(done)
                if run.validate and config.validate_every and done % config.validate_every == 0 and done < config.steps:
                    state.validate(run.validate, accelerator, progress)
                if saves and time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                    state.save()
                    last_save = time.monotonic()
                late = run.minutes is not None and time.monotonic() - started > 60 * run.minutes
                if (run.on_step and run.on_step(done)) or late:
                    break
        except KeyboardInterrupt:
            exact = len(received) < 2  # a second signal may have come between an update and its count
            if saves and exact:
                state.save()
            place = "there" if exact else "its last checkpoint"
            progress.note(f"stopped at step {state.done}; the same command goes on from {place}")
            raise
        report.steps, report.finished = state.done, state.done >= config.steps
        if saves:
            state.save()  # before the validation, which may fail
        if run.validate and report.finished:
            state.validate(run.validate, accelerator, progress)
            if saves:
                state.save()  # again, with the validation's figures
        if received:  # during the last step
            raise KeyboardInterrupt
    if report.finished:
        state.swap()
    state.keep_own_memory()
    for tracker in accelerator.trackers:  # not `end_training`, which ends the process group too: a command may train again
        tracker.finish()
    report.seconds = time.monotonic() - started
    return report


def make_update(losses: Losses, accelerator: Accelerator, state: State) -> Callable[[Batch], Tensor]:
    """A function that trains on one batch (forward, backward, optimizer step) and returns its losses (B,), detached."""
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    config = state.config

    def update(batch: Batch) -> Tensor:
        with accelerator.accumulate(model), accelerator.autocast():
            values = losses(model, batch)
            accelerator.backward(values.mean())
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_(state.parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            return values.detach()

    plain = accelerator.num_processes == config.gradient_accumulation == 1 and config.mixed_precision == "no"
    if accelerator.device.type != "cuda" or not plain or config.optimizer != "adamw":
        return update
    key = getattr(losses, "key", None) or (replay.token(losses),)
    memory = replay.Memory(state.model, state.optimizer)
    return replay.Replayed(update, (*key, config.max_grad_norm, memory.kind()), memory)


def check_finite(losses: Tensor, name: str, step: int) -> None:
    """Raises TrainingError if a loss isn't finite, naming the first such sample."""
    if not torch.isfinite(losses).all():
        bad = int((~torch.isfinite(losses)).nonzero()[0, 0])
        loss = f"the loss of sample {bad} of step {step} is {losses[bad].item()}"
        raise TrainingError(f"{name}: {loss}. Lower the learning rate, or look at that sample.")


class State:
    """The state of a training, as it is checkpointed: weights, buffers, optimizer, averaged weights, step count, report."""

    def __init__(self, model: nn.Module, config: TrainingConfig, run: Run, device: torch.device):
        self.model, self.config, self.name, self.stamp = model, config, run.name, run.stamp
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise InputError(f"{run.name}: nothing to train, no parameter requires gradients.")
        self.optimizer = make_optimizer(run.groups or [{"params": self.parameters}], config, device)
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.saved = {**self.trained, **{n: b for n, b in model.named_buffers() if n in model.state_dict()}}
        self.average = {n: p.detach().clone() for n, p in self.trained.items()} if config.average else {}
        self.done, self.report = 0, TrainingReport()
        self.file = Path(run.directory) / "state.safetensors" if run.directory else None
        if self.file and self.file.is_file():
            self.restore(self.file)

    def save(self) -> None:
        if self.file:
            report = {"losses": self.report.losses, "validations": self.report.validations}
            meta = {"step": self.done, "stamp": self.stamp, **report, "config": dataclasses.asdict(self.config)}
            checkpoint.save(self.file, self.saved, self.optimizer.state_dict(), self.average, meta)

    def restore(self, file: Path) -> None:
        """Loads a checkpoint. Raises InputError for that of another model, optimizer or stamp; older ones have no stamp."""
        model, optimizer, average, meta = checkpoint.load(file)
        what_to_do = "Give another folder, or delete that file to start anew."
        if differing := {(n, t.shape) for n, t in self.saved.items()} ^ {(n, t.shape) for n, t in model.items()}:
            raise InputError(f"{file} belongs to another {self.name}: {min(differing)[0]} differs. {what_to_do}")
        before, now = meta["config"].get("optimizer", "adamw"), self.config.optimizer
        if before != now:
            raise InputError(f"{file} was trained with {before}, and its state means nothing to {now}. Go on with {before}, or start anew.")
        if meta.get("stamp") and meta["stamp"] != self.stamp:
            raise InputError(f"{file} holds the training of other photos or settings. {what_to_do}")
        with torch.no_grad():
            for n, tensor in self.saved.items():
                tensor.copy_(model[n])
            for n, tensor in self.average.items():
                tensor.copy_(average.get(n, model[n]))
        own = [{key: group[key] for key in ("lr", "capturable", "fused") if key in group} for group in self.optimizer.param_groups]
        groups = [{**group, **mine} for group, mine in zip(optimizer["param_groups"], own, strict=True)]
        self.optimizer.load_state_dict({**optimizer, "param_groups": groups})
        for parameter, values in self.optimizer.state.items():
            for n, value in values.items():
                if value.shape == parameter.shape:  # in the parameter's memory format, as an optimizer makes them
                    values[n] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.report.losses = [(int(s), float(v)) for s, v in meta["losses"]]
        self.report.validations = meta["validations"]
        self.done = int(meta["step"])

    def update_average(self) -> None:
        """Moves the exponential moving average of the weights towards the present weights."""
        if self.average:
            # the decay grows over the first steps: otherwise the initial weights would stay in the average for long
            weight = 1 - min(self.config.average, (1 + self.done) / (10 + self.done))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.trained.values()], weight)

    def swap(self) -> None:
        """Exchanges the weights and their average, in place."""
        for name, average in self.average.items():
            current = self.trained[name].detach().clone()
            self.trained[name].data.copy_(average)
            average.copy_(current)

    def validate(self, validate: Validate, accelerator: Accelerator, progress: Progress) -> None:
        """Logs the figures and pictures of `validate`, by the averaged weights if there are any. Raises TrainingError for a NaN."""
        self.swap()
        try:
            with torch.no_grad():
                found = validate(self.done, self.model)
        finally:
            self.swap()
        pictures = {key: value for key, value in found.items() if isinstance(value, Image.Image)}
        figures = {key: float(value) for key, value in found.items() if not isinstance(value, Image.Image)}
        if any(math.isnan(value) for value in figures.values()):
            raise TrainingError(f"validation at step {self.done} gave {figures}.")
        self.report.validations.append({"step": self.done, **figures})
        accelerator.log(figures, step=self.done)
        # accelerate logs pictures to some trackers only (tensorboard, wandb, aim, clearml, swanlab); the others get the figures
        for tracker in [one for one in accelerator.trackers if pictures and hasattr(one, "log_images")]:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({key: np.asarray(picture)[None] for key, picture in pictures.items()}, step=self.done, **layout)
        progress.note(f"step {self.done} validation: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))

    def keep_own_memory(self) -> None:
        """Moves the model's tensors out of the memory of a CUDA recording, which the next training overwrites."""
        if any(p.is_cuda for p in self.parameters):
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                tensor.data = tensor.data.clone()
