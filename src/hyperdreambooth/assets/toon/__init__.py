"""Where the shipped embedded world lies. `HYPERDREAMBOOTH_TOON` names another directory, for those who train their own."""

import json
import os
from pathlib import Path

from ...errors import InputError


def directory(part: str = "") -> Path:
    """A folder of the embedded world: base, hypernetwork, recogniser, classifier or faces. Raises InputError if absent."""
    root = Path(os.environ.get("HYPERDREAMBOOTH_TOON") or Path(__file__).parent)
    path = root / part
    if not path.exists():
        raise InputError(f"{path} is missing: the embedded world isn't installed there. `make weights` trains it.")
    return path


def faces() -> list[Path]:
    """Photos of the people that are shipped as examples."""
    return sorted(directory("faces").glob("face-*.png"))


def palette() -> dict[str, dict[str, str]]:
    """Prompts that the base knows: "contexts" and "styles", each by the few words that name it."""
    return json.loads((Path(__file__).parent / "palette.json").read_text(encoding="utf-8"))
