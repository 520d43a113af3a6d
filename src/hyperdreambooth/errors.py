"""Exceptions for errors that users can cause: the API raises them, the command line prints the message and exits with code 2."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def some(names: Sequence[str], count: int = 3) -> str:
    """The first `count` names and the number of the others, for a message: "a, b, c and 5 more"."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def unexpected(error: BaseException) -> str:
    """The message for any other exception: its type, the last line of its text (300 characters at most), and what to do."""
    kind, lines = type(error).__name__, [line.strip() for line in str(error).splitlines() if line.strip()]
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "memory is short. Close other programs, or try --gradient-checkpointing, fewer --copies or a smaller --batch."
    said = f": {lines[-1][:300].rstrip('.')}" if lines else ""
    return f"that went wrong in a way that isn't foreseen ({kind}{said}). Please report it, with the command, to the project."


class InputError(ValueError):
    """An argument, file or setting is wrong: the message says what is wrong, where, and what to do."""


class NoFaceError(InputError):
    """A face crop was asked for, but no face was found in the photo."""


class TrainingError(RuntimeError):
    """Training can't continue with a meaningful result, such as after a loss that isn't finite."""


@contextmanager
def refusing(what: str, *kinds: type[Exception], advice: str = "") -> Iterator[None]:
    """Turns exceptions of the types `kinds` into an InputError: "`what`: the exception's first line. `advice`"."""
    try:
        yield
    except InputError:  # a ValueError too, and its message is complete already
        raise
    except kinds as error:
        said = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
        raise InputError(f"{what}: {said.splitlines()[0][:300].rstrip('.')}. {advice}".strip()) from error


def in_range(value: float, low: float, high: float, name: str) -> None:
    """Raises InputError unless low <= value <= high."""
    if not low <= value <= high:
        raise InputError(f"{name} must lie in {low:,} to {high:,}, not {value}.")


def at_least(settings: object, **least: float) -> None:
    """Raises InputError where a field of `settings` is below the value that is given for it by its name."""
    for name, low in least.items():
        if getattr(settings, name) < low:
            raise InputError(f"{name} must be at least {low}, not {getattr(settings, name)}.")


def fresh(path: str | Path, overwrite: bool) -> Path:
    """The path of a file that is to be written. Raises InputError if it exists and `overwrite` isn't set."""
    path = Path(path) if isinstance(path, str) else path
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists. Give --overwrite to replace it, or another path.")
    return path
