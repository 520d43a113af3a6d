"""Options and small helpers that several commands share.

A command imports what is heavy in its `run`, so that `--help` needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..config import RESOLVED
from ..errors import InputError
from ..progress import say
from ..settings import explained

if TYPE_CHECKING:
    from ..api import HyperDreamBooth

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
Flat = tyro.conf.arg(name="")
"""A nested dataclass whose fields are flags without a prefix."""


@dataclass
class Machine:
    """Where it runs."""

    device: str | None = None
    """cuda, mps or cpu. Default: the best there is."""
    dtype: Dtype = "auto"
    """Precision of the frozen base; what is trained is always float32. auto: bfloat16 on a CUDA card that has it, float16 on an older
    one, float32 on a CPU."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the base predicts. auto: what it says of itself; a single file that says nothing is asked."""
    parts: tuple[str, ...] = ()
    """What a single-file base lacks (text encoders, autoencoder, T5's tokenizer): files, or directories in diffusers' layout."""
    verbose: bool = False
    """Also print every setting of personalize and generate with where its value came from."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: slower, but a fraction of the memory."""

    def explain(self, settings: object) -> None:
        for line in explained(settings) if self.verbose else ():
            say(line)

    def open(self, base: str, hypernetwork: str | None = "auto") -> HyperDreamBooth:
        import diffusers
        import torch
        import transformers

        from ..api import HyperDreamBooth

        # loading takes a second: the libraries' own progress bars would only hide what matters
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        more: dict[str, Any] = {"prediction": self.prediction, "parts": self.parts}
        hdb = HyperDreamBooth.from_pretrained(base, hypernetwork=hypernetwork, device=self.device, dtype=dtype, **more)
        if self.gradient_checkpointing:
            hdb.backbone.enable_checkpointing()
        return hdb


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Before any work is done: an output that is there is never replaced unasked."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists. Give --overwrite to replace it, or another path.")


def check_lora_name(path: Path) -> None:
    """Before any work is done: raises InputError for a LoRA file to write that no tool would take for one."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: a LoRA file is a .safetensors file. Name it {path.name}.safetensors.")


def as_json(args: Any, settings: Any = None) -> dict[str, Any]:
    """A command's settings as they are saved beside what it made, with the resolved ones and where each came from."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(args), default=str))
    return values | ({RESOLVED: explained(settings)} if settings else {})


def weighted(text: str, default: float = 1.0) -> tuple[str, float]:
    """FILE[:WEIGHT]; a colon of a Windows drive isn't a weight."""
    file, _, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if file else (text, default)
    except ValueError:
        return text, default
