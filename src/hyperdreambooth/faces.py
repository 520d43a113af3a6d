"""Faces in a photo: where they are, how far they are tilted, and an upright crop with margin as in FFHQ and CelebA-HQ.

OpenCV's cascades find them (Apache-2.0; the models ship inside its package, nothing is downloaded): one for faces, which
tolerates some 15 degrees of tilt and so is run on turned copies too, and two for eyes, one of them trained with glasses. The
line between the eyes gives the tilt.
"""

import math
import threading
from collections.abc import Iterator
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from .errors import InputError, NoFaceError, refusing

TURNS = (0, 20, -20, 40, -40)  # Degrees by which copies are turned before faces are looked for.
ORIENTATIONS = (0, 180, 90, -90)  # Quarter turns at which a photo is searched, in this order, until a face with eyes is found.
SIZES = (512, 1024, 2048)  # The longer side of the copies that are searched, until a face is found: small faces need the larger ones.
SMALLEST_AUTO = 256  # A picture of at most this many pixels a side is taken for a crop that is one already.
MARGIN = 2.0  # Side of a crop over the side of the detector's box, which runs from the brows to the chin.


class Face(NamedTuple):
    """A face in pixels: the middle of its crop, the side of the detector's box, and its tilt.

    `roll` is in degrees, positive where the head is turned clockwise as one looks at the picture; 0 where no eyes were found.
    """

    x: float
    y: float
    side: float
    roll: float
    eyes: bool


def find_faces(image: Image.Image) -> list[Face]:
    """Frontal faces at any tilt, the largest first. Raises InputError where OpenCV isn't installed.

    Upright faces are looked for first, then sideways and upside-down ones, larger copies, and upright copies without noise and of full
    contrast; the first of these searches that finds a face with both eyes ends it. One without eyes counts only where it is found upright.
    """
    gray, searches = image.convert("L"), list[list[Face]]()
    for brightened, size in product((False, True), (size for size in SIZES if size <= max(SIZES[0], *image.size))):
        scale = max(image.size) / size
        small = gray.resize((max(1, round(image.width / scale)), max(1, round(image.height / scale))), Image.Resampling.BILINEAR)
        small = ImageOps.autocontrast(small.filter(ImageFilter.GaussianBlur(2)), cutoff=1) if brightened else small
        for quarter in ORIENTATIONS[:1] if brightened else ORIENTATIONS:
            found = [face for turn in TURNS for face in _search(small, quarter + turn)]
            faces: list[Face] = []  # one for all the turns at which it was found: where it stands most upright it was seen best
            for face, _ in sorted(found, key=lambda item: (not item[0].eyes, abs(item[1]))):
                if all(math.dist(face[:2], other[:2]) > 0.6 * max(face.side, other.side) for other in faces):
                    faces.append(face)
            faces = [Face(face.x * scale, face.y * scale, face.side * scale, face.roll, face.eyes) for face in faces]
            searches.append(sorted(faces, key=lambda face: -face.side))
            if any(face.eyes for face in faces):
                return searches[-1]
    return searches[0]


def _search(image: Image.Image, turn: int) -> Iterator[tuple[Face, float]]:
    """Faces of a gray picture that stand upright once it is turned by `turn` degrees counterclockwise, and how upright."""
    turned = image.rotate(turn, Image.Resampling.BILINEAR, expand=True, fillcolor=128) if turn else image
    pixels = np.asarray(turned)
    smallest = max(24, min(51, min(image.size) // 10))
    detector = _cascade("haarcascade_frontalface_alt2", threading.get_ident())
    for left, top, side, _ in detector.detectMultiScale(pixels, 1.1, 4, minSize=(smallest, smallest)):
        eyes = _eyes(pixels[top : top + side, left : left + side])
        if eyes is None and turn:
            continue
        (ax, ay), (bx, by) = eyes or ((0.3 * side, 0.4 * side), (0.7 * side, 0.4 * side))
        lean = math.degrees(math.atan2(by - ay, bx - ax))
        # FFHQ's crops are centered a tenth of the way from the eyes to the mouth
        x = left + (ax + bx) / 2 - 0.04 * side * math.sin(math.radians(lean)) - turned.width / 2
        y = top + (ay + by) / 2 + 0.04 * side * math.cos(math.radians(lean)) - turned.height / 2
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        center = cos * x - sin * y + image.width / 2, sin * x + cos * y + image.height / 2
        yield Face(*center, float(side), lean + turn if eyes else 0.0, eyes is not None), lean


def _eyes(face: Any) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """The middles of the left and the right eye in a detector's box (side, side), or None where no plausible pair is found."""
    side = len(face)
    for name in ("haarcascade_eye_tree_eyeglasses", "haarcascade_eye"):
        boxes = _cascade(name, threading.get_ident()).detectMultiScale(face[: round(0.65 * side)], 1.05, 4, minSize=(side // 8, side // 8))
        middles = sorted((float(x + width / 2), float(y + height / 2)) for x, y, width, height in boxes)
        apart = ((a, b, b[0] - a[0], abs(b[1] - a[1])) for a, b in combinations(middles, 2))
        pairs = [(a, b) for a, b, across, down in apart if 0.3 * side < across < 0.6 * side and down < 0.5 * across]
        if pairs:  # of several the one that lies best around the box's middle
            return min(pairs, key=lambda pair: abs(pair[0][0] + pair[1][0] - side))
    return None


@cache
def _cascade(name: str, thread: int) -> Any:
    """A detector; each thread has its own, since one can't look at two pictures at a time."""
    with refusing('finding faces needs OpenCV 4: pip install "hyperdreambooth[faces]", or use --crop center', ImportError):
        import cv2.data
    return cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / f"{name}.xml"))


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
    unsure = "" if face.eyes else " It is unsure, since no eyes were found: look at it, or give --crop center."
    return face, (note or f"{name}: took the face.") + unsure


def crop_face(image: Image.Image, face: Face) -> Image.Image:
    """The square around a face, turned upright. A crop that leaves the picture is moved inside; a larger one is cut to it."""
    angle = math.radians(face.roll)
    reach = abs(math.cos(angle)) + abs(math.sin(angle))  # a turned square's width over its side
    side = min(MARGIN * face.side, min(image.size) / reach)
    half = side * reach / 2
    x, y = (min(max(middle, half), length - half) for middle, length in zip((face.x, face.y), image.size, strict=True))
    around = image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
    upright = around.rotate(face.roll, Image.Resampling.BICUBIC) if abs(face.roll) > 1 else around
    left = (upright.width - side) / 2
    return upright.crop((round(left), round(left), round(left + side), round(left + side)))
