"""Conversion between pictures as uint8 arrays and as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Pictures(Protocol):
    """Pictures (N, H, W, 3) uint8, in memory or on disk."""

    def __len__(self) -> int: ...
    def __getitem__(self, indices: np.ndarray) -> np.ndarray: ...


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in -1..1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_pixels(images: Tensor) -> np.ndarray:
    """float (N, 3, H, W) in -1..1 -> uint8 (N, H, W, 3)."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def every(data: Pictures, step: int, count: int = 250) -> Iterator[Tensor]:
    """Every `step`-th picture as tensors, `count` at a time."""
    for start in range(0, len(data), step * count):
        yield to_tensor(data[np.arange(start, min(start + step * count, len(data)), step)])


def psnr(found: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """PSNR (dB) of pictures (N, 3, H, W) in -1..1: its mean over pictures, and the PSNR of the mean squared error."""
    errors = (found.clamp(-1, 1) - wanted).square().mean((1, 2, 3)) / 4
    return {"psnr": (-10 * errors.log10()).mean(), "psnr_of_mean": -10 * errors.mean().log10()}
