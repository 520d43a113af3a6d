"""Reading photos (safe decoding, orientation, color profiles, crop), and writing pictures with metadata, previews and contact sheets."""

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
# Formats that Pillow opens but that aren't photos: documents (EPS runs Ghostscript), vector graphics, data containers.
NOT_PHOTOS = {"EPS", "PDF", "WMF", "GRIB", "HDF5", "BUFR", "MPEG", "XVTHUMB"}
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
MAX_JPEG_PIXELS = 205_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jfif", ".jpe", ".mpo"}
MAX_BYTES = 100_000_000
MAX_PIXELS = 64_000_000
TOO_MANY = f"the limit is {MAX_PIXELS / 1e6:.0f} megapixels. Scale it down first."
MIN_SIDE = 16
# Pillow's limit for text in a PNG is 1 MB, less than the workflow that some programs write into their pictures.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20
LINE = 17  # Height in pixels of a line of a label in Pillow's default font at size 13.


def load_photo(source: Source) -> Image.Image:
    """A picture as upright 8-bit sRGB: the first result of `read_photo`."""
    return read_photo(source)[0]


def read_photo(source: Source) -> tuple[Image.Image, str]:
    """A picture as upright 8-bit sRGB, and a note on frames or color profiles that were ignored (or "").

    EXIF orientation and color profiles are applied, transparency is composited on white, 16 bits are scaled to 8. Suffixes don't matter.

    Args:
        source: a path or file:// URL, the bytes of a file, an open binary file, a PIL image, an array (H, W) or (H, W, C), or a
            tensor (C, H, W); uint8, uint16, or float in 0..1, 0..255 or (if any is negative) -1..1. Files are read from their start.

    Raises InputError for a file that is missing, empty, no picture, truncated, under 16 x 16 pixels, over 64 megapixels (JPEG: 205,
    decoded at a reduced size) or over 100 MB, for a web address, and for values in any other range.
    """
    name = photo_name(source)
    try:
        with warnings.catch_warnings(action="ignore"):  # on large pictures (the limit here is lower) and damaged EXIF
            # Pillow loses the orientation of a TIFF that it maps into memory from disk, so one that isn't decoded yet is read as bytes
            if isinstance(source, Image.Image) and source.format == "TIFF" and getattr(source, "_im", None) is None:
                source = getattr(source, "filename", "") or source
            if isinstance(source, (np.ndarray, Tensor)):
                source = _from_array(source, name)
            return _finish(source if isinstance(source, Image.Image) else _open(source, name), name)
    except InputError:  # a ValueError too, so the last clause would wrap it
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels; {TOO_MANY}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture of a kind that is read ({', '.join(FORMATS)} and more). Convert it first.") from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, IndexError, KeyError, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # errors of the operating system have a number, Pillow's don't
            raise InputError(f"{name} can't be read: {error.strerror}. Check the path and its permissions.") from error
        raise InputError(f"{name} is a damaged picture ({' '.join(str(error).split())}). Was it cut off while copying?") from error


def photo_name(source: Source) -> str:
    """The name of a picture in messages: its path, file name or type."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if hasattr(source, "protocol"):  # a UPath
        return str(source)
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or f"the picture ({type(source).__name__})")


def _read_bytes(source: Source, name: str) -> bytes:
    """The bytes of a file, up to one more than `MAX_BYTES`. Raises InputError for a source that can't be read as a binary file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)  # pathlib turns the "//" of an address into "/"
        address = urlsplit(text) if re.match(r"(?i)(data:|[a-z][a-z\d+.-]+:/)", text) else None
        if address and (address.scheme != "file" or address.netloc not in ("", "localhost")):
            raise InputError(f"{name[:80]}: nothing is fetched from the web. Save the picture and name the file.")
        source = Path(url2pathname(address.path) if address else source)
        if not source.is_file():
            wrong = " is a folder, not a picture. Name a picture in it." if source.is_dir() else ": no such file. Check the path."
            raise InputError(name + wrong)
    if isinstance(source, Path) or hasattr(source, "protocol"):  # a UPath
        with source.open("rb") as file:
            return bytes(file.read(MAX_BYTES + 1))
    if isinstance(source, io.TextIOBase):
        raise InputError(f"{name} was opened as text. Open it in binary mode.")
    if not hasattr(source, "read"):
        raise InputError(f"{name} is no picture: give a path, bytes, an open file, a PIL image, an array or a tensor.")
    with suppress(AttributeError, OSError):  # a pipe can't seek
        source.seek(0)
    return source.read(MAX_BYTES + 1)


def _open(source: Source, name: str) -> Image.Image:
    """Opens a file in the format that its content shows; no pixel is decoded yet. Raises InputError if it is empty or too large."""
    data = _read_bytes(source, name)
    if not data:
        raise InputError(f"{name} is empty (0 bytes). Was it cut off while copying?")
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is too large: the limit is {MAX_BYTES / 1e6:.0f} MB. Scale it down first.")
    if data.startswith(b"\xff\xd8\xff"):
        # Image.open refuses more than 179 megapixels, before a reduced decoding could be asked for
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
    """The formats that Pillow opens, without `NOT_PHOTOS`."""
    Image.init()
    return [kind for kind in Image.ID if kind not in NOT_PHOTOS]


def _from_array(values: Any, name: str) -> Image.Image:
    """An array (H, W) or (H, W, 1..4), or a tensor (C, H, W) or (1, C, H, W), as a picture. Raises InputError for other shapes."""
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
    """Pixel values as uint8, scaled from the range that type and extremes suggest. Raises InputError if they fit none."""
    kind = values.dtype.kind
    if kind not in "biuf":
        raise InputError(f"{name} holds {values.dtype}, which are no colors: give uint8, uint16 or float.")
    low, high = float(values.min()), float(values.max())
    bottom, top, beyond = 0.0, 1.0 if kind == "b" else 255.0, 0.0
    if kind == "f":
        beyond = 0.05  # resampling and rounding may leave the range by a little
        bottom, top = (-1.0, 1.0) if low < -beyond else (0.0, 1.0 if high <= 1 + beyond else 255.0)
    elif kind == "u":  # 4095: 12 bits of a camera or scanner in a 16-bit file
        top = next((most for most in (255.0, 4095.0, 65535.0) if high <= most), high)
    too_dark = kind == "f" and top == 255 and high < 32  # more likely linear light (HDR) than 0..255
    if not bottom - beyond <= low <= high <= top * (1 + beyond) or too_dark:  # true for NaN as well
        raise InputError(f"{name} has values in {low:g}..{high:g}: give 0..1, -1..1 or 0..255.")
    return ((values - bottom) * (255 / (top - bottom))).clip(0, 255).round().astype(np.uint8)


def _finish(image: Image.Image, name: str) -> tuple[Image.Image, str]:
    """Checks the size, decodes, applies the EXIF orientation and converts to 8-bit sRGB; returns the picture and a note (or "")."""
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
    """Applies an ICC profile. One that is damaged or for another color space is ignored, and the note (else "") says so."""
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
    """A picture of any Pillow mode as 8-bit RGB: 16-bit values are scaled, transparency is composited on white, NaN is black."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        if image.mode == "I" and values.min(initial=0) >= 0:  # unsigned 16 or 32 bits, which Pillow holds as signed 32 bits
            values = values.astype(np.uint32)
        return Image.fromarray(_to_8_bits(values, name)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def prepare(path: Source, size: int, crop: Crop = "auto", face: int | None = None) -> tuple[Image.Image, str]:
    """Reads a photo, crops it as `face_for` decides and scales it to `size` x `size`; also returns the notes of both (or "")."""
    image, note = read_photo(path)
    chosen, which = face_for(image, photo_name(path), crop, face)
    cropped = ImageOps.fit(crop_face(image, chosen) if chosen else image, (size, size), Image.Resampling.LANCZOS)
    return cropped, " ".join(filter(None, (note, which)))


def read_photos(files: Any, size: int, crop: Crop = "auto", face: int | None = None) -> tuple[Tensor, list[str]]:
    """One or several photos, cropped, as (n, 3, size, size) in -1..1, and notes for the user (such as which face was chosen).

    Args:
        files: anything that `read_photo` takes, or a sequence of it; a float tensor (n, 3, size, size) is taken as -1..1 and
            returned as float32.

    Raises InputError where there is no photo, or one can't be read.
    """
    if isinstance(files, Tensor) and files.shape[1:] == (3, size, size) and files.is_floating_point() and len(files):
        note = "no value of the tensor is negative; it is taken as -1..1. Give pictures in 0..1 one by one, each as (3, H, W)."
        return files.float(), [note] if files.min() >= 0 else []
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
    """(N, 3, H, W) in -1..1 -> N RGB pictures; values beyond the range are clipped."""
    values = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).numpy()]


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, str], overwrite: bool = False) -> Path:
    """Writes a PNG with text metadata, atomically. Raises InputError if the file exists and `overwrite` isn't set."""
    path = fresh(path, overwrite)
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_itxt(key, value)
    return write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=text))


def generated(settings: Mapping[str, object]) -> dict[str, str]:
    """Metadata of a generated PNG: its settings, and the mark that it is AI-generated (IPTC's digital source type, in XMP)."""
    source = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        f'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType="{source}"/></rdf:RDF></x:xmpmeta>'
    )
    return {"Software": "hyperdreambooth", "ai_generated": "true", "hyperdreambooth": json.dumps(settings), "XML:com.adobe.xmp": xmp}


def read_png_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a PNG. Raises InputError for a file that is missing, damaged or no PNG."""
    kinds, advice = (OSError, SyntaxError, ValueError, Image.DecompressionBombError), "Name a picture that was saved here."
    with refusing(f"{path} is not a whole PNG", *kinds, advice=advice), Image.open(path, formats=("PNG",)) as image:
        image.load()  # text chunks may also follow the pixels
        return {str(key): value for key, value in image.info.items() if isinstance(value, str)}


def is_generated(path: str | Path) -> bool:
    """Whether a file is a PNG whose metadata marks it as AI-generated."""
    try:
        return read_png_metadata(path).get("ai_generated") == "true"
    except InputError:
        return False


def preview_path(lora: Path, inputs: Iterable[Path] = ()) -> Path:
    """Where UIs look for a LoRA's preview: NAME.png, or NAME.preview.png if NAME.png isn't a preview.

    That is a picture that isn't generated (such as the person's photo), one of `inputs`, or one beside which NAME.preview.png is generated.
    """
    first, second = lora.with_suffix(".png"), lora.with_suffix(".preview.png")
    taken = first.exists() and (not is_generated(first) or is_generated(second) or first.resolve() in {path.resolve() for path in inputs})
    return second if taken else first


def grid(rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], cell: int = 0) -> Image.Image:
    """A labeled contact sheet with one row of pictures for each row label; long labels are wrapped.

    Args:
        cell: the side of each picture on the sheet in pixels; 0: the width of the largest first picture of a row, within 128 to 256.
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
    """The text with line breaks, so that no line is wider than `width` pixels in `font`."""
    count = max(1, width // 3)  # The most letters a line can have: none is narrower than 3 pixels.
    while count > 1 and any(font.getlength(line) > width for line in textwrap.wrap(text, count)):
        count -= 1
    return "\n".join(textwrap.wrap(text, count))
