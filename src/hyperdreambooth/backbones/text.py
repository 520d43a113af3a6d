"""Prompts as the text encoders read them."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..progress import say

CLIP_LENGTH = 77
say_once = functools.cache(say)


def clip_ids(tokenizer: Any, encoder: Any, prompts: list[str], chunks: int = 1) -> Tensor:
    """Prompts as CLIP reads them, (B, chunks, 77): a long one in chunks of 75 tokens between start and end, as A1111 and ComfyUI do.

    All get as many chunks as the longest takes, but at least `chunks`; 77 is whatever tokenizer and encoder have.
    """
    size = min(tokenizer.model_max_length, encoder.config.max_position_embeddings if encoder is not None else CLIP_LENGTH) - 2
    # the tokenizer would warn that its encoder can't read that many at once
    words = [tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids for prompt in prompts]
    chunks = max(chunks, *(math.ceil(len(ids) / size) for ids in words))
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    parts = [[ids[size * i : size * (i + 1)] for i in range(chunks)] for ids in words]
    return torch.tensor([[[start, *part, end, *[pad] * (size - len(part))] for part in row] for row in parts])


def t5_ids(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """Prompts padded or cut to `length` tokens, (B, length). What is cut off is said, once."""
    for prompt in prompts:
        ids = tokenizer(prompt, verbose=False).input_ids
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 :], skip_special_tokens=True)
            say_once(f"the prompt is too long for T5, which reads {length} tokens of {len(ids)}. Lost there: {lost}")
    found: Tensor = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    return found


def joined(hidden: Tensor, ids: Tensor) -> Tensor:
    """Hidden states of all chunks (B * chunks, 77, width), one after another in the sequence: (B, chunks * 77, width)."""
    return hidden.unflatten(0, ids.shape[:2]).flatten(1, 2)


def clip_embeddings(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's penultimate hidden states (B, chunks * 77, width), which SDXL and SD 3 read, and the first chunk's pooled text, projected."""
    output = encoder(ids.flatten(0, 1), output_hidden_states=True)
    return joined(output.hidden_states[-2], ids), output[0].unflatten(0, ids.shape[:2])[:, 0]
