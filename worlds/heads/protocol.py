"""Evaluation of the heads world's trained weights: `python -m worlds.heads.protocol test`, after `make weights WORLD=heads`.

test       100 held-out people with one photo each, drawn by every method for eight prompts with pose, light, headwear and eyewear, and
           compared with true renders. Judged by dlib, which was trained on real people only, and by the world's own judges.
portraits  a folder of real photographs, one per person: whether dlib finds the right person among them for the generated pictures.

Both read runs/heads/export (HEADS_RUNS) and add to benchmarks/results/heads-protocol.json. Pictures are kept in runs/heads/protocol, so
that an interrupted run can resume. Needs `pip install -e ".[heads,judges]"`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperdreambooth import HyperDreamBooth, photos
from hyperdreambooth.checkpoint import read_json, read_tensors, save_tensors, write_json
from hyperdreambooth.evaluation import comparison, metrics
from hyperdreambooth.evaluation.bench import Bench
from hyperdreambooth.evaluation.judges import Dlib, Judge
from hyperdreambooth.evaluation.methods import METHODS
from hyperdreambooth.evaluation.protocol import Atlas, Judges, fingerprint
from hyperdreambooth.folders import list_identities

from ..pixels import to_tensor
from . import PLAIN, caption, contexts, gates, person, pictures, render
from .train import Heads

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "heads-protocol.json"
SHOWN = ("true", "reconstruction", "base", "prediction", "finetuned", "faithful")
ASKED: tuple[dict[str, Any], ...] = (
    {"expression": "smile", "background": "forest"},
    {"expression": "surprise", "yaw": 25.0, "background": "beach"},
    {"yaw": -40.0, "background": "library"},
    {"headwear": "beanie", "headwear_color": "green", "light": "sun", "background": "room"},
    {"eyewear": "glasses", "expression": "laugh", "background": "sunset"},
    {"headwear": "santa hat", "background": "snow"},
    {"light": "night", "background": "city at night", "yaw": 15.0},
    {"style": "pencil", "expression": "smile"},
)
"""The contexts of the eight prompts; true renders take all other fields from `PLAIN`."""
CROWD = 1000
TRIES = 4  # Pictures that are generated and looked up for each portrait.


def kept(file: Path, draw: Callable[[], list[Any]]) -> np.ndarray:
    """Pictures (uint8) from `file`; if it doesn't exist, they are drawn and saved first."""
    if not file.is_file():
        save_tensors(file, {"pictures": torch.from_numpy(np.array(draw()))})
    found: np.ndarray = read_tensors(file)[0]["pictures"].numpy()
    return found


def test_people(folder: Path, dlib: Dlib, count: int) -> tuple[Atlas, list[int]]:
    """Those of the first `count` test people in whose plain picture dlib finds a face, and their numbers."""
    where = [replace(PLAIN, **asked) for asked in ASKED]
    numbers = [pictures.FIRST["test"] + k for k in range(count)]

    def draw() -> list[list[np.ndarray]]:
        people = [person(number) for number in numbers]
        looks = [(pictures.photo(number), PLAIN, *where) for number in numbers]
        return [[render(one, look) for look in mine] for one, mine in zip(people, looks, strict=True)]

    pixels = kept(folder / f"people-{count}.safetensors", draw)
    known = [k for k in range(count) if dlib(pixels[k, 1]) is not None]
    images = to_tensor(pixels[known].reshape(-1, *pixels.shape[2:])).unflatten(0, (len(known), -1))
    prompts = [caption(person(numbers[0]), look, np.random.default_rng(k), subject="a [V] face") for k, look in enumerate(where)]
    classes, seen = [contexts.classified(look) for look in where], [pictures.is_seen(look) for look in where]
    people = [numbers[k] for k in known]
    return Atlas(images[:, 0], images[:, 1], images[:, 2:], prompts, classes, seen, people), people


def strangers(folder: Path, first: int) -> np.ndarray:
    """Plain pictures of the test people from `first` to `CROWD`, which enlarge the gallery to a crowd: (M, 128, 128, 3)."""
    numbers = [pictures.FIRST["test"] + k for k in range(first, CROWD)]
    return kept(folder / f"crowd-{first}.safetensors", lambda: [render(person(number), PLAIN) for number in numbers])


def marks(dlib: Dlib, picture: np.ndarray) -> np.ndarray | None:
    """dlib's five landmarks of the largest face, (5, 2): two corners of each eye, the tip of the nose; None where it finds no face."""
    large = np.ascontiguousarray(picture.repeat(2, 0).repeat(2, 1))
    faces = dlib.detect(large, 0) or dlib.detect(large, 1)
    if not faces:
        return None
    found = dlib.landmarks(large, max(faces, key=lambda face: face.area()))
    return np.array([[point.x, point.y] for point in found.parts()], float)


def nose(dlib: Dlib, images: Tensor) -> np.ndarray:
    """Position of the nose between the eyes, (N,), from which yaw is estimated: 0 in the middle, 1 at the eye on the picture's right. NaN
    without a face.
    """
    found = []
    for image in photos.to_images(images):
        if (points := marks(dlib, np.asarray(image))) is None:
            found.append(np.nan)
            continue
        left, right = sorted((points[:2].mean(0), points[2:4].mean(0)), key=lambda eye: eye[0])
        across = right - left
        found.append(2 * np.dot(points[4] - (left + right) / 2, across) / np.dot(across, across))
    return np.array(found)


def test(heads: Heads, count: int, rows: Sequence[str]) -> dict[str, Any]:
    folder, dlib = heads.runs / "protocol", Dlib()
    hdb, faithful = opened(heads, "hypernetwork"), opened(heads, "faithful") if (heads.faithful / "config.json").is_file() else None
    atlas, numbers = test_people(folder, dlib, count)
    own, classifier = (Judge.from_pretrained(heads.assets / name) for name in ("recogniser", "classifier"))
    judges = Judges({"": own, "dlib": dlib}, classifier)
    plain = Judges({"": own}, classifier)  # the stamp depends on these judges' weights; dlib's never change
    bench = Bench(hdb, atlas, judges, folder / "pictures", fingerprint(hdb, atlas, plain), faithful)
    bench.faithful_stamp = fingerprint(faithful, atlas, plain) if faithful else ""
    methods = {name: METHODS[name] for name in rows if not bench.lacks(METHODS[name])}
    results, _, people = list(comparison.compare(bench, methods, comparison.timed(bench, methods), len(numbers)))[-1]
    crowd = dlib.embed(to_tensor(strangers(folder, count)))
    crowd = torch.cat([bench.known["dlib"][1], crowd[crowd.isfinite().all(1)]])
    groups = gates.groups([person(number) for number in numbers])
    yaws = np.array([asked.get("yaw", 0.0) for asked in ASKED] * people)
    places = nose(dlib, atlas.truths.flatten(0, 1))
    line = np.polyfit(places[np.isfinite(places)], yaws[np.isfinite(places)], 3)
    for name, method in methods.items():
        vectors = bench.measurements(name, method, bench.steps(method), people)["dlib"]
        right = (metrics.ranks(vectors, bench.known["dlib"][1]) == 0).float()
        among = (metrics.ranks(vectors, crowd) == 0).float().flatten(1).mean(1)
        drawn = torch.cat([bench.pictures(name, method, bench.steps(method), k)[: len(ASKED), 0] for k in range(people)])
        estimated = np.polyval(line, nose(dlib, drawn))
        close = np.abs(estimated - yaws)[np.isfinite(estimated)] <= 10
        results[name]["dlib.rank1_crowd"] = [round(float(figure), 4) for figure in metrics.interval(among)]
        results[name]["yaw within 10 degrees"] = round(float(close.mean()), 4) if len(close) else None
        results[name]["dlib.rank1 by group"] = {group: round(float(right[of].mean()), 4) for group, of in sorted(groups.items())}
    grids = bench.worst(methods, people, 6)
    shown = [row for grid in grids.values() for row in grid.values()]
    labels = [f"{title}: {name}" for title, grid in grids.items() for name in grid]
    sheet = photos.grid(shown, labels, atlas.prompts, cell=128)
    print(photos.save_png(sheet, folder / "test.png", {"ai_generated": "true"}, overwrite=True))
    return {"people": people, "crowd": len(crowd), "prompts": atlas.prompts, "rows": results}


def portraits(heads: Heads, folder: Path) -> dict[str, Any]:
    """dlib's rank-1 of pictures generated from real people's photos, looked up among these photos; chance is one over their number."""
    hdb, dlib, named = opened(heads, "hypernetwork"), Dlib(), list_identities(folder)
    mine = dict(hdb.personalize_all(named))
    photo = torch.cat([hdb.read_photos(named[name])[0][:1] for name in mine])
    gallery, rows = dlib.embed(photo), dict[str, Any]()
    known = gallery.isfinite().all(1)
    for form in ("prediction", "finetuned"):
        drawn = []
        for me in mine.values():
            images = hdb.generate([hdb.prompt] * TRIES, me if form == "finetuned" else me.predicted, seed=0)
            drawn.append(torch.cat([photos.to_tensor([image]) for image in images]))
        vectors = dlib.embed(torch.cat(drawn)).unflatten(0, (len(mine), TRIES))[known][:, None]
        right = (metrics.ranks(vectors, gallery[known]) == 0).float().flatten(1).mean(1)
        rows[form] = {"rank1": [round(float(figure), 4) for figure in metrics.interval(right)]}
        rows[form]["no_face"] = round(float(vectors.isnan().any(-1).float().mean()), 4)
        pairs = [photos.to_images(torch.stack([one, *some])) for one, some in zip(photo, drawn, strict=True)]
        sheet = photos.grid(pairs, list(mine), ["photo", *[form] * TRIES], cell=128)
        print(photos.save_png(sheet, heads.runs / "protocol" / f"portraits-{form}.png", {"ai_generated": "true"}, overwrite=True))
    return {
        "people": int(known.sum()),
        "without a face for dlib": int((~known).sum()),
        "chance": round(1 / int(known.sum()), 4),
        "rows": rows,
    }


def opened(heads: Heads, name: str) -> HyperDreamBooth:
    return HyperDreamBooth.from_pretrained(heads.assets / "base", hypernetwork=heads.assets / name, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["test", "portraits"])
    parser.add_argument("folder", nargs="?", type=Path, help="portraits: the folder of photographs")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--rows", nargs="+", default=list(SHOWN), choices=SHOWN)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.what == "portraits" and args.folder is None:
        parser.error("portraits needs the folder of photographs")
    heads = Heads()
    figures = test(heads, args.people, args.rows) if args.what == "test" else portraits(heads, args.folder)
    write_json(args.output, {**(read_json(args.output) if args.output.is_file() else {}), args.what: figures})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
