"""The commands: of each a dataclass whose fields are the flags, such as TrainLight, and the function that runs it, run_train_light.

Nothing heavy is imported here: a command's module is imported when it is called.
"""

import importlib
from collections.abc import Callable
from typing import Any

GROUPS = {  # What each is for, command by command, and the module that holds it.
    "make and use a personal LoRA": {
        **dict.fromkeys(("personalize", "generate"), "make"),
        "app": "app",
        "demo": "demo",
        **dict.fromkeys(("info", "export", "mix", "push"), "files"),
    },
    "train": {**dict.fromkeys(("train-light", "preoptimize", "train-hypernetwork"), "train"), "recipe": "recipe"},
    "look and measure": dict.fromkeys(("targets", "evaluate"), "measure"),
}
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}


def load(name: str) -> tuple[type, Callable[[Any], int | None]]:
    """The dataclass of a command's flags, and the function that runs it."""
    module = importlib.import_module(f".{COMMANDS[name]}", __name__)
    return getattr(module, name.title().replace("-", "")), getattr(module, f"run_{name.replace('-', '_')}")
