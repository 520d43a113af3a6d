"""Progress for people: a bar with the time left on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

console = Console(stderr=True)


def say(text: str) -> None:
    """A line for people, on stderr: long paths aren't broken, and nothing in them is markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


class Progress:
    """`with Progress("name", total, done) as p: p.update(done)`. Silent where `quiet`, lines where stderr is no terminal."""

    def __init__(self, name: str, total: int, done: int = 0, *, quiet: bool = False):
        self.name, self.total, self.quiet = name, total, quiet
        self.first, self.started = done, time.monotonic()
        self.bar: Bar | None = None
        if console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Bar(*columns, console=console)
            self.task = self.bar.add_task(name, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int) -> None:
        """Moves the bar."""
        if self.bar:
            self.bar.update(self.task, completed=done)

    def log(self, done: int, *, loss: float, rate: float) -> None:
        """Shows the latest loss: beside the bar, or as a line of its own with the time left."""
        if self.quiet:
            return
        if self.bar:
            self.bar.update(self.task, note=f"loss {loss:.4f}")
            return
        speed = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = (self.total - done) / max(speed, 1e-9) / 60
        print(
            f"{time.strftime('%H:%M:%S')} {self.name} {done}/{self.total} loss {loss:.4f} lr {rate:.2e} {speed:.2f} steps/s {left:.0f} min left",
            file=sys.stderr,
            flush=True,
        )

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        if not self.quiet:
            (self.bar.console if self.bar else console).print(f"{self.name}: {text}", highlight=False)
