"""The commands, one file each: a dataclass whose fields are the flags, and `run`.

Nothing heavy is imported here: a command's module is imported when it is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

GROUPS: dict[str, dict[str, str]] = {
    "make and use a personal LoRA": {
        "personalize": "photo -> hypernetwork -> fine-tuning -> a standard LoRA",
        "generate": "prompts + LoRAs -> pictures",
        "app": "a page in the browser: drop a photo in, take the LoRA home",
        "demo": "the whole way on an example face, offline, with a report",
        "info": "what is in a LoRA or token file",
        "export": "a LoRA from a token file, a table's row, or a train-light run; also converts layouts",
        "mix": "blend the token files of several people",
        "push": "upload a LoRA or a hypernetwork to the model hub, with a card",
    },
    "train": {
        "train-light": "lightweight DreamBooth on one subject's photos",
        "preoptimize": "tokens for every identity of a folder",
        "train-hypernetwork": "a hypernetwork that predicts tokens from a photo",
    },
    "look and measure": {
        "targets": "a base's layers: shapes, numbers of variables, bytes",
        "evaluate": "fidelity on people that were never trained on",
    },
}
"""Commands by what they are for, with a line of help each."""
COMMANDS = tuple(name for group in GROUPS.values() for name in group)


def load(name: str) -> tuple[type, Callable[[Any], int | None]]:
    """The dataclass of a command's flags, and the function that runs it."""
    module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    return getattr(module, name.title().replace("-", "")), module.run
