"""The commands: each has a dataclass whose fields are its flags, such as TrainLight, and a function that runs it, such as run_train_light.

No heavy package is imported here: the module of a command is imported when the command is called.
"""

import importlib
from collections.abc import Callable
from typing import Any

GROUPS = {  # Heading of the usage text -> command -> the module that holds it.
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
