"""Paths in the embedded world (small models and faces in the package), or in one of your own that `HYPERDREAMBOOTH_TOON` names."""

import json
import os
from pathlib import Path

from ...errors import InputError


def directory(part: str = "") -> Path:
    """A directory of the embedded world: base, hypernetwork, recogniser, classifier or faces. Raises InputError if it is missing."""
    root = Path(os.environ.get("HYPERDREAMBOOTH_TOON") or Path(__file__).parent)
    path = root / part
    if not path.exists():
        raise InputError(f"{path} is missing: the embedded world isn't installed there. `make weights` trains it.")
    return path


def faces() -> list[Path]:
    """The example photos shipped with the embedded world."""
    return sorted(directory("faces").glob("face-*.png"))


def palette() -> dict[str, dict[str, str]]:
    """Prompts that the embedded base can draw: "contexts" and "styles", each a mapping from a short name to the prompt."""
    return json.loads((Path(__file__).parent / "palette.json").read_text(encoding="utf-8"))
