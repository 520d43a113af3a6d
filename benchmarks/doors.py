"""Which LoRA files can be opened and which are refused: `python -m benchmarks.doors` writes the table in docs/files.md.

Every spelling of layer names, kind of adapter and invalid file of tests/test_lora_cases.py is written and opened on a tiny base of its family,
once as a style and once as a person. Error messages are shortened to the reason of the refusal.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from hyperdreambooth import formats
from hyperdreambooth.errors import InputError
from tests.test_lora_cases import ATTENTION, FUSED, KINDS, REFUSED, SPELLINGS, content, effect, pipeline, root, spelled

DOCS = Path(__file__).parents[1] / "docs" / "files.md"


def forms() -> Iterator[tuple[str, str, str, dict[str, torch.Tensor]]]:
    """(kind, form, family, tensors) of each file."""
    for spelling, (pattern, _) in SPELLINGS.items():
        family = "flux-dev" if "transformer" in pattern else "sdxl"
        path = ATTENTION[family].format("unet" if family == "sdxl" else "transformer", "to_out.0")
        width = 64 if family == "sdxl" else 32
        tensors = spelled(spelling, path, torch.ones(2, width), torch.ones(width, 2))
        yield "LoRA", f"{spelling}: `{next(iter(tensors))}`", family, tensors
    for family, layers in FUSED.items():
        name = f"lora_unet_{next(iter(layers)).replace('.', '_')}"
        tensors = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(96, 2)}
        yield "LoRA", f"by the original code's names: `{next(iter(tensors))}`", family, tensors
    for kind in [*KINDS][1:]:
        tensors = content(kind)[2]
        yield kind, f"`{next(iter(tensors))}`", "sdxl", tensors
    for what, (tensors, _) in REFUSED.items():
        yield what, "", "sd1", tensors


def outcome(opens: Callable[[], object], path: Path) -> str:
    try:
        opens()
    except InputError as error:
        reason = re.sub(rf"^{re.escape(str(path))}:? ?", "", str(error)).replace("|", "\\|")
        return f"refused: {reason if len(reason) < 130 else reason[:130].rsplit(' ', 1)[0] + ' ...'}"
    return "opened"


def table() -> str:
    """Markdown: a row for each form."""
    lines = ["| kind | form | as a style | as a person |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        for kind, form, family, tensors in forms():
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            pipe = pipeline(family)
            style = outcome(lambda pipe=pipe: effect(pipe, path), path)
            person = outcome(lambda pipe=pipe: formats.read_lora(path, root(pipe)), path)
            same = "the same" if person == style != "opened" else person.split(" (in")[0]
            lines.append(f"| {kind} | {form} | {style} | {same} |")
    text = "\n".join(lines)
    long = r"(down|joint|double|transformer)_blocks[._]\d(\w*[._](attentions|resnets|transformer_blocks)[._]\d)*([._](attn1?|ff)\b)?"
    return re.sub(long, "PATH", text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    block = f"<!-- doors -->\n{table()}\n<!-- /doors -->"
    text = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(re.sub(r"<!-- doors -->\n.*?<!-- /doors -->", lambda _: block, text, flags=re.S), encoding="utf-8")
    print(block)


if __name__ == "__main__":
    main()
