"""One photo in, a personal LoRA out. See `HyperDreamBooth` for the API and `hyperdreambooth --help` for the commands."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import HyperDreamBooth
    from .personal_lora import PersonalLora

STARTED = time.perf_counter()  # About when the process began: durations that are printed count from here, imports included.
__version__ = "0.1.0"
__all__ = ["HyperDreamBooth", "PersonalLora", "__version__"]


def __getattr__(name: str) -> object:
    # imported at first use, since torch and diffusers take seconds to import
    if name in ("HyperDreamBooth", "PersonalLora"):
        from .progress import hushed

        with hushed():  # hides the warnings that torchvision is missing, which isn't needed
            from . import api
        return getattr(api, name)
    raise AttributeError(name)
