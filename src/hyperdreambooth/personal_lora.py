"""A personal LoRA in memory, and how it is written: what `personalize` gives and `generate` takes."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import formats
from .errors import InputError
from .lora import LoraSet
from .trainable_lora import LightweightLora

PLACEHOLDER = "[V]"  # Stands for the person in prompts, whatever the base's own rare token is.
RARE_TOKEN = "ohwx"  # Names the person on bases whose tokenizer has no token of its own for the placeholder.


@dataclass(repr=False)
class PersonalLora:
    """A personal LoRA: one person's update of one base."""

    loras: LoraSet
    base: str
    identifier: str = PLACEHOLDER
    prompt: str = "a [V] face"
    predicted: LoraSet | None = None  # The hypernetwork's prediction before any step.
    tokens: Tensor | None = None  # The prediction as tokens (layers, width).
    lightweight: LightweightLora | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # What took how long: predict, describe, finetune, export.
    shown: list[str] = field(default_factory=list)  # What each photo was taken to show, in words.
    warning: str = ""  # What makes it doubtful that pictures will look like the person, or "".
    metadata: dict[str, str] = field(default_factory=dict)  # What a file's header says besides: about the base, or what a loaded one said.
    convolutions: frozenset[str] = frozenset()  # Layers of a loaded file that are 1 x 1 convolutions.

    def __repr__(self) -> str:
        return f"PersonalLora({self.base!r}, rank={self.rank}, layers={len(self.loras)}, trigger={self.identifier!r})"

    @property
    def rank(self) -> int:
        return max(lora.rank for lora in self.loras.values())

    def save(
        self,
        path: str | Path,
        *,
        layout: formats.Layout = "diffusers",
        dtype: torch.dtype = torch.float16,
        author: str | None = None,
        license: str | None = None,
        thumbnail: Image.Image | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes a standard LoRA: diffusers' layout, or kohya's for ComfyUI and A1111. Raises InputError where `path` exists.

        Args:
            author, license, thumbnail: what UIs show beside the LoRA.
        """
        title, trigger = Path(path).stem, self.prompt.replace(PLACEHOLDER, self.identifier)
        shown = {"author": author, "license": license, "thumbnail": thumbnail}
        about = self.metadata | formats.standard_metadata(self.loras, title=title, trigger=trigger, identifier=self.identifier, **shown)
        return formats.save_lora(path, self.loras, about, layout=layout, dtype=dtype, convolutions=self.convolutions, overwrite=overwrite)

    def save_tokens(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the prediction's tokens: the person in a few numbers a layer. The fine-tuned residual isn't in them."""
        if self.tokens is None or self.lightweight is None:
            raise InputError("only a hypernetwork's prediction has tokens: this LoRA was trained from scratch or loaded from a file.")
        about = {"base": self.base, "identifier": self.identifier, "prompt": self.prompt}
        return formats.save_tokens(path, self.tokens, self.lightweight, about, overwrite=overwrite)
