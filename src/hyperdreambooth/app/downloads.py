"""What a visitor takes home, and what the second tab says about it."""

import zipfile
from pathlib import Path

import pandas as pd

from .. import photos
from ..checkpoint import write_atomically
from ..personal_lora import PersonalLora
from .sessions import Picture, Visit

COLUMNS = 4
"""Pictures side by side on a contact sheet."""


def write_files(visit: Visit) -> list[Path]:
    """The LoRA in both layouts, the tokens where there are some, and a zip of all pictures; earlier ones are deleted."""
    folder = visit.fresh()
    files = []
    if visit.me is not None:
        files += [visit.me.save(folder / "person.safetensors"), visit.me.save(folder / "person-kohya.safetensors", layout="kohya")]
        files += [visit.me.save_tokens(folder / "person.tokens")] if visit.me.tokens is not None else []
    if visit.pictures:
        sheet = contact_sheet(visit.pictures, folder / "contact-sheet.png")
        files.append(write_atomically(folder / "pictures.zip", lambda file: write_zip(file, sheet, visit.pictures)))
    for old in visit.take.iterdir() if visit.take else ():
        old.unlink(missing_ok=True)
    visit.take = folder
    return files


def contact_sheet(pictures: list[Picture], file: Path) -> Path:
    """All pictures on one, with what they are of."""
    rows = [pictures[i : i + COLUMNS] for i in range(0, len(pictures), COLUMNS)]
    labels = [" | ".join(f"{picture.label or picture.prompt} ({picture.seed})" for picture in row) for row in rows]
    sheet = photos.grid([[photos.load_photo(picture.file) for picture in row] for row in rows], labels, [""] * COLUMNS)
    return photos.save_png(sheet, file, {"ai_generated": "true"})


def write_zip(file: Path, sheet: Path, pictures: list[Picture]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(sheet, sheet.name)
        for index, picture in enumerate(pictures):
            archive.write(picture.file, f"{index + 1:03d}-{picture.file.name}")


def block(path: str) -> str:
    """A layer's block: down_blocks.0, mid_block, ..."""
    parts = path.split(".")
    return ".".join(parts[: 3 if parts[1].endswith("blocks") else 2]).removeprefix("unet.")


def explain(me: PersonalLora) -> tuple[str, pd.DataFrame, pd.DataFrame | None]:
    """Sizes and times in words (Markdown), each layer's change, and the loss over steps where any were made."""
    numbers = sum(lora.down.numel() + lora.up.numel() for lora in me.loras.values())
    lines = [f"- **LoRA**: rank {me.rank}, {len(me.loras)} layers, {numbers:,} numbers."]
    if me.tokens is not None:
        layers, width = me.tokens.shape
        size = 4 * me.tokens.numel() / 1e3
        lines.append(f"- **Tokens**: {layers} layers x {width} numbers = {me.tokens.numel():,}, or {size:.0f} KB: the whole prediction.")
    lines += [f"- **{name}**: {seconds:.2f} s" for name, seconds in me.seconds.items()]
    strengths = me.strengths()
    strongest = sorted(strengths, key=lambda path: -strengths[path])[:5]
    lines += ["", "Changed most:", *(f"1. `{path}` ({strengths[path]:.2f})" for path in strongest)]
    changes = pd.DataFrame(
        {
            "layer": range(1, len(strengths) + 1),
            "strength": list(strengths.values()),
            "block": [block(path) for path in strengths],
            "name": list(strengths),
        }
    )
    return "\n".join(lines), changes, pd.DataFrame(me.losses, columns=["step", "loss"]) if me.losses else None
