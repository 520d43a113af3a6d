"""Foreign models behind one small interface: one file a family, chosen from what the loaded pipeline is."""

from .base import Backbone, Conditioning
from .flux import Flux
from .loading import load_backbone, trained_by_flow, wrap
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL

__all__ = [
    "Backbone",
    "Conditioning",
    "Flux",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "load_backbone",
    "trained_by_flow",
    "wrap",
]
