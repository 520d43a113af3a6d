"""The evaluation's pictures: references, a gallery, and the true render for every prompt.

    python -m worlds.toon.atlas                  renders benchmarks/atlas and the example faces
    python -m worlds.toon.atlas --embed          embeds training people, to detect copies of them, and 900 more people for a
                                                 gallery of 1,000

Each split is one lossless sheet with one row per person; columns: reference, gallery, then one true render for each prompt.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hyperdreambooth.checkpoint import save_tensors, write_atomically, write_json
from hyperdreambooth.evaluation.judges import Judge

from . import pictures

PLAIN = {"style": "plain", "background": "white", "headwear": "none", "eyewear": "none", "expression": "neutral"}
PROMPTS: list[dict[str, str]] = [
    {"style": "sketch"},
    {"style": "mono", "expression": "smiling"},
    {"headwear": "cap", "background": "green"},
    {"expression": "smiling", "eyewear": "glasses", "background": "yellow"},
    {"style": "sepia"},
    {"headwear": "santa", "background": "purple"},
    {"expression": "angry", "background": "red"},
    {"eyewear": "dark", "background": "pink"},
]
SPLITS = {"validation": 40, "test": 100}
STRANGERS = 900
FACES = 24
ATLAS = Path("benchmarks/atlas")
ASSETS = Path("src/hyperdreambooth/assets/toon/faces")
RECOGNISER = Path("src/hyperdreambooth/assets/toon/recogniser")


def plain_pair(person: int) -> tuple[dict[str, str], dict[str, str]]:
    """The contexts of a person's reference and gallery picture: the person smiles in one of them."""
    draw = random.Random(person)
    smiles = draw.random() < 0.5
    background = draw.choice([name for name, choice in pictures.CONTEXTS["background"].items() if choice["seen"]])
    reference = {**PLAIN, "background": background, "expression": "smiling" if smiles else "neutral"}
    return reference, {**PLAIN, "expression": "neutral" if smiles else "smiling"}


def plan(first: int, people: int) -> list[dict[str, Any]]:
    """Reference, gallery and the prompts' contexts of each person."""
    return [
        {"person": person, "context": {**PLAIN, **context}}
        for person in range(first, first + people)
        for context in (*plain_pair(person), *PROMPTS)
    ]


def embed(runs: Path, judge: Judge) -> None:
    """Saves embeddings of 3,000 training people, and of `STRANGERS` other people's gallery pictures."""
    data = pictures.training_pictures(runs / "data")
    plain = [i for i, row in enumerate(data.rows) if row["context"]["style"] == "plain" and row["context"]["headwear"] == "none"]
    first = list({data.rows[i]["person"]: i for i in reversed(plain)}.values())[:3000]
    numbers = range(pictures.FIRST["gallery"], pictures.FIRST["gallery"] + STRANGERS)
    strangers = pictures.render_plan(
        runs / "data" / "strangers", [{"person": person, "context": plain_pair(person)[1]} for person in numbers]
    )
    for name, pixels in (("training", data.pixels[first]), ("strangers", strangers.pixels)):
        save_tensors(ATLAS / f"{name}.safetensors", {"embeddings": judge.embed(pictures.to_tensor(pixels)).half()})


def sheet(split: str, people: int, runs: Path) -> np.ndarray:
    """Renders a split: (people, roles, 64, 64, 3)."""
    shown = pictures.render_plan(runs / "data" / f"atlas-{split}", plan(pictures.FIRST[split], people))
    return shown.pixels.reshape(people, 2 + len(PROMPTS), pictures.SIZE, pictures.SIZE, 3)


def save_sheet(cells: np.ndarray, path: Path) -> None:
    """Writes all cells (people, roles, side, side, 3) as one lossless WebP."""
    people, roles, side = cells.shape[:3]
    image = Image.fromarray(cells.transpose(0, 2, 1, 3, 4).reshape(people * side, roles * side, 3))
    write_atomically(path, lambda file: image.save(file, format="WEBP", lossless=True, method=6))


def about(split: str, people: int) -> dict[str, Any]:
    """The contents of a sheet's JSON file."""
    contexts = [{**PLAIN, **context} for context in PROMPTS]
    return {
        "size": pictures.SIZE,
        "people": [pictures.FIRST[split] + i for i in range(people)],
        "prompts": [pictures.caption(context) for context in contexts],
        "asked": PROMPTS,
        "seen": [pictures.is_seen(context) for context in contexts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/toon"))
    parser.add_argument("--embed", action="store_true")
    args = parser.parse_args()
    if args.embed:
        embed(args.runs, Judge.from_pretrained(RECOGNISER))
        return
    for split, people in SPLITS.items():
        save_sheet(sheet(split, people, args.runs), ATLAS / f"{split}.webp")
        write_json(ATLAS / f"{split}.json", about(split, people))
    cells = sheet("faces", FACES, args.runs)
    save_sheet(cells, ASSETS / "truth.webp")
    write_json(ASSETS / "faces.json", about("faces", FACES))
    for index in range(FACES):
        image = Image.fromarray(cells[index, 0])
        write_atomically(ASSETS / f"face-{index + 1:02d}.png", lambda file, image=image: image.save(file, format="PNG", optimize=True))


if __name__ == "__main__":
    main()
