"""Where a base runs, and in which precision, unless someone says otherwise."""

import os
from pathlib import Path

import torch


def best_dtype(base: str | Path, device: str) -> torch.dtype:
    """bfloat16 on a CUDA card that has it, float16 on older ones, float32 elsewhere, and for toon, which is small."""
    if not device.startswith("cuda") or str(base) == "toon":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def best_device() -> str:
    """cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # one GPU for each process of `accelerate launch`
    return "mps" if torch.backends.mps.is_available() else "cpu"
