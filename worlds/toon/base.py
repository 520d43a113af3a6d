"""The toon base's tokenizer."""

from transformers import CLIPTokenizer

from .. import base
from . import pictures


def build_tokenizer() -> CLIPTokenizer:
    """Splits fourteen of its words into several tokens (`whole=False`), because the shipped base was trained that way."""
    return base.build_tokenizer(pictures.vocabulary(), 32, whole=False)
