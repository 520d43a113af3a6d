"""The commands: of each a dataclass whose fields are the flags, such as TrainLight, and the function that runs it, run_train_light.

Nothing heavy is imported here: a command's module is imported when it is called.
"""

import importlib
from collections.abc import Callable
from typing import Any

GROUPS = {
    "make and use a personal LoRA": ("personalize", "generate", "app", "demo", "info", "export", "mix", "push"),
    "train": ("train-light", "preoptimize", "train-hypernetwork"),
    "look and measure": ("targets", "evaluate"),
}  # Commands by what they are for.
SHARED = {"files": ("info", "export", "mix", "push"), "train": ("train-light", "train-hypernetwork"), "measure": ("targets", "evaluate")}
"""Modules of several commands; the others have one of their own name."""
COMMANDS = tuple(name for group in GROUPS.values() for name in group)


def load(name: str) -> tuple[type, Callable[[Any], int | None]]:
    """The dataclass of a command's flags, and the function that runs it."""
    module = importlib.import_module(f".{next((file for file, names in SHARED.items() if name in names), name)}", __name__)
    return getattr(module, name.title().replace("-", "")), getattr(module, f"run_{name.replace('-', '_')}")
