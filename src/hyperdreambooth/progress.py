"""Progress for people: a bar with the time left on a terminal, a line now and then in a log file."""

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
    """A line for people, on stderr: long paths aren't broken, and nothing in them is markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def spoken(seconds: float) -> str:
    """A time to wait, as people say it: 8 s, 3 min, 2 h 5 min."""
    minutes = round(seconds / 60)
    if seconds <= 59:
        return f"{math.ceil(seconds)} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def hushed() -> Iterator[None]:
    """Without the libraries' advice and their bars of a second's work until the context closes; a download keeps its bar."""
    from diffusers.utils import logging as diffusers_log
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before, downloads = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs], not are_progress_bars_disabled()
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    if downloads:  # transformers turns them off as well
        enable_progress_bars()
    try:
        yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


class Progress:
    """`with Progress("name", total, done) as p: p.update(done)`. Silent where `quiet`, lines where stderr is no terminal."""

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
        """Moves the bar."""
        self.bar.update(self.task, completed=done)

    def log(self, done: int, *, loss: float, rate: float) -> None:
        """Shows the latest loss: beside the bar, or as a line of its own with the time left."""
        self.bar.update(self.task, note=f"loss {loss:.4f}")
        if self.quiet or not self.bar.disable:
            return
        speed = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = f"{spoken((self.total - done) / max(speed, 1e-9))} left" if done < self.total else "done"
        figures = f"loss {loss:.4f} lr {rate:.2e} {speed:.2f} steps/s {left}"
        print(f"{time.strftime('%H:%M:%S')} {self.name} {done}/{self.total} {figures}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        if not self.quiet:
            console.print(f"{self.name}: {text}", highlight=False)
