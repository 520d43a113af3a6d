"""Photo -> feature sequence: any vision model of transformers (ResNet, ViT, DINOv2, CLIP), frozen or trained."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError


class FaceEncoder(nn.Module):
    """Pictures (B, 3, H, W) in -1..1 -> features (B, positions, dim).

    `size`, `mean` and `std` are the model's own preprocessing, of pictures in 0..1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        trained: bool = False,
    ):
        super().__init__()
        self.model, self.size, self.trained = model, size, trained
        self.mean, self.std = tuple(mean), tuple(std)
        self._mean: Tensor
        self._std: Tensor
        for name, values in (("_mean", mean), ("_std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)
        model.requires_grad_(trained)
        self.dim = feature_dim(model)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, trained: bool = False) -> FaceEncoder:
        """A directory or hub id of a transformers vision model; CLIP-like ones give their vision tower."""
        from transformers import AutoImageProcessor, AutoModel

        try:
            model: Any = AutoModel.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise InputError(f"{source} can't be opened as a vision model of transformers: {str(error).splitlines()[0]}") from error
        model = getattr(model, "vision_model", model)
        if model.main_input_name != "pixel_values":
            raise InputError(f"{source} is a {type(model).__name__}, which doesn't read pictures. Give a vision model: DINOv2, CLIP, ViT.")
        size, mean, std = int(getattr(model.config, "image_size", 64)), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        with contextlib.suppress(OSError, ValueError):  # a model without a preprocessor takes -1..1
            processor = AutoImageProcessor.from_pretrained(source)
            wanted = getattr(processor, "crop_size", None) or processor.size
            size = int(wanted.get("height", wanted.get("shortest_edge", size)))
            mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        return cls(model, size=size, mean=mean, std=std, trained=trained)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model as transformers reads it, with its preprocessing."""
        from .checkpoint import write_json

        self.model.save_pretrained(str(folder))  # type: ignore[operator]
        write_json(
            Path(folder) / "preprocessor_config.json",
            {
                "image_processor_type": "ViTImageProcessor",
                "size": {"height": self.size, "width": self.size},
                "do_resize": True,
                "do_rescale": True,
                "do_normalize": True,
                "image_mean": list(self.mean),
                "image_std": list(self.std),
            },
        )

    def train(self, mode: bool = True) -> FaceEncoder:
        # a frozen encoder's batch statistics must not move either
        super().train(mode and self.trained)
        return self

    def resized(self, pixels: Tensor) -> Tensor:
        """Pictures in the size that the model takes."""
        if pixels.shape[-2:] == (self.size, self.size):
            return pixels
        return nn.functional.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = self.resized(pixels)
        mean, std = self._mean.to(pixels), self._std.to(pixels)
        with contextlib.nullcontext() if self.trained else torch.no_grad():
            hidden: Tensor = self.model(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state
        return hidden.flatten(2).mT if hidden.ndim == 4 else hidden


def feature_dim(model: nn.Module) -> int:
    """Channels of `last_hidden_state`."""
    config: Any = model.config
    sizes = getattr(config, "hidden_sizes", None)
    return int(sizes[-1] if sizes else config.hidden_size)
