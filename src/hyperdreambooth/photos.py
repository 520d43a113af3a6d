"""A picture from outside: safe decoding, orientation, colors, crop, mask.

Nothing that comes from a user is decoded before its header was checked, and whatever is wrong with a file is one
InputError that names it.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin, UnidentifiedImageError
from torch import Tensor

from .errors import InputError
from .faces import choose_face, crop_face, find_for_auto
from .pictures_out import generated as generated
from .pictures_out import grid as grid
from .pictures_out import is_generated as is_generated
from .pictures_out import preview_path as preview_path
from .pictures_out import read_png_metadata as read_png_metadata
from .pictures_out import save_png as save_png
from .settings import Crop as Crop

Source = Any
"""What `read_photo` takes: str | Path | bytes | BinaryIO | Image.Image | numpy array | Tensor."""
NOT_PHOTOS = {"EPS", "PDF", "WMF", "GRIB", "HDF5", "BUFR", "MPEG", "XVTHUMB"}
"""What Pillow opens beside pictures: documents (EPS runs Ghostscript), vector drawings, containers of data."""
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
MAX_JPEG_PIXELS = 205_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jfif", ".jpe", ".mpo"}
MAX_BYTES = 100_000_000
MAX_PIXELS = 64_000_000
MIN_SIDE = 16


def load_photo(source: Source) -> Image.Image:
    """A picture as upright 8-bit sRGB; `read_photo` without its notes."""
    return read_photo(source)[0]


def read_photo(source: Source) -> tuple[Image.Image, str]:
    """A picture as upright 8-bit sRGB, and a note on what was assumed or passed over (or "").

    EXIF orientation and color profiles are applied, transparency is laid on white, 16-bit is scaled. Formats are told by content.

    Args:
        source: a path or file:// URL, the bytes of a file, an open binary file, a PIL image, an array (H, W) or (H, W, C), or a
            tensor (C, H, W); uint8, uint16, or float in 0..1, 0..255 or (where anything is negative) -1..1.

    Raises InputError for a file that is missing, empty, no picture, truncated, under 16 x 16 pixels, over 64 megapixels (JPEG: 200,
    decoded at a reduced size) or over 100 MB, and for a web address.
    """
    name = photo_name(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures (our own limit is lower) and of damaged EXIF, which is no loss
            # Pillow loses the orientation of a TIFF that it maps from a file on disk, so that one is read as bytes
            if isinstance(source, Image.Image) and source.format == "TIFF" and getattr(source, "_im", None) is None:
                source = Path(getattr(source, "filename", "")) if getattr(source, "filename", "") else source
            if isinstance(source, Image.Image):
                return _finish(source, name)
            if isinstance(source, (np.ndarray, Tensor)):
                return _finish(_from_array(source, name), name)
            with _open(_read_bytes(source, name), name) as image:
                return _finish(image, name)
    except InputError:  # is a ValueError, and would be wrapped below
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels; the limit is {MAX_PIXELS / 1e6:.0f} megapixels. Scale it down first.") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture ({', '.join(FORMATS)} and more are read). Convert it first.") from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, IndexError, KeyError, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's errors have a number, Pillow's have none
            raise InputError(f"{name} can't be read: {error.strerror}. Check the path and its permissions.") from error
        raise InputError(f"{name} is a damaged picture ({error}). Was it cut off while copying?") from error


def photo_name(source: Source) -> str:
    """What messages call a picture."""
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or f"the picture ({type(source).__name__})")


def _read_bytes(source: str | Path | bytes | BinaryIO, name: str) -> bytes:
    if isinstance(source, (bytes, bytearray)):
        data = bytes(source)
    elif isinstance(source, (str, Path)):
        if isinstance(source, str) and re.match(r"(?i)(https?|ftp|data):", source):
            raise InputError(f"{name[:80]}: nothing is fetched from the web. Save the picture and name the file.")
        is_url = isinstance(source, str) and source.lower().startswith("file://")
        path = Path(url2pathname(urlsplit(str(source)).path) if is_url else source)
        if path.is_dir():
            raise InputError(f"{name} is a folder, not a picture. Name a picture in it.")
        if not path.is_file():
            raise InputError(f"{name}: no such file. Check the path.")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{name} has {path.stat().st_size / 1e6:.0f} MB; the limit is {MAX_BYTES / 1e6:.0f} MB. Scale it down first.")
        data = path.read_bytes()
    elif hasattr(source, "read"):
        data = source.read(MAX_BYTES + 1)
        if not isinstance(data, bytes):
            raise InputError(f"{name} was opened as text. Open it in binary mode.")
    else:
        raise InputError(f"{name} is no picture: give a path, bytes, an open file, a PIL image, an array or a tensor.")
    if not data:
        raise InputError(f"{name} is empty (0 bytes). Was it cut off while copying?")
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} has over {MAX_BYTES / 1e6:.0f} MB, which is the limit. Scale it down first.")
    return data


def _open(data: bytes, name: str) -> Image.Image:
    """Opens a file by its content; no pixel is decoded yet."""
    if data.startswith(b"\xff\xd8\xff"):
        # Image.open refuses over 179 megapixels, which the reduced decoding below can take
        image: Image.Image = JpegImagePlugin.jpeg_factory(io.BytesIO(data))
        if MAX_PIXELS < image.width * image.height <= MAX_JPEG_PIXELS:
            image.draft(None, (image.width // 4, image.height // 4))
        return image
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        try:
            from pillow_heif import register_heif_opener
        except ImportError as error:
            raise InputError(f'{name} is HEIC, which needs pip install "hyperdreambooth[heif]"; or convert it to JPEG.') from error
        register_heif_opener()
    Image.init()
    return Image.open(io.BytesIO(_without_text(data)), formats=[kind for kind in Image.ID if kind not in NOT_PHOTOS])


def _without_text(data: bytes) -> bytes:
    """A PNG without its texts, of which Pillow refuses more than a megabyte; ImageMagick's "Raw profile" texts hold EXIF and stay."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    kept, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt") or data[at + 8 : at + 19] == b"Raw profile":
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _from_array(values: Any, name: str) -> Image.Image:
    """(H, W) or (H, W, 1..4), or a tensor (C, H, W), as a picture."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values[0] if values.ndim == 4 and len(values) == 1 else values
        values = values.movedim(0, -1) if values.ndim == 3 else values
        values = (values.float() if values.is_floating_point() else values).numpy()
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)) or values.size == 0:
        raise InputError(f"{name} has shape {tuple(values.shape)}: give an array (H, W, 3), a gray one (H, W), or a tensor (3, H, W).")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise InputError(f"{name} holds NaN or infinite values.")
        low, high = float(values.min()), float(values.max())
        if low < -1 or (low < 0 and high > 1) or high > 255:
            raise InputError(f"{name} has values in {low:g}..{high:g}: give 0..1, -1..1 or 0..255.")
        values = (values + 1) * 127.5 if low < 0 else values * (255 if high <= 1 else 1)
    elif values.dtype == np.uint16:
        values = values / 257
    elif values.dtype.kind == "b":
        values = values * 255
    elif values.min() < 0 or values.max() > 255:
        raise InputError(f"{name} has whole numbers outside 0..255.")
    array = values.round().astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _finish(image: Image.Image, name: str) -> tuple[Image.Image, str]:
    """Checks the size, decodes, turns upright and converts to 8-bit sRGB."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} has {width} x {height} pixels; the limit is {MAX_PIXELS / 1e6:.0f} megapixels. Scale it down first.")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} has {width} x {height} pixels, too few to show a face: take one of at least {MIN_SIDE} x {MIN_SIDE}.")
    frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
    image.load()
    notes = [f"{name}: took the first of {frames} frames."] if frames > 1 else []
    profile = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    if profile:
        upright, problem = _to_srgb(upright, profile)
        notes += [f"{name}: {problem}"] if problem else []
    return to_rgb(upright), " ".join(notes)


def _to_srgb(image: Image.Image, data: bytes) -> tuple[Image.Image, str]:
    """Applies an ICC profile; one that is damaged or of another kind of color is ignored, and the note says so."""
    if image.mode.startswith("I") or image.mode == "F":
        image = to_rgb(image).convert("L")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image, ""
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        space = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space, "")
        if not space or (image.mode == "CMYK") != (space == "CMYK") or (space == "RGB" and image.mode in ("L", "LA")):
            return image, "its color profile is for another kind of picture and was ignored."
        converted = ImageCms.profileToProfile(image.convert(space), profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image, "its color profile is damaged and was ignored."
    if converted is None:
        return image, ""
    if alpha is not None:
        converted.putalpha(alpha)
    return converted, ""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as 8-bit RGB: 16-bit is scaled, never clipped; transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        # 16-bit files are read as I or I;16, 32-bit ones as I; a float picture is taken as 0..1, or as 0..255 where it exceeds that
        largest = values.max(initial=0)
        whole = 4095.0 if 255 < largest <= 4095 else max(65535.0, largest)  # 12 bits of a camera or scanner in a 16-bit file
        top = (1.0 if largest <= 1 else 255.0) if image.mode == "F" else whole
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


def prepare(path: Source, size: int, crop: Crop = "auto", face: int | None = None) -> tuple[Image.Image, str]:
    """A photo from a file, cropped and resized to `size` x `size`, and a note on what was chosen (or "").

    Raises InputError for what is no photo, or where the face that is asked for isn't there.
    """
    image, note = read_photo(path)
    if crop == "auto" and face is None:
        chosen_or_none, which = find_for_auto(image, photo_name(path))
        image = crop_face(image, chosen_or_none) if chosen_or_none else image
        note = " ".join(filter(None, (note, which)))
    elif crop == "face" or face is not None:
        chosen, which = choose_face(image, photo_name(path), face)
        note = " ".join(filter(None, (note, which)))
        image = crop_face(image, chosen)
    return square(image, size), note


def prepare_mask(path: Source, photo: Source, size: int, crop: Crop = "auto", face: int | None = None) -> Image.Image:
    """A gray picture that says where `photo` counts (white) and where not (black), cropped as `prepare` crops the photo.

    Raises InputError where the two differ in size, or the crop holds nothing that counts.
    """
    image, mask = load_photo(photo), load_photo(path)
    if mask.size != image.size:
        raise InputError(
            f"the mask {photo_name(path)} has {mask.width} x {mask.height} pixels and the photo {photo_name(photo)} {image.width} x {image.height}: "
            "draw it on the photo itself."
        )
    if crop == "auto" and face is None:
        chosen, _ = find_for_auto(image, photo_name(photo))
        mask = crop_face(mask, chosen) if chosen else mask
    elif crop == "face" or face is not None:
        mask = crop_face(mask, choose_face(image, photo_name(photo), face)[0])
    gray = square(mask, size).convert("L")
    if np.asarray(gray).mean() < 1:  # of 255; a resize leaves traces of what lies just outside
        raise InputError(f"the mask {photo_name(path)} is black wherever the cropped photo is: nothing would count. Paint the face white.")
    return gray


def read_photos(files: Any, size: int, crop: Crop = "auto", face: int | None = None) -> tuple[Tensor, list[str]]:
    """One photo or several as (n, 3, size, size) in -1..1, and what is worth saying about them (which face was taken).

    Args:
        files: whatever `read_photo` takes, or a sequence of it; a tensor (n, 3, size, size) is what this function made, and stays as it is.
    """
    if isinstance(files, Tensor) and files.ndim == 4:
        return files, []
    alone = isinstance(files, (str, Path, Image.Image, bytes, np.ndarray, Tensor)) or hasattr(files, "read")
    prepared = [prepare(file, size, crop, face) for file in ([files] if alone else files)]
    if not prepared:
        raise InputError("no photo was given.")
    return to_tensor([image for image, _ in prepared]), [note for _, note in prepared if note]


def read_masks(masks: Any, files: Any, size: int, crop: Crop = "auto", face: int | None = None) -> Tensor:
    """Gray pictures that say where photos count, one for all of them or one each: (n, 1, size, size) in 0..1.

    Raises InputError for another number of masks, or one that doesn't fit its photo.
    """
    group, drawn = ([item] if isinstance(item, (str, Path)) else list(item) for item in (files, masks))
    if len(drawn) not in (1, len(group)):
        raise InputError(f"{len(drawn)} masks for {len(group)} photos: give one for all of them, or one each.")
    pairs = zip(drawn if len(drawn) > 1 else drawn * len(group), group, strict=True)
    return (to_tensor([prepare_mask(mask, photo, size, crop, face) for mask, photo in pairs])[:, :1] + 1) / 2


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> (N, 3, H, W) float32 in -1..1."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in -1..1 -> pictures."""
    values = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).numpy()]
