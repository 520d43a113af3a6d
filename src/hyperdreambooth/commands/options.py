"""Options and small helpers that several commands share.

Commands import heavy packages inside their functions, so that `--help` needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from ..errors import InputError, fresh
from ..progress import say
from ..settings import RESOLVED, Crop, GenerateConfig, PersonalizeConfig, explained

if TYPE_CHECKING:
    import psutil
    from PIL import Image

    from ..api import HyperDreamBooth

Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
Flat = tyro.conf.arg(name="")  # A nested dataclass whose fields are flags without a prefix.


@dataclass
class Machine:
    """Device, precision and memory."""

    device: str | None = None  # cuda, mps or cpu. Default: the first of these that is available.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen base; trained weights are always float32. auto: bfloat16 on a CUDA card that supports it, float16 on an
    older one, float32 elsewhere and for toon."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the denoiser predicts. auto: as the base's files say; for a single file that doesn't, its output on noise is examined."""
    parts: tuple[str, ...] = ()
    """Components that a single-file base lacks (text encoders, autoencoder, T5's tokenizer): files, or directories in diffusers' layout."""
    quantize: Literal["nf4", "int8"] | None = None
    """Store the denoiser and T5 in 4 or 8 bits per weight, which needs the extra `quantized`: SDXL fits 8 GB, Flux 16 GB."""
    verbose: bool = False  # Also print every setting of personalize and generate, and where its value came from.
    device_memory: Literal["auto", "low", "high"] = "auto"
    """low: text encoders leave the device once prompts are encoded. high: they stay. auto: low where the device's memory is short."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, in a fraction of the memory. Turned on anyway where a GPU's memory runs out."""

    def explain(self, settings: PersonalizeConfig | GenerateConfig) -> None:
        for line in explained(settings) if self.verbose else ():
            say(line)

    def open(self, base: str, hypernetwork: str | None = "auto") -> HyperDreamBooth:
        import psutil
        import torch

        from ..api import HyperDreamBooth

        process = psutil.Process()
        busy_elsewhere(process)
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        own: dict[str, Any] = {name: getattr(self, name) for name in ("device", "prediction", "parts", "quantize")}
        hdb = HyperDreamBooth.from_pretrained(base, hypernetwork=hypernetwork, dtype=dtype, **own)
        hdb.backbone.device_memory = self.device_memory
        if self.gradient_checkpointing:
            hdb.backbone.denoiser.enable_gradient_checkpointing()
        if hdb.device.type == "cpu" and torch.get_num_threads() > 1 and busy_elsewhere(process) > 0.5:
            say(
                "Other programs keep a core busy, and threads that wait for it can take ten times as long: OMP_NUM_THREADS=1 is faster now."
            )
        return hdb


def busy_elsewhere(process: psutil.Process) -> float:
    """How many cores other programs kept busy since the last call; the first one starts the clock. `process`: this one."""
    import psutil

    return psutil.cpu_percent() / 100 * psutil.cpu_count() - process.cpu_percent() / 100


@dataclass(kw_only=True)
class Command:
    """The flags of every command that opens a base; the classes below add flags that several commands share."""

    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


@dataclass(kw_only=True)
class WithBase(Command):
    base: str = "toon"  # "toon" (shipped), a directory in diffusers' layout, a .safetensors checkpoint, or a hub id.


@dataclass(kw_only=True)
class WithHypernetwork(WithBase):
    hypernetwork: str = "auto"  # A directory or hub id. "none": none, so people are trained from scratch. "auto": the shipped one for toon.


@dataclass(kw_only=True)
class WithCrop:
    crop: Crop = "auto"
    """What a photo is cropped to. auto: the face if one is found, else the center square. face: the face, or an error. center: the center
    square. Finding faces needs the extra `faces`."""


@dataclass(kw_only=True)
class Writing:
    overwrite: bool = False  # Replace existing output.
    config_file: ClassVar[str | None] = None  # Set for each call to the file that --config names.

    def refuse_existing(self, *paths: Path | None) -> None:
        """Called before any work is done: raises InputError where an output exists, unless `overwrite` is set."""
        for path in paths:
            if path:
                fresh(path, self.overwrite)

    def refuse_foreign_settings(self, path: Path) -> None:
        """The same for a file of settings, which may be replaced where a command saved it or --config names it."""
        named = self.config_file is not None and Path(self.config_file).resolve() == path.resolve()
        if not named and RESOLVED not in json_at(path):
            self.refuse_existing(path)


def json_at(path: Path) -> dict[str, Any]:
    """The JSON object in a file that anybody may have written; empty where there is none."""
    from ..checkpoint import read_json

    try:
        return read_json(path)
    except InputError:
        return {}


def check_lora_name(path: Path) -> None:
    """Called before any work is done: raises InputError where the LoRA file to write isn't named .safetensors, as all tools expect."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: a LoRA file is a .safetensors file. Name it {path.name}.safetensors.")


def save_sheet(path: Path, rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], columns: Sequence[str], what: str) -> None:
    """Saves a labeled grid of pictures as a PNG whose metadata says that they are generated, and prints its path with the words `what`."""
    from .. import photos

    photos.save_png(photos.grid(rows, labels, columns), path, {"ai_generated": "true"}, overwrite=True)
    say(f"{path}: {what}")


def as_json(args: Any, settings: PersonalizeConfig | GenerateConfig | None = None) -> dict[str, Any]:
    """A command's flags as they are saved beside its output; with `settings`, also the resolved values and where each came from."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(args), default=str))
    return values | ({RESOLVED: explained(settings)} if settings else {})


def save_settings(path: Path, args: Any, settings: PersonalizeConfig | GenerateConfig) -> None:
    from ..checkpoint import write_json

    write_json(path, as_json(args, settings))
    say(f"{path}: the settings, which --config takes again")


def weighted(text: str, default: float = 1.0) -> tuple[str, float]:
    """Splits FILE[:WEIGHT] into file and weight, or `default`. The colon of a Windows drive doesn't count."""
    file, _, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if file else (text, default)
    except ValueError:
        return text, default
