"""A picture from outside: safe decoding, orientation, crop, mask; and pictures that go out, with their metadata.

Nothing that comes from a user is decoded before its header was checked, and whatever is wrong with a file is one
InputError that names it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .checkpoint import write_atomically
from .errors import InputError
from .faces import choose_face, crop_face

Crop = Literal["center", "face"]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MAX_BYTES = 100_000_000
MAX_PIXELS = 64_000_000
MIN_SIDE = 16


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


def prepare(path: str | Path, size: int, crop: Crop = "center", face: int | None = None) -> tuple[Image.Image, str]:
    """A photo from a file, cropped and resized to `size` x `size`, and a note on what was chosen (or "").

    Raises InputError for what is no photo, or where the face that is asked for isn't there.
    """
    image, note = load_photo(path), ""
    if crop == "face" or face is not None:
        chosen, note = choose_face(image, str(path), face)
        image = crop_face(image, chosen)
    return square(image, size), note


def prepare_mask(path: str | Path, photo: str | Path, size: int, crop: Crop = "center", face: int | None = None) -> Image.Image:
    """A gray picture that says where `photo` counts (white) and where not (black), cropped as `prepare` crops the photo.

    Raises InputError where the two differ in size, or the crop holds nothing that counts.
    """
    image, mask = load_photo(photo), load_photo(path)
    if mask.size != image.size:
        raise InputError(
            f"the mask {path} has {mask.width} x {mask.height} pixels and the photo {photo} {image.width} x {image.height}: "
            "draw it on the photo itself."
        )
    if crop == "face" or face is not None:
        mask = crop_face(mask, choose_face(image, str(photo), face)[0])
    gray = square(mask, size).convert("L")
    if np.asarray(gray).mean() < 1:  # of 255; a resize leaves traces of what lies just outside
        raise InputError(f"the mask {path} is black wherever the cropped photo is: nothing would count. Paint the face white.")
    return gray


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
