"""A picture from outside: safe decoding, orientation, face crop; and pictures that go out, with their metadata.

Nothing that comes from a user is decoded before its header was checked, and whatever is wrong with a file is one
InputError that names it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .checkpoint import write_atomically
from .errors import InputError

Crop = Literal["center", "face"]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MAX_BYTES = 100_000_000
MAX_PIXELS = 64_000_000
MIN_SIDE = 16


class Box(NamedTuple):
    """A face in pixels: its top left corner and its side."""

    left: int
    top: int
    side: int


def load_photo(path: str | Path) -> Image.Image:
    """Reads a picture as upright 8-bit RGB.

    EXIF orientation is applied, transparency is laid on white, 16-bit is scaled. Raises InputError for a file that is
    missing, empty, no picture, truncated, under 16 x 16 pixels, over 64 megapixels (before it is decoded) or over 100 MB.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder, not a picture. Name a picture in it.")
        if not path.is_file():
            raise InputError(f"{path}: no such file. Check the path.")
        size = path.stat().st_size
        if size == 0:
            raise InputError(f"{path} is empty (0 bytes). Was it cut off while copying?")
        if size > MAX_BYTES:
            raise InputError(f"{path} has {size / 1e6:.0f} MB; the limit is {MAX_BYTES / 1e6:.0f} MB. Scale it down first.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures (our own limit is lower) and of damaged EXIF, which is no loss
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(
                        f"{path} has {width} x {height} pixels; the limit is {MAX_PIXELS / 1e6:.0f} megapixels. Scale it down first."
                    )
                if min(width, height) < MIN_SIDE:
                    raise InputError(
                        f"{path} has {width} x {height} pixels, too few to show a face: take one of at least {MIN_SIDE} x {MIN_SIDE}."
                    )
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except InputError:  # is a ValueError, and would be wrapped below
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} has too many pixels; the limit is {MAX_PIXELS / 1e6:.0f} megapixels. Scale it down first.") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture ({', '.join(FORMATS)} are read). Convert it first.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's errors have a number, Pillow's have none
            raise InputError(f"{path} can't be read: {error.strerror}. Check the path and its permissions.") from error
        raise InputError(f"{path} is a damaged picture ({error}). Was it cut off while copying?") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as 8-bit RGB: 16-bit is scaled, never clipped; transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        # 16-bit files are read as I or I;16, 32-bit ones as I; a float picture is taken as 0..1, or as 0..255 where it exceeds that
        largest = values.max(initial=0)
        top = (1.0 if largest <= 1 else 255.0) if image.mode == "F" else max(65535.0, largest)
        return Image.fromarray(((values / top).clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """The middle square, resized to `size` x `size`."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side), reducing_gap=3.0)


def find_faces(image: Image.Image) -> list[Box]:
    """Frontal faces, the largest first, by scikit-image's LBP cascade (BSD, its model ships with it).

    Raises InputError where scikit-image isn't installed.
    """
    try:
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade
    except ImportError as error:
        raise InputError('finding faces needs scikit-image: pip install "hyperdreambooth[faces]", or use --crop center.') from error
    # the cascade's time grows with the picture, and a face of a few dozen pixels is enough for it
    scale = max(1.0, max(image.size) / 512)
    small = image.resize((max(1, round(image.width / scale)), max(1, round(image.height / scale))), Image.Resampling.BILINEAR)
    side = min(small.size)
    found = Cascade(lbp_frontal_face_cascade_filename()).detect_multi_scale(
        img=np.asarray(small),
        scale_factor=1.15,
        step_ratio=1,
        min_size=(max(24, side // 10),) * 2,
        max_size=(side, side),
        min_neighbor_number=5,
    )
    boxes = sorted((Box(round(f["c"] * scale), round(f["r"] * scale), round(f["width"] * scale)) for f in found), key=lambda box: -box.side)
    kept: list[Box] = []
    for box in boxes:
        if all(_overlap(box, other) < 0.3 for other in kept):
            kept.append(box)
    return kept


def _overlap(a: Box, b: Box) -> float:
    """Intersection over the smaller one's area."""
    width = min(a.left + a.side, b.left + b.side) - max(a.left, b.left)
    height = min(a.top + a.side, b.top + b.side) - max(a.top, b.top)
    return max(0, width) * max(0, height) / min(a.side, b.side) ** 2


def crop_face(image: Image.Image, name: str, which: int | None = None, margin: float = 2.0) -> tuple[Image.Image, str]:
    """A square around a face, with margin as in FFHQ and CelebA-HQ, and a note where a choice was made.

    `which` counts faces from 1, the largest first. A crop that leaves the picture is moved inside; one that is larger than
    the picture is cut to it. Raises InputError where there is no (such) face.
    """
    faces = find_faces(image)
    if not faces:
        raise InputError(f"{name}: no face was found. Take a frontal photo, or --crop center for the middle of the picture.")
    if which is not None and not 1 <= which <= len(faces):
        raise InputError(f"{name}: there is no face {which}; {len(faces)} were found.")
    box = faces[(which or 1) - 1]
    side = min(round(margin * box.side), *image.size)
    # a detector's box runs from the brows to the chin: hair needs room above
    left = round(box.left + box.side / 2 - side / 2)
    top = round(box.top + box.side * 0.45 - side / 2)
    left, top = max(0, min(left, image.width - side)), max(0, min(top, image.height - side))
    note = f"{name}: {len(faces)} faces, took the largest; --face N takes another." if len(faces) > 1 and which is None else ""
    return image.crop((left, top, left + side, top + side)), note


def prepare(path: str | Path, size: int, crop: Crop = "center", face: int | None = None) -> tuple[Image.Image, str]:
    """A photo from a file, cropped and resized to `size` x `size`, and a note on what was chosen (or "")."""
    image, note = load_photo(path), ""
    if crop == "face" or face is not None:
        image, note = crop_face(image, str(path), face)
    return square(image, size), note


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> (N, 3, H, W) float32 in -1..1."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in -1..1 -> pictures."""
    values = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).numpy()]


def list_identities(folder: str | Path) -> dict[str, list[Path]]:
    """Identity -> its pictures: a subfolder each, or a picture each. Raises InputError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder.")
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir(), key=_natural):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            files = [f for f in sorted(entry.iterdir(), key=_natural) if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
            if files:
                found.setdefault(entry.name, []).extend(files)
        elif entry.suffix.lower() in SUFFIXES:
            found.setdefault(entry.stem, []).append(entry)
    if not found:
        raise InputError(
            f"{folder} holds no pictures. Expected: {folder}/identity/picture.png, or one picture each, {folder}/identity.png."
        )
    return found


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts 2.png before 10.png; the name itself decides between 1.png and 01.png."""
    # isdecimal, since "²" is a digit that int() refuses
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name.lower())], path.name


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, str], overwrite: bool = False) -> Path:
    """Writes a PNG with text metadata, atomically. Raises InputError where it exists and `overwrite` isn't set."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists. Give --overwrite to replace it, or another path.")
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_itxt(key, value)
    return write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=text))


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
