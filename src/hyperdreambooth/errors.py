"""The errors that a user can cause. The command line prints their one message and exits with code 2; the API raises them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def some(names: Sequence[str], count: int = 3) -> str:
    """The first few of many names, for a message: "a, b, c and 5 more"."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def unexpected(error: BaseException) -> str:
    """A sentence about an error that nobody foresaw: what kind it is, its last line, and what to do."""
    kind, lines = type(error).__name__, [line.strip() for line in str(error).splitlines() if line.strip()]
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "memory is short. Close other programs, or try --gradient-checkpointing, fewer --copies or a smaller --batch."
    said = f": {lines[-1][:300].rstrip('.')}" if lines else ""
    return f"that went wrong in a way that isn't foreseen ({kind}{said}). Please report it, with the command, to the project."


class InputError(ValueError):
    """Something that was given is wrong: the message says what, where, and what to do."""


class NoFaceError(InputError):
    """No face was found where one was asked for."""


class TrainingError(RuntimeError):
    """A training went wrong in a way that going on would hide (a loss that is not finite)."""


@contextmanager
def refusing(what: str, *kinds: type[Exception], advice: str = "") -> Iterator[None]:
    """Turns errors of these kinds into one InputError: `what` is wrong, the error's first line, and what to do."""
    try:
        yield
    except InputError:  # is a ValueError
        raise
    except kinds as error:
        said = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
        raise InputError(f"{what}: {said.splitlines()[0][:300].rstrip('.')}. {advice}".strip()) from error


def in_range(value: float, low: float, high: float, name: str) -> None:
    """Raises InputError unless low <= value <= high."""
    if not low <= value <= high:
        raise InputError(f"{name} must lie in {low:,} to {high:,}, not {value}.")


def fresh(path: str | Path, overwrite: bool) -> Path:
    """The path of a file that is to be written. Raises InputError where it exists and may not be replaced."""
    path = Path(path) if isinstance(path, str) else path
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists. Give --overwrite to replace it, or another path.")
    return path
