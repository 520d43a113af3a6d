"""LoRA files that every tool opens, and the token file of this project."""

from .keys import check_layout
from .lora_file import Layout, LoraFile, describe, read_lora, save_lora
from .metadata import base_metadata, standard_metadata
from .tokens import is_tokens, mix_tokens, read_tokens, save_tokens

__all__ = [
    "Layout",
    "LoraFile",
    "base_metadata",
    "check_layout",
    "describe",
    "is_tokens",
    "mix_tokens",
    "read_lora",
    "read_tokens",
    "save_lora",
    "save_tokens",
    "standard_metadata",
]
