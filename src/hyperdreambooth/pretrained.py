"""A trained hypernetwork on disk: config.json, model.safetensors, and the encoder as transformers reads it.

Frozen aux matrices aren't stored: they follow from the recipe in config.json. Learnt ones are in model.safetensors.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .backbones import Backbone
from .checkpoint import read_tensors, save_tensors, write_json
from .encoder import FaceEncoder
from .errors import InputError, some
from .hub import download, write_card
from .hypernetwork import HyperNetwork
from .lightweight import LightweightLora
from .lora import Shape, canonical_modules, linear_shape
from .trainable_lora import PredictedLora
from .training_settings import HyperNetworkConfig, LightweightConfig

FORMAT = 1


@dataclass
class HyperNetworkInfo:
    """What a hypernetwork was trained for; travels with it as config.json."""

    base: str
    """The base it predicts for."""
    targets: dict[str, list[int]]
    """Layer path -> [inputs, outputs]."""
    lightweight: dict[str, Any]
    hypernetwork: dict[str, Any]
    encoder: str = "encoder"
    """The encoder's folder, relative to config.json."""
    mode: str = "pro"
    prompt: str = "a [V] face"
    """The prompt that names the person."""
    describe: list[list[str]] = field(default_factory=list)
    """Alternatives for each part of a photo's prompt, see `stages.describe`; none: photos are "the person"."""
    personalize: dict[str, Any] = field(default_factory=dict)
    """Defaults of the fine-tuning that suit this base (chosen on validation)."""
    generate: dict[str, Any] = field(default_factory=dict)
    """Defaults of generation that suit this base."""
    trained: dict[str, Any] = field(default_factory=dict)
    """How it was trained, and what it reached on validation."""
    data: str = ""
    """What it was trained on, in words."""
    license: str = ""
    """The license of its weights."""
    format: int = FORMAT


def build(targets: dict[str, Shape], encoder: FaceEncoder, lightweight: LightweightConfig, config: HyperNetworkConfig) -> PredictedLora:
    """An untrained hypernetwork: it predicts no update at all."""
    tokens = LightweightLora(targets, lightweight)
    return PredictedLora(encoder, HyperNetwork(tokens.start(), lightweight.rank * lightweight.down_dim, encoder.dim, config), tokens)


def save_hypernetwork(folder: str | Path, source: PredictedLora, info: HyperNetworkInfo, dtype: torch.dtype = torch.float16) -> Path:
    """Writes `folder`, a model card (README.md) included; the config comes last, so that a folder with one is whole."""
    folder = Path(folder)
    tensors = {name: value.to(dtype) for name, value in source.state_dict().items() if not name.startswith("encoder.")}
    if info.encoder == "encoder":
        source.encoder.save_pretrained(folder / "encoder")
    save_tensors(folder / "model.safetensors", tensors)
    write_card(folder, info)
    return write_json(folder / "config.json", asdict(info))


def load_hypernetwork(folder: str | Path, backbone: Backbone | None = None) -> tuple[PredictedLora, HyperNetworkInfo]:
    """Reads a folder or a hub id; with `backbone`, checks that its layers are the ones that were trained for.

    Raises InputError where it is no hypernetwork, of a newer format, or for another base.
    """
    if not Path(folder).exists() and str(folder).count("/") == 1:
        folder = download(str(folder))
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} has no config.json, so it isn't a hypernetwork. `train-hypernetwork` makes one.")
    values = json.loads(file.read_text(encoding="utf-8"))
    if "hypernetwork" not in values or values.get("format", 0) > FORMAT:
        raise InputError(f"{file} isn't a hypernetwork of format {FORMAT} or older.")
    info = HyperNetworkInfo(**values)
    targets = {path: Shape(*shape) for path, shape in info.targets.items()}
    if backbone is not None:
        check_targets(targets, backbone, str(folder))
    source = build(
        targets,
        FaceEncoder.from_pretrained(folder / info.encoder),
        LightweightConfig(**info.lightweight),
        HyperNetworkConfig(**info.hypernetwork),
    )
    tensors, _ = read_tensors(folder / "model.safetensors")
    missing, unexpected = source.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    wrong = [name for name in [*missing, *unexpected] if not name.startswith("encoder.")]
    if wrong:
        raise InputError(f"{folder}/model.safetensors doesn't fit its config.json: {wrong[0]} and {len(wrong) - 1} more.")
    return source.eval(), info


def check_targets(targets: dict[str, Shape], backbone: Backbone, name: str) -> None:
    """Raises InputError unless `backbone` has every layer, in the same size."""
    modules = canonical_modules(backbone.components)
    here = {path: linear_shape(modules[path]) if path in modules else None for path in targets}
    absent = [path for path, shape in here.items() if shape is None]
    other = [
        f"{path} ({targets[path].inputs} x {targets[path].outputs} there, {shape.inputs} x {shape.outputs} here)"
        for path, shape in here.items()
        if shape is not None and shape != targets[path]
    ]
    differences = [f"this one lacks {some(absent)}"] * bool(absent) + [f"other sizes have {some(other)}"] * bool(other)
    if differences:
        raise InputError(f"{name} was made for another base: of its {len(targets)} layers {'; '.join(differences)}. Open its own base.")
