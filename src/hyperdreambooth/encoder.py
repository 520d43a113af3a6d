"""Photo -> feature sequence: any vision model of transformers (ResNet, ViT, DINOv2, CLIP), frozen or trained."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from .checkpoint import read_header, read_json, write_json
from .errors import InputError, refusing, some
from .progress import hushed

HALVES = (0.5, 0.5, 0.5)  # Mean and standard deviation of each channel that turn 0..1 into -1..1.
LARGEST_PICTURE = 2048  # Largest side, in pixels, of the pictures that an encoder may ask for.


class FaceEncoder(nn.Module):
    """Pictures (B, 3, H, W) in -1..1 -> features (B, positions, dim).

    `size`, `mean` and `std` are the model's preprocessing: the side in pixels, and each channel's mean and standard deviation in 0..1.
    """

    def __init__(
        self, model: nn.Module, *, size: int, mean: tuple[float, ...] = HALVES, std: tuple[float, ...] = HALVES, trained: bool = False
    ):
        super().__init__()
        self.model, self.size, self.trained = model.requires_grad_(trained), size, trained
        self.mean, self.std = tuple(mean), tuple(std)
        self._values: Tensor
        self.register_buffer("_values", torch.tensor([mean, std]).reshape(2, 1, 3, 1, 1), persistent=False)
        config: Any = model.config
        self.dim = int((getattr(config, "hidden_sizes", None) or [config.hidden_size])[-1])  # Channels of the features.

    @classmethod
    def from_pretrained(cls, source: str | Path, *, trained: bool = False) -> FaceEncoder:
        """Opens a vision model of transformers, by directory or hub id; of CLIP-like ones, the vision tower.

        Raises InputError if it can't be opened, its config doesn't fit its weights, or it doesn't turn a picture into features.
        """
        model = _open_model(source)
        with refusing(f"{source}: its preprocessing can't be read", Exception):
            size, mean, std = _preprocessing(source, model)
        if not 1 <= size <= LARGEST_PICTURE or len(mean) != 3 or len(std) != 3 or not all(0 < deviation < 1e3 for deviation in std):
            raise InputError(f"{source}: its preprocessing can't be: size {size}, mean {mean}, standard deviation {std}.")
        with refusing(f"{source}: it can't look at a picture", Exception), torch.no_grad():
            encoder = cls(model, size=size, mean=mean, std=std, trained=trained).eval()
            features = encoder(torch.zeros(1, 3, size, size))
        if features.ndim != 3 or features.shape[-1] != encoder.dim or not features.isfinite().all():
            raise InputError(f"{source} gives no finite features of size {encoder.dim}: its weights or its config are damaged.")
        return encoder

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model and its preprocessing in transformers' format."""
        self.model.save_pretrained(str(folder))  # type: ignore[operator]
        steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
        values = {"size": {"height": self.size, "width": self.size}, "image_mean": list(self.mean), "image_std": list(self.std)}
        write_json(Path(folder) / "preprocessor_config.json", {"image_processor_type": "ViTImageProcessor", **steps, **values})

    def train(self, mode: bool = True) -> FaceEncoder:
        # in training mode, batch normalization would update its statistics although the weights are frozen
        super().train(mode and self.trained)
        return self

    def resized(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in the size that the model takes, (B, 3, size, size)."""
        if pixels.shape[-2:] == (self.size, self.size):
            return pixels
        return nn.functional.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = self.resized(pixels)
        mean, std = self._values.to(pixels)
        with contextlib.nullcontext() if self.trained else torch.no_grad():
            hidden: Tensor = self.model(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state
        return hidden.flatten(2).mT if hidden.ndim == 4 else hidden


@hushed()
def _open_model(source: str | Path) -> Any:
    from transformers import AutoModel

    if Path(source).is_dir():
        _check_depths(Path(source))
    with refusing(f"{source}: it can't be opened as a vision model of transformers", Exception):
        if not Path(source).is_dir():
            # without a connection this fails at once, where transformers would retry for most of a minute
            snapshot_download(str(source), allow_patterns=["config.json"])
        model, found = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    # the pooler isn't used, and a file may also hold a classifier's head; a layer that config or weights lack is an error
    absent = [name for name in found["missing_keys"] if "pooler" not in name]
    unused = [name for name in found["unexpected_keys"] if re.search(r"\.\d+\.", name)]
    if absent or unused:
        raise InputError(f"{source}: its weights don't fit its config.json: {some([*absent, *unused])}.")
    model = getattr(model, "vision_model", model)
    if model.main_input_name != "pixel_values":
        raise InputError(f"{source} is a {type(model).__name__}, which doesn't read pictures. Give a vision model: DINOv2, CLIP, ViT.")
    return model


def _preprocessing(source: str | Path, model: Any) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """The preprocessing of a model: the side in pixels, and each channel's mean and standard deviation in 0..1."""
    from transformers import AutoImageProcessor

    size = int(getattr(model.config, "image_size", 64))
    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):
        if (Path(source) / "preprocessor_config.json").is_file():
            raise
        return size, HALVES, HALVES  # a model without a preprocessor takes -1..1
    wanted = getattr(processor, "crop_size", None) or processor.size
    size = int(wanted.get("height", wanted.get("shortest_edge", size)))
    return size, tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))


def _check_depths(folder: Path) -> None:
    """Raises InputError if config.json asks for more layers than model.safetensors has tensors: building them could take forever."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if not (weights.is_file() and config.is_file()):
        return  # something else for transformers to open, or to refuse
    most, values = len(read_header(weights)[0]), read_json(config)
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        for name, value in part.items():
            depths = value if isinstance(value, list) else [value]
            if ("layers" in name or name == "depths") and any(isinstance(depth, (int, float)) and depth > most for depth in depths):
                raise InputError(f"{config}: {name} is {value}, and {weights.name} has {most} tensors.")
