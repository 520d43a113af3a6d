"""Progress on stderr: a bar with the time left on a terminal, a line with the figures at each log step elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

console = Console(stderr=True)


def say(text: str) -> None:
    """Prints a message on stderr as one line: without wrapping, and without reading brackets in it as rich's markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def format_duration(seconds: float) -> str:
    """A duration in rounded units: 8 s, 3 min, 2 h 5 min."""
    minutes = round(seconds / 60)
    if seconds <= 59:
        return f"{math.ceil(seconds)} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def hushed() -> Iterator[None]:
    """Silences the warnings and progress bars of diffusers and transformers inside the context; download bars stay as they were."""
    from diffusers.utils import logging as diffusers_log
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before, downloads = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs], not are_progress_bars_disabled()
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    if downloads:  # transformers has turned off the hub's download bars as well
        enable_progress_bars()
    try:
        yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


class Progress:
    """`with Progress("name", total, done) as p: p.update(done)`: a bar on a terminal; elsewhere only `log` prints. `quiet`: nothing."""

    def __init__(self, name: str, total: int, done: int = 0, *, quiet: bool = False):
        self.name, self.total, self.quiet = name, total, quiet
        self.first, self.started = done, time.monotonic()
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
        self.bar = Bar(*columns, console=console, disable=quiet or not console.is_terminal)
        self.task = self.bar.add_task(name, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self, done: int) -> None:
        """Sets the bar to `done` steps."""
        self.bar.update(self.task, completed=done)

    def log(self, done: int, *, loss: float, rate: float) -> None:
        """Shows the loss beside the bar or, without a bar, prints a line with loss, learning rate, speed and time left."""
        self.bar.update(self.task, note=f"loss {loss:.4f}")
        if self.quiet or not self.bar.disable:
            return
        speed = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = f"{format_duration((self.total - done) / max(speed, 1e-9))} left" if done < self.total else "done"
        figures = f"loss {loss:.4f} lr {rate:.2e} {speed:.2f} steps/s {left}"
        print(f"{time.strftime('%H:%M:%S')} {self.name} {done}/{self.total} {figures}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Prints a message that stays above the bar."""
        if not self.quiet:
            say(f"{self.name}: {text}")
