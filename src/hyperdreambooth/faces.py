"""Face detection: position, size and in-plane rotation (roll) of the faces in a photo, and an upright crop like FFHQ's.

The detector is YuNet (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023), run by OpenCV; its weights (MIT license, from
OpenCV's model zoo) are in the package, so nothing is downloaded. It locates both eyes and the corners of the mouth in faces of about 10
pixels and larger, at any roll. It underestimates the roll of a tilted face, so the detection is repeated on a close-up that is rotated
by the roll found so far.
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
ORIENTATIONS = (0, 180, 90, -90)  # Rotations in degrees at which a photo is searched.
# Longer side in pixels of the copies that are searched until a face is found: small faces need a large copy, the largest a small one.
SIZES = (512, 1024, 2048, 256)
# Enhancements tried in turn: none, autocontrast (haze), autocontrast after a Gaussian blur of that radius in pixels (dark, noisy photos).
BLURS = None, 0.0, 3.0
Box = tuple[float, float, float, float]
LARGEST_CROP = 256  # Pictures of at most this many pixels a side are taken for face crops already.
DETECTED, SURE = 0.7, 0.8  # Detection scores, 0 to 1: the threshold for a face, and that for one without a warning.
REFINEMENTS = 5  # Close-ups of a detected face: each corrects the position, size and roll that the one before found.
OFFSETS = (-24, -16, -8, 0, 8, 16, 24)  # Degrees added to the roll found so far; the detections are averaged, as each is a little off.
CLOSE_UP = 384  # Side in pixels of the close-up of one face.


class Face(NamedTuple):
    """A face: the center of its crop (x, y) and half the crop's side in pixels, its roll, and the detection score, 0 to 1.

    `roll` is in degrees, positive where the head is rotated clockwise in the picture.
    """

    x: float
    y: float
    side: float
    roll: float
    score: float


def find_faces(image: Image.Image) -> list[Face]:
    """Faces at any roll, the largest first: those in the first copy, by `BLURS` and then `SIZES`, that shows any.

    Raises InputError if OpenCV isn't installed.
    """
    rgb = image.convert("RGB")
    for blur, size in product(BLURS, SIZES):
        scale = max(image.size) / size
        # the larger sizes never enlarge a photo, and the largest isn't searched with enhancement, which would take seconds
        if size > SIZES[0] and (scale < 1 or (blur is not None and size == max(SIZES))):
            continue
        small = _copy(rgb, (max(1, round(image.width / scale)), max(1, round(image.height / scale))), blur)
        found: list[Face] = []  # one detection for each face: of those in several orientations, the one with the best score comes first
        for face in sorted((face for turn in ORIENTATIONS for face in _search(small, turn)), key=lambda face: -face.score):
            face = Face(face.x * scale, face.y * scale, face.side * scale, *face[3:])
            if _is_new(face, found) and (refined := _refine(rgb, face, blur)) and _is_new(refined, found):
                found.append(refined)
        if found:
            return sorted(found, key=lambda face: -face.side)
    return []


def _is_new(face: Face, others: list[Face]) -> bool:
    """Whether a detection lies too far from all others to be of the same face."""
    return all(math.dist(face[:2], other[:2]) > 0.6 * max(face.side, other.side) for other in others)


def _copy(image: Image.Image, size: tuple[int, int], blur: float | None, box: Box | None = None) -> Image.Image:
    """A picture, or a box of it, scaled to `size`; unless `blur` is None, blurred by that many pixels and with autocontrast."""
    small = image.resize(size, Image.Resampling.BILINEAR, box, reducing_gap=3)
    return small if blur is None else ImageOps.autocontrast(small.filter(ImageFilter.GaussianBlur(blur)), cutoff=1)


def _refine(image: Image.Image, face: Face, blur: float | None) -> Face | None:
    """The same face, measured in close-ups; None for a false detection, which the close-ups don't confirm."""
    refined: list[Face] = []
    for _ in range(REFINEMENTS):
        reach = 1.7 * face.side  # half the side of a square that contains the crop at any roll
        left, top, scale = face.x - reach, face.y - reach, 2 * reach / CLOSE_UP
        inside = max(left, 0), max(top, 0), min(left + 2 * reach, image.width), min(top + 2 * reach, image.height)
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            return None
        size = (max(1, round((inside[2] - inside[0]) / scale)), max(1, round((inside[3] - inside[1]) / scale)))
        near = Image.new("RGB", (CLOSE_UP, CLOSE_UP), "gray")
        near.paste(_copy(image, size, blur or 0.0, inside), (round((inside[0] - left) / scale), round((inside[1] - top) / scale)))
        turns = OFFSETS if refined else ORIENTATIONS  # the first close-up decides anew which way is up
        best = [max(_search(near, face.roll + turn), key=lambda one: one.score, default=None) for turn in turns]
        here = [one for one in best if one and math.dist(one[:2], (CLOSE_UP / 2, CLOSE_UP / 2)) < face.side / scale]
        if len(here) < (len(OFFSETS) / 2 if refined else 1):  # a real face is detected at most of the offsets
            return None
        x, y, side, roll, score = np.mean(here if refined else [max(here, key=lambda one: one.score)], axis=0).tolist()
        refined.append(face := Face(left + x * scale, top + y * scale, side * scale, roll, score))
    return Face(*np.mean(refined[1:], axis=0).tolist())


def _search(image: Image.Image, turn: float) -> Iterator[Face]:
    """Detects faces in a copy rotated by `turn` degrees counterclockwise; positions and roll are those in the picture itself."""
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
    """The detector of a thread, by its id: a detector can't process two pictures at a time."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # OpenCV 5 warns for every model that it may run on the CPU
    with refusing('finding faces needs OpenCV: pip install "hyperdreambooth[faces]", or use --crop center', ImportError):
        import cv2
    return cv2.FaceDetectorYN.create(str(MODEL), "", (CLOSE_UP, CLOSE_UP), DETECTED)


def face_for(image: Image.Image, name: str, crop: str, which: int | None = None) -> tuple[Face | None, str]:
    """Chooses the face to crop in the photo `name`: the face, or None for the center of the picture, and a note on the choice (or "").

    Args:
        crop: "face" is the largest face; "auto" is the same, but the center if no face is found or the picture is so small that it is a
            crop already; "center" is the center.
        which: the number of the face, from 1 for the largest; given, it overrides `crop`.

    Raises NoFaceError if a face is asked for and none is found, InputError if there is no face of that number.
    """
    asked = crop == "face" or which is not None
    if not asked and (crop == "center" or max(image.size) <= LARGEST_CROP):
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
    """The square crop of a face, rotated upright. A crop that leaves the picture is moved inside; one larger than the picture is shrunk."""
    angle = math.radians(face.roll)
    reach = abs(math.cos(angle)) + abs(math.sin(angle))  # width of a rotated square's bounding box over the square's side
    side = min(2 * face.side, min(image.size) / reach)
    half = side * reach / 2
    x, y = (min(max(middle, half), length - half) for middle, length in zip((face.x, face.y), image.size, strict=True))
    around = image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
    upright = around.rotate(face.roll, Image.Resampling.BICUBIC) if abs(face.roll) > 1 else around
    left = (upright.width - side) / 2
    return upright.crop((round(left), round(left), round(left + side), round(left + side)))
