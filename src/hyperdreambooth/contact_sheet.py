"""Labelled contact sheets of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], cell: int | None = None
) -> Image.Image:
    """A labelled contact sheet: one row of pictures for each row label. `cell` is the side of a picture on it."""
    cell = cell or min(256, max(128, max(row[0].width for row in rows)))
    font = ImageFont.load_default(13)
    columns = max(len(row) for row in rows)
    top = 22 if any(column_labels) else 4
    strip = 20 if any(row_labels) else 4
    sheet = Image.new("RGB", (columns * (cell + 4) + 4, top + len(rows) * (cell + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels[:columns]):
        draw.text((4 + column * (cell + 4), 4), _fit(label, cell, font), fill="black", font=font)
    for index, row in enumerate(rows):
        y = top + index * (cell + strip)
        if strip > 4:
            draw.text((4, y + 1), _fit(row_labels[index], columns * (cell + 4), font), fill="black", font=font)
        for column, image in enumerate(row):
            resample = Image.Resampling.NEAREST if image.width * 2 <= cell and cell % image.width == 0 else Image.Resampling.LANCZOS
            sheet.paste(image.resize((cell, cell), resample), (4 + column * (cell + 4), y + strip - 2))
    return sheet


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a label as fits."""
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text
