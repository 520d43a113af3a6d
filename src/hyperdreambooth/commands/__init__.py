"""The commands: a dataclass of flags and a plain function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .app import App, run_app
from .look import Demo, Evaluate, Info, Targets, run_demo, run_evaluate, run_info, run_targets
from .share import Push, run_push
from .train import Preoptimize, TrainHypernetwork, TrainLight, run_preoptimize, run_train_hypernetwork, run_train_light
from .use import Export, Generate, Mix, Personalize, run_export, run_generate, run_mix, run_personalize

Command = tuple[type, Callable[[Any], int | None]]
COMMANDS: dict[str, Command] = {
    "personalize": (Personalize, run_personalize),
    "generate": (Generate, run_generate),
    "app": (App, run_app),
    "demo": (Demo, run_demo),
    "info": (Info, run_info),
    "export": (Export, run_export),
    "mix": (Mix, run_mix),
    "push": (Push, run_push),
    "train-light": (TrainLight, run_train_light),
    "preoptimize": (Preoptimize, run_preoptimize),
    "train-hypernetwork": (TrainHypernetwork, run_train_hypernetwork),
    "targets": (Targets, run_targets),
    "evaluate": (Evaluate, run_evaluate),
}
