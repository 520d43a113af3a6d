"""The commands: of each a dataclass whose fields are the flags, such as TrainLight, and the function that runs it, run_train_light.

Nothing heavy is imported here: a command's module is imported when it is called.
"""

import importlib
from collections.abc import Callable
from typing import Any

MODULES = {
    "make": ("personalize", "generate"),
    "app": ("app",),
    "demo": ("demo",),
    "files": ("info", "export", "mix", "push"),
    "train": ("train-light", "preoptimize", "train-hypernetwork"),
    "recipe": ("recipe",),
    "measure": ("targets", "evaluate"),
}
GROUPS = {"make and use a personal LoRA": ("make", "app", "demo", "files"), "train": ("train", "recipe"), "look and measure": ("measure",)}
COMMANDS = {name: module for module, names in MODULES.items() for name in names}


def load(name: str) -> tuple[type, Callable[[Any], int | None]]:
    """The dataclass of a command's flags, and the function that runs it."""
    module = importlib.import_module(f".{COMMANDS[name]}", __name__)
    return getattr(module, name.title().replace("-", "")), getattr(module, f"run_{name.replace('-', '_')}")
