import json
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Info:
    """Show what is in a LoRA or token file: base, rank, layers, size, trigger, fingerprint."""

    file: tyro.conf.Positional[Path]
    """A .safetensors file."""
    json: bool = False
    """Print JSON."""


def run(args: Info) -> None:
    from .. import formats

    about = formats.describe(args.file)
    print(json.dumps(about, indent=2, default=str) if args.json else "\n".join(f"{key}: {value}" for key, value in about.items()))
