"""One photo in, a personal LoRA out. See `HyperDreamBooth` for the API and `hyperdreambooth --help` for the commands."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import HyperDreamBooth
    from .personal_lora import PersonalLora

STARTED = time.perf_counter()  # The process has hardly begun: seconds that are printed are a stopwatch's, imports included.
__version__ = "0.1.0"
__all__ = ["HyperDreamBooth", "PersonalLora", "__version__"]


def __getattr__(name: str) -> object:
    # torch and diffusers take seconds to import: only where they are used
    if name in ("HyperDreamBooth", "PersonalLora"):
        from .progress import hushed

        with hushed():  # that torchvision is missing concerns nobody here
            from . import api
        return getattr(api, name)
    raise AttributeError(name)
