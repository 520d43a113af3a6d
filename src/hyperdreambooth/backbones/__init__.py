"""Foreign models behind one small interface: one file a family, chosen from what the loaded pipeline is."""

from .base import Backbone, Conditioning, load_backbone
from .sd import StableDiffusion

__all__ = ["Backbone", "Conditioning", "StableDiffusion", "load_backbone"]
