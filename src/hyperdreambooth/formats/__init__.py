"""LoRA files that every tool opens, and the token file of this project."""

from .keys import check_layout
from .lora_file import Layout, LoraFile, describe, read_lora, save_lora
from .metadata import base_metadata, standard_metadata
from .sources import find_lora
from .styles import Style, styled
from .tokens import is_tokens, mix_tokens, read_tokens, save_tokens

__all__ = [
    "Layout",
    "LoraFile",
    "Style",
    "base_metadata",
    "check_layout",
    "describe",
    "find_lora",
    "is_tokens",
    "mix_tokens",
    "read_lora",
    "read_tokens",
    "save_lora",
    "save_tokens",
    "standard_metadata",
    "styled",
]
