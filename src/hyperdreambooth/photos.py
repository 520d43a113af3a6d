"""Pictures: from outside, by safe decoding, orientation, colors and crop; and those that go out, with their metadata."""

import io
import json
import os
import re
import struct
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .checkpoint import write_atomically
from .errors import InputError, fresh, refusing
from .faces import crop_face, face_for
from .settings import Crop as Crop

Source = Any  # What `read_photo` takes: str | Path | bytes | BinaryIO | Image.Image | numpy array | Tensor.
# What Pillow opens beside pictures: documents (EPS runs Ghostscript), vector drawings, containers of data.
NOT_PHOTOS = {"EPS", "PDF", "WMF", "GRIB", "HDF5", "BUFR", "MPEG", "XVTHUMB"}
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
MAX_JPEG_PIXELS = 205_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jfif", ".jpe", ".mpo"}
MAX_BYTES = 100_000_000
MAX_PIXELS = 64_000_000
TOO_MANY = f"the limit is {MAX_PIXELS / 1e6:.0f} megapixels. Scale it down first."
MIN_SIDE = 16
# Pillow refuses a PNG with more than a megabyte of text, such as the recipe that some programs write into their pictures
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20
LINE = 17  # Pixels from one line of a label to the next, as Pillow sets them.


def load_photo(source: Source) -> Image.Image:
    """A picture as upright 8-bit sRGB; `read_photo` without its notes."""
    return read_photo(source)[0]


def read_photo(source: Source) -> tuple[Image.Image, str]:
    """A picture as upright 8-bit sRGB, and a note on what was assumed or passed over (or "").

    EXIF orientation and color profiles are applied, transparency is laid on white, 16-bit is scaled. Formats are told by content.

    Args:
        source: a path or file:// URL, the bytes of a file, an open binary file, a PIL image, an array (H, W) or (H, W, C), or a
            tensor (C, H, W); uint8, uint16, or float in 0..1, 0..255 or (where anything is negative) -1..1. Files are read from their start.

    Raises InputError for a file that is missing, empty, no picture, truncated, under 16 x 16 pixels, over 64 megapixels (JPEG: 200,
    decoded at a reduced size) or over 100 MB, for a web address, and for numbers in any other range.
    """
    name = photo_name(source)
    try:
        with warnings.catch_warnings(action="ignore"):  # of large pictures (our own limit is lower) and of damaged EXIF, which is no loss
            # Pillow loses the orientation of a TIFF that it maps from a file on disk, so that one is read as bytes
            if isinstance(source, Image.Image) and source.format == "TIFF" and getattr(source, "_im", None) is None:
                source = Path(getattr(source, "filename", "")) if getattr(source, "filename", "") else source
            if isinstance(source, (np.ndarray, Tensor)):
                source = _from_array(source, name)
            return _finish(source if isinstance(source, Image.Image) else _open(source, name), name)
    except InputError:  # is a ValueError, and would be wrapped below
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels; {TOO_MANY}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture of a kind that is read ({', '.join(FORMATS)} and more). Convert it first.") from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, IndexError, KeyError, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's errors have a number, Pillow's have none
            raise InputError(f"{name} can't be read: {error.strerror}. Check the path and its permissions.") from error
        raise InputError(f"{name} is a damaged picture ({' '.join(str(error).split())}). Was it cut off while copying?") from error


def photo_name(source: Source) -> str:
    """What messages call a picture."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if hasattr(source, "protocol"):  # a UPath
        return str(source)
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or f"the picture ({type(source).__name__})")


def _read_bytes(source: Source, name: str) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)  # a Path of an address has lost a slash
        address = urlsplit(text) if re.match(r"(?i)(data:|[a-z][a-z\d+.-]+:/)", text) else None
        if address and (address.scheme != "file" or address.netloc not in ("", "localhost")):
            raise InputError(f"{name[:80]}: nothing is fetched from the web. Save the picture and name the file.")
        path = Path(url2pathname(address.path) if address else source)
        if not path.is_file():
            wrong = " is a folder, not a picture. Name a picture in it." if path.is_dir() else ": no such file. Check the path."
            raise InputError(name + wrong)
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    if hasattr(source, "protocol"):
        with source.open("rb") as file:
            return bytes(file.read(MAX_BYTES + 1))
    if isinstance(source, io.TextIOBase):
        raise InputError(f"{name} was opened as text. Open it in binary mode.")
    if not hasattr(source, "read"):
        raise InputError(f"{name} is no picture: give a path, bytes, an open file, a PIL image, an array or a tensor.")
    with suppress(AttributeError, OSError):  # a pipe has no start to go back to
        source.seek(0)
    return source.read(MAX_BYTES + 1)


def _open(source: Source, name: str) -> Image.Image:
    """Opens a file by its content; no pixel is decoded yet."""
    data = _read_bytes(source, name)
    if not data:
        raise InputError(f"{name} is empty (0 bytes). Was it cut off while copying?")
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is too large: the limit is {MAX_BYTES / 1e6:.0f} MB. Scale it down first.")
    if data.startswith(b"\xff\xd8\xff"):
        # Image.open refuses over 179 megapixels, which the reduced decoding below can take
        image: Image.Image = JpegImagePlugin.jpeg_factory(io.BytesIO(data))
        if MAX_PIXELS < image.width * image.height <= MAX_JPEG_PIXELS:
            image.draft(None, (image.width // 4, image.height // 4))
        return image
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and b"avif" not in data[12:64]:
        with refusing(f'{name} is HEIC, which needs pip install "hyperdreambooth[heif]"', ImportError, advice="Or convert it to JPEG."):
            from pillow_heif import register_heif_opener
        register_heif_opener()
    return Image.open(io.BytesIO(data), formats=picture_formats())


def picture_formats() -> list[str]:
    """What Pillow opens, but for what isn't a picture."""
    Image.init()
    return [kind for kind in Image.ID if kind not in NOT_PHOTOS]


def _from_array(values: Any, name: str) -> Image.Image:
    """(H, W) or (H, W, 1..4), or a tensor (C, H, W), as a picture."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().to_dense()
        values = values[0] if values.ndim == 4 and len(values) == 1 else values
        values = values.movedim(0, -1) if values.ndim == 3 else values
        values = (values.float() if values.is_floating_point() else values).numpy()  # numpy has no bfloat16
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] > 4) or values.size == 0:
        raise InputError(f"{name} has shape {tuple(values.shape)}: give an array (H, W, 3), a gray one (H, W), or a tensor (3, H, W).")
    array = _to_8_bits(values, name)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_8_bits(values: Any, name: str) -> Any:
    """Numbers of a picture as uint8, by the range that they seem to have. Raises InputError where that is anybody's guess."""
    kind = values.dtype.kind
    if kind not in "biuf":
        raise InputError(f"{name} holds {values.dtype}, which are no colors: give uint8, uint16 or float.")
    low, high = float(values.min()), float(values.max())
    bottom, top, beyond = 0.0, 1.0 if kind == "b" else 255.0, 0.0
    if kind == "f":
        beyond = 0.05  # a picture that was resized, or rounded, may leave its range a little
        bottom, top = (-1.0, 1.0) if low < -beyond else (0.0, 1.0 if high <= 1 + beyond else 255.0)
    elif kind == "u":  # 12 bits of a camera or scanner in a 16-bit file
        top = next((most for most in (255.0, 4095.0, 65535.0) if high <= most), high)
    too_dark = kind == "f" and top == 255 and high < 32  # light without an upper end, more likely than 0..255
    if not bottom - beyond <= low <= high <= top * (1 + beyond) or too_dark:  # nor is NaN
        raise InputError(f"{name} has values in {low:g}..{high:g}: give 0..1, -1..1 or 0..255.")
    return ((values - bottom) * (255 / (top - bottom))).clip(0, 255).round().astype(np.uint8)


def _finish(image: Image.Image, name: str) -> tuple[Image.Image, str]:
    """Checks the size, decodes, turns upright and converts to 8-bit sRGB."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} has {width} x {height} pixels; {TOO_MANY}")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} has {width} x {height} pixels, too few to show a face: take one of at least {MIN_SIDE} x {MIN_SIDE}.")
    frames = getattr(image, "n_frames", 1) if image.format != "MPO" and not image.tell() else 1
    tags = getattr(image, "tag_v2", {})
    bits, inverted, planes = tags.get(258, (8,)), tags.get(262) == 0, tags.get(284) == 2
    if bits[0] > 8 and (inverted or (planes and len(bits) > 1) or tags.get(339, (1,))[0] == 2):
        raise InputError(f"{name} is a TIFF of {bits[0]} bits that is inverted, signed or in planes. Convert it to PNG first.")
    image.load()
    profile, upright = image.info.get("icc_profile"), ImageOps.exif_transpose(image)
    upright, problem = _to_srgb(upright, profile, name) if profile else (upright, "")
    notes = [f"took the first of {frames} frames." if frames > 1 else "", problem]
    return to_rgb(upright, name), " ".join(f"{name}: {note}" for note in notes if note)


def _to_srgb(image: Image.Image, data: bytes, name: str) -> tuple[Image.Image, str]:
    """Applies an ICC profile; one that is damaged or of another kind of color is ignored, and the note says so."""
    if image.mode.startswith("I") or image.mode == "F":
        image = to_rgb(image, name).convert("L")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        space = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space, "")
        if not space or (image.mode == "CMYK") != (space == "CMYK") or (space == "L" and image.mode not in ("1", "L", "LA")):
            return image, "its color profile is for another kind of picture and was ignored."
        converted = ImageCms.profileToProfile(image.convert(space), profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image, "its color profile is damaged and was ignored."
    if converted and alpha:
        converted.putalpha(alpha)
    return converted or image, ""


def to_rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """Any mode of Pillow as 8-bit RGB: 16-bit is scaled, never clipped; transparency is laid on white; NaN is black."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        if image.mode == "I" and values.min(initial=0) >= 0:  # 16 bits or 32, which Pillow gives a sign
            values = values.astype(np.uint32)
        return Image.fromarray(_to_8_bits(values, name)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def prepare(path: Source, size: int, crop: Crop = "auto", face: int | None = None) -> tuple[Image.Image, str]:
    """A photo, cropped, as `size` x `size` pixels, and a note on what was chosen (or ""). Raises InputError for none, or no such face."""
    image, note = read_photo(path)
    chosen, which = face_for(image, photo_name(path), crop, face)
    cropped = ImageOps.fit(crop_face(image, chosen) if chosen else image, (size, size), Image.Resampling.LANCZOS)
    return cropped, " ".join(filter(None, (note, which)))


def read_photos(files: Any, size: int, crop: Crop = "auto", face: int | None = None) -> tuple[Tensor, list[str]]:
    """One photo or several as (n, 3, size, size) in -1..1, and what is worth saying about them (which face was taken).

    Args:
        files: whatever `read_photo` takes, or a sequence of it; a tensor (n, 3, size, size) is what this function made, and stays as it is.
    """
    if isinstance(files, Tensor) and files.shape[1:] == (3, size, size) and files.is_floating_point():
        return files, []
    alone = isinstance(files, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(files, "read") or not isinstance(files, Iterable)
    if isinstance(files, (np.ndarray, Tensor)):
        alone = files.ndim < 4
    prepared = [prepare(file, size, crop, face) for file in ([files] if alone else files)]
    if not prepared:
        raise InputError("no photo was given.")
    return to_tensor([image for image, _ in prepared]), [note for _, note in prepared if note]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> (N, 3, H, W) float32 in -1..1."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in -1..1 -> pictures."""
    values = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).numpy()]


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, str], overwrite: bool = False) -> Path:
    """Writes a PNG with text metadata, atomically. Raises InputError where it exists and `overwrite` isn't set."""
    path = fresh(path, overwrite)
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
    kinds, advice = (OSError, SyntaxError, ValueError, Image.DecompressionBombError), "Name a picture that was saved here."
    with refusing(f"{path} is not a whole PNG", *kinds, advice=advice), Image.open(path, formats=("PNG",)) as image:
        image.load()  # text may also stand after the pixels
        return {str(key): value for key, value in image.info.items() if isinstance(value, str)}


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


def grid(rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], cell: int = 0) -> Image.Image:
    """A labelled contact sheet: one row of pictures for each row label; what is too long for its place goes on in the next line.

    Args:
        cell: the side of a picture on it, in pixels; 0 for a fitting one.
    """
    cell = cell or min(256, max(128, max(row[0].width for row in rows)))
    font, columns = ImageFont.load_default(13), max(map(len, rows))
    width = columns * (cell + 4) + 4
    heads = [wrapped(label, font, cell) for label in column_labels[:columns]]
    sides = [wrapped(label, font, width - 4) for label in row_labels]
    top = 22 + LINE * max(head.count("\n") for head in heads) if any(heads) else 4
    strips = [20 + LINE * side.count("\n") if any(sides) else 4 for side in sides]
    sheet = Image.new("RGB", (width, top + sum(strips) + len(rows) * cell), "white")
    draw, y = ImageDraw.Draw(sheet), top
    for column, head in enumerate(heads):
        draw.text((4 + column * (cell + 4), 4), head, fill="black", font=font)
    for row, side, strip in zip(rows, sides, strips, strict=True):
        draw.text((4, y + 1), side, fill="black", font=font)
        for column, image in enumerate(row):
            resample = Image.Resampling.NEAREST if image.width * 2 <= cell and cell % image.width == 0 else Image.Resampling.LANCZOS
            sheet.paste(image.resize((cell, cell), resample), (4 + column * (cell + 4), y + strip - 2))
        y += strip + cell
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A text with line breaks, so that no line is longer than `width` pixels."""
    count = max(1, width // 3)  # Letters of a line, should all be narrow ones.
    while count > 1 and any(font.getlength(line) > width for line in textwrap.wrap(text, count)):
        count -= 1
    return "\n".join(textwrap.wrap(text, count))
