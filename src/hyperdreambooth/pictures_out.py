"""Pictures that go out: PNG files with their metadata, and labelled contact sheets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .checkpoint import write_atomically
from .errors import InputError


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, str], overwrite: bool = False) -> Path:
    """Writes a PNG with text metadata, atomically. Raises InputError where it exists and `overwrite` isn't set."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists. Give --overwrite to replace it, or another path.")
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_itxt(key, value)
    return write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=text))


def generated(settings: Mapping[str, object]) -> dict[str, str]:
    """A generated PNG's metadata: how it was made, and that a machine made it (IPTC's digital source type, in XMP)."""
    source = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        f'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType="{source}"/></rdf:RDF></x:xmpmeta>'
    )
    return {"Software": "hyperdreambooth", "ai_generated": "true", "hyperdreambooth": json.dumps(settings), "XML:com.adobe.xmp": xmp}


def read_png_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a PNG. Raises InputError for a file that is missing or no whole PNG."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()  # text may also stand after the pixels
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} is not a whole PNG ({getattr(error, 'strerror', None) or error}). Name a picture that was saved here."
        ) from error


def is_generated(path: str | Path) -> bool:
    """Whether a file is a PNG that says that a machine made it."""
    try:
        return read_png_metadata(path).get("ai_generated") == "true"
    except InputError:
        return False


def preview_path(lora: Path) -> Path:
    """Where UIs look for a LoRA's picture: NAME.png, or NAME.preview.png where NAME.png is somebody's own (the very photo, say)."""
    first = lora.with_suffix(".png")
    return lora.with_suffix(".preview.png") if first.exists() and not is_generated(first) else first


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
