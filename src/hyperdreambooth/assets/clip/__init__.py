"""CLIP's tokenizer, which all versions of Stable Diffusion use, built from OpenAI's merges file (MIT license) without a download."""

import gzip
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "merges.txt.gz"


def tokenizer(pad: str = "<|endoftext|>") -> Any:
    """A `CLIPTokenizer` for 77 tokens. SD 1.x and SDXL's first encoder pad with the end token, OpenCLIP's encoders with "!"."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = list(bytes_to_unicode().values())  # printable stand-ins for the 256 bytes
    lines = gzip.decompress(FILE.read_bytes()).decode("utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines]
    # 49,408 tokens: the bytes, the same at the end of a word, the merges in the order of the file, start and end
    names = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges, model_max_length=77, pad_token=pad)
