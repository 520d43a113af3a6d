"""The personal LoRA in memory, which `personalize` returns and `generate` takes, and its files."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import formats
from .errors import InputError
from .lora import LoraSet
from .trainable_lora import LightweightLora

PLACEHOLDER = "[V]"  # Stands for the person in prompts; replaced by the base's own trigger word.
RARE_TOKEN = "ohwx"  # The trigger word on bases whose tokenizer has no token for the placeholder.


@dataclass(repr=False)
class PersonalLora:
    """One person's LoRA for one base."""

    loras: LoraSet
    base: str
    identifier: str = PLACEHOLDER
    prompt: str = "a [V] face"
    predicted: LoraSet | None = None  # The hypernetwork's prediction, before fine-tuning.
    tokens: Tensor | None = None  # The prediction as tokens (layers, width).
    lightweight: LightweightLora | None = None  # Decodes the tokens into a LoRA.
    losses: list[tuple[int, float]] = field(default_factory=list)  # Of the fine-tuning: (step, mean since the last entry).
    seconds: dict[str, float] = field(default_factory=dict)  # By stage: predict, describe, finetune, export.
    shown: list[str] = field(default_factory=list)  # A description of each photo.
    notes: list[str] = field(default_factory=list)  # What was chosen when the photos were read, see `photos.read_photos`.
    warning: str = ""  # Why pictures may not look like the person, or "".
    metadata: dict[str, str] = field(default_factory=dict)  # More entries for the file's header: about the base, or from a loaded file.
    convolutions: frozenset[str] = frozenset()  # Layers whose LoRA a loaded file holds as 1 x 1 convolutions.

    def __repr__(self) -> str:
        return f"PersonalLora({self.base!r}, rank={self.rank}, layers={len(self.loras)}, trigger={self.identifier!r})"

    @property
    def rank(self) -> int:
        """The largest rank of all layers."""
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
        """Writes a LoRA file: in diffusers' layout, or in kohya's for ComfyUI and A1111. Raises InputError where `path` exists.

        Args:
            author, license, thumbnail: metadata that user interfaces show beside the LoRA.
        """
        title, trigger = Path(path).stem, self.prompt.replace(PLACEHOLDER, self.identifier)
        shown = {"author": author, "license": license, "thumbnail": thumbnail}
        about = formats.standard_metadata(self.loras, title=title, trigger=trigger, identifier=self.identifier, **shown)
        about = formats.with_own_words(self.metadata | about, self.metadata)
        return formats.save_lora(path, self.loras, about, layout=layout, dtype=dtype, convolutions=self.convolutions, overwrite=overwrite)

    def save_tokens(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the prediction's tokens, without the fine-tuned residual. Raises InputError where there are none, or `path` exists."""
        if self.tokens is None or self.lightweight is None:
            raise InputError("only a hypernetwork's prediction has tokens: this LoRA was trained from scratch or loaded from a file.")
        about = {"base": formats.public_name(self.base), "identifier": self.identifier, "prompt": self.prompt}
        return formats.save_tokens(path, self.tokens, self.lightweight, about, overwrite=overwrite)
