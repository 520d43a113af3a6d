"""The toon base's words."""

from transformers import CLIPTokenizer

from .. import base
from . import pictures


def build_tokenizer() -> CLIPTokenizer:
    """Fourteen of its words stay in pieces: the shipped base has learned them so."""
    return base.build_tokenizer(pictures.vocabulary(), 32, whole=False)
