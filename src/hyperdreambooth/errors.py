"""The errors that a user can cause. The command line prints their one message and exits with code 2; the API raises them."""

from collections.abc import Sequence


def some(names: Sequence[str], count: int = 3) -> str:
    """The first few of many names, for a message: "a, b, c and 5 more"."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


class InputError(ValueError):
    """Something that was given is wrong: the message says what, where, and what to do."""


class NoFaceError(InputError):
    """No face was found where one was asked for."""


class TrainingError(RuntimeError):
    """A training went wrong in a way that going on would hide (a loss that is not finite)."""


def in_range(value: float, low: float, high: float, name: str) -> None:
    """Raises InputError unless low <= value <= high."""
    if not low <= value <= high:
        raise InputError(f"{name} must lie in {low:,} to {high:,}, not {value}.")
