"""Faces in a photo: where they are, how far they are tilted, and an upright crop as in FFHQ.

YuNet finds them (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023), run by OpenCV; its weights (MIT, OpenCV's model zoo)
are in the package, nothing is downloaded. It sees both eyes and the corners of the mouth, in faces from some 10 pixels on and at any tilt; but what it
sees in a tilted face is more upright than the face, so it looks at the face again, turned by what it saw, until that stands upright.
"""

import math
import os
import threading
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from .errors import InputError, NoFaceError, refusing

MODEL = Path(__file__).parent / "assets" / "yunet" / "face_detection_yunet_2023mar.onnx"
ORIENTATIONS = (0, 180, 90, -90)  # Quarter turns at which a photo is searched.
# The longer side of the copies that are searched, until a face is found: one that fills the photo needs the smallest, a small one the larger ones.
SIZES = (512, 1024, 2048, 256)
# A photo as it is, then of full contrast (haze), then with its noise blurred before, by so many pixels (darkness).
CLEARED = None, 0.0, 3.0
Box = tuple[float, float, float, float]
SMALLEST_AUTO = 256  # A picture of at most this many pixels a side is taken for a crop that is one already.
SEEN, SURE = 0.7, 0.8  # The score, 0 to 1, from which on something counts as a face, and as one without doubt.
LOOKS = 5  # At a face that is found: each sees its tilt better than the one before,
SWAY = (-24, -16, -8, 0, 8, 16, 24)  # from turns of some degrees more and less, for what the detector sees changes a little with each.
CLOSE = 384  # Side in pixels of the picture of one face alone.


class Face(NamedTuple):
    """A face in pixels: the middle of its crop, half the side of the crop, its tilt, and the detector's score, 0 to 1.

    `roll` is in degrees, positive where the head is turned clockwise as one looks at the picture.
    """

    x: float
    y: float
    side: float
    roll: float
    score: float


def find_faces(image: Image.Image) -> list[Face]:
    """Faces at any tilt, the largest first: all in the smallest copy that shows one; where none does, of full contrast, and without noise.

    Raises InputError where OpenCV isn't installed.
    """
    rgb = image.convert("RGB")
    for clear, size in product(CLEARED, SIZES):
        scale = max(image.size) / size
        if size > SIZES[0] and (scale < 1 or (clear is not None and size == max(SIZES))):  # a small face in the dark would take seconds
            continue
        small = _copy(rgb, (max(1, round(image.width / scale)), max(1, round(image.height / scale))), clear)
        found: list[Face] = []  # one for all the orientations in which it is seen: the one seen best comes first
        for face in sorted((face for turn in ORIENTATIONS for face in _search(small, turn)), key=lambda face: -face.score):
            face = Face(face.x * scale, face.y * scale, face.side * scale, *face[3:])
            if _is_new(face, found) and (closer := _look_closer(rgb, face, clear)) and _is_new(closer, found):
                found.append(closer)
        if found:
            return sorted(found, key=lambda face: -face.side)
    return []


def _is_new(face: Face, others: list[Face]) -> bool:
    return all(math.dist(face[:2], other[:2]) > 0.6 * max(face.side, other.side) for other in others)


def _copy(image: Image.Image, size: tuple[int, int], clear: float | None, box: Box | None = None) -> Image.Image:
    small = image.resize(size, Image.Resampling.BILINEAR, box, reducing_gap=3)
    return small if clear is None else ImageOps.autocontrast(small.filter(ImageFilter.GaussianBlur(clear)), cutoff=1)


def _look_closer(image: Image.Image, face: Face, clear: float | None) -> Face | None:
    """The same face, seen better; None where it is no face after all."""
    looks: list[Face] = []
    for _ in range(LOOKS):
        reach = 1.7 * face.side  # half of a square that shows the crop at any tilt
        left, top, scale = face.x - reach, face.y - reach, 2 * reach / CLOSE
        inside = max(left, 0), max(top, 0), min(left + 2 * reach, image.width), min(top + 2 * reach, image.height)
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            return None
        size = (max(1, round((inside[2] - inside[0]) / scale)), max(1, round((inside[3] - inside[1]) / scale)))
        near = Image.new("RGB", (CLOSE, CLOSE), "gray")
        near.paste(_copy(image, size, clear or 0.0, inside), (round((inside[0] - left) / scale), round((inside[1] - top) / scale)))
        seen = [max(_search(near, face.roll + turn), key=lambda one: one.score, default=None) for turn in (SWAY if looks else ORIENTATIONS)]
        here = [one for one in seen if one and math.dist(one[:2], (CLOSE / 2, CLOSE / 2)) < face.side / scale]
        if len(here) < (len(SWAY) / 2 if looks else 1):  # what most turns don't show is no face
            return None
        # which way is up shows best from nearby
        x, y, side, roll, score = np.mean(here if looks else [max(here, key=lambda one: one.score)], axis=0).tolist()
        looks.append(face := Face(left + x * scale, top + y * scale, side * scale, roll, score))
    return Face(*np.mean(looks[1:], axis=0).tolist())


def _search(image: Image.Image, turn: float) -> Iterator[Face]:
    """Faces of a picture that is looked at after a turn by `turn` degrees counterclockwise."""
    turned = image.rotate(turn, Image.Resampling.BILINEAR, expand=True, fillcolor="gray") if turn else image
    detector = _detector(threading.get_ident())
    detector.setInputSize(turned.size)
    found = detector.detect(np.ascontiguousarray(np.asarray(turned)[..., ::-1]))[1]
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    for row in found if found is not None else ():
        eyes, mouth = row[4:8].reshape(2, 2).astype(float), row[10:14].reshape(2, 2).astype(float).mean(0)
        across, down = eyes[1] - eyes[0], mouth - eyes.mean(0)
        # FFHQ's crop (Karras et al., arXiv 1812.04948): centered a tenth of the way from the eyes to the mouth
        x, y = eyes.mean(0) + 0.1 * down - np.array(turned.size) / 2
        side = max(2 * math.hypot(*across), 1.8 * math.hypot(*down))
        lean = math.degrees(math.atan2(across[1] - down[0], across[0] + down[1]))
        middle = float(cos * x - sin * y + image.width / 2), float(sin * x + cos * y + image.height / 2)
        yield Face(*middle, side, lean + turn, float(row[14]))


@cache
def _detector(thread: int) -> Any:
    """The detector; each thread has its own, since one can't look at two pictures at a time."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # OpenCV 5 says of every model that it may run on a CPU
    with refusing('finding faces needs OpenCV: pip install "hyperdreambooth[faces]", or use --crop center', ImportError):
        import cv2
    return cv2.FaceDetectorYN.create(str(MODEL), "", (CLOSE, CLOSE), SEEN)


def face_for(image: Image.Image, name: str, crop: str, which: int | None = None) -> tuple[Face | None, str]:
    """The face that a crop of the photo `name` goes around, or None for the middle of the picture, and a note on what was chosen (or "").

    "face", or any `which`: face number `which` by size from 1, or the largest. "auto": the largest face, or the middle where there is
    none, or where the picture is so small that it is a crop already. "center": the middle.

    Raises NoFaceError where a face is asked for and there is none, InputError where there is no such one.
    """
    asked = crop == "face" or which is not None
    if not asked and (crop == "center" or max(image.size) <= SMALLEST_AUTO):
        return None, ""
    try:
        faces = find_faces(image)
        if not faces:
            raise NoFaceError("no face was found. Take a frontal photo, or --crop center for the middle of the picture.")
    except InputError as error:
        if asked:
            raise type(error)(f"{name}: {error}") from error
        return None, f"{name}: took the middle; {error}"
    if which is not None and not 1 <= which <= len(faces):
        raise InputError(f"{name}: there is no face {which}; {len(faces)} were found.")
    face = faces[(which or 1) - 1]
    note = f"{name}: {len(faces)} faces, took the largest; --face N takes another." if len(faces) > 1 and which is None else ""
    if asked:
        return face, note
    unsure = "" if face.score >= SURE else " It is unsure whether that is one: look at it, or give --crop center."
    return face, (note or f"{name}: took the face.") + unsure


def crop_face(image: Image.Image, face: Face) -> Image.Image:
    """The square around a face, turned upright. A crop that leaves the picture is moved inside; a larger one is cut to it."""
    angle = math.radians(face.roll)
    reach = abs(math.cos(angle)) + abs(math.sin(angle))  # a turned square's width over its side
    side = min(2 * face.side, min(image.size) / reach)
    half = side * reach / 2
    x, y = (min(max(middle, half), length - half) for middle, length in zip((face.x, face.y), image.size, strict=True))
    around = image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
    upright = around.rotate(face.roll, Image.Resampling.BICUBIC) if abs(face.roll) > 1 else around
    left = (upright.width - side) / 2
    return upright.crop((round(left), round(left), round(left + side), round(left + side)))
