"""Measurements of the heads world before its base is trained: `python -m worlds.heads.gates GATE`.

`ceiling` measures how well dlib recognizes people in true renders, an upper bound for generated pictures; `reconstruction` the PSNR of
principal components at several latent sizes; `autoencoder` PSNR and dlib's recognition after the autoencoder of runs/heads (HEADS_RUNS).

dlib's face recognizer was trained on real people only. The gallery has one plain front picture per person; pictures of the same people
in other contexts are looked up in it, always among 100 people. A face that dlib doesn't find counts as not recognized.
Needs `pip install hyperdreambooth[heads,judges]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hyperdreambooth.evaluation.judges import Dlib

from . import PLAIN, Context, Person, context, person, render

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "heads-gates.json"
FIRST = 2_000_000
"""Number of the first test person; training people count from 0."""
CROWD = 100
QUERIES: dict[str, dict[str, Any]] = {
    "smile": {"expression": "smile", "yaw": 0.0, "pitch": 0.0, "light": "studio", "headwear": "none", "eyewear": "none"},
    "surprise": {"expression": "surprise", "yaw": 0.0, "pitch": 0.0, "light": "studio", "headwear": "none", "eyewear": "none"},
    "turned": {"expression": "neutral", "yaw": 30.0, "pitch": 0.0, "light": "studio", "headwear": "none", "eyewear": "none"},
    "sun": {"expression": "neutral", "light": "sun", "headwear": "none", "eyewear": "none"},
    "night": {"expression": "neutral", "light": "night", "background": "city at night", "headwear": "none", "eyewear": "none"},
    "hat": {"expression": "neutral", "light": "studio", "headwear": "beanie", "eyewear": "none"},
    "glasses": {"expression": "neutral", "light": "studio", "headwear": "none", "eyewear": "glasses"},
    "anything": {},
}
"""The fixed fields of each query's context; all others are random, with yaw limited to 20 degrees unless it is fixed. "anything" is a
fully random context in the photo style.
"""


def query(kind: str, seed: int) -> Context:
    drawn = context(seed, style="photo", **QUERIES[kind])
    if kind == "anything" or "yaw" in QUERIES[kind]:
        return drawn
    return replace(drawn, yaw=float(np.clip(drawn.yaw, -20, 20)))


def rank_one(gallery: list[np.ndarray | None], found: list[np.ndarray | None]) -> list[bool]:
    """For each person, whether the nearest plain picture within their crowd is their own. Crowds are people 0 to 99, 100 to 199 ..."""
    right = []
    for k, one in enumerate(found):
        start = k // CROWD * CROWD
        distances = [
            np.inf if other is None or one is None else float(np.linalg.norm(one - other)) for other in gallery[start : start + CROWD]
        ]
        best = int(np.argmin(distances))
        right.append(bool(np.isfinite(distances[best]) and start + best == k))
    return right


def groups(people: list[Person]) -> dict[str, list[int]]:
    """Indices of the people in each group by sex, age and skin tone."""
    of: dict[str, list[int]] = {}
    for k, one in enumerate(people):
        age = "18 to 34" if one.age < 35 else "35 to 54" if one.age < 55 else "55 to 80"
        tone = "Monk 1 to 4" if one.tone < 4 else "Monk 4 to 7" if one.tone < 7 else "Monk 7 to 10"
        for name in (one.sex, age, tone):
            of.setdefault(name, []).append(k)
    return of


def ceiling(count: int, size: int = 128, through: Callable[[np.ndarray], np.ndarray] | None = None) -> dict[str, Any]:
    """dlib's figures on true renders of `count` people. `through` is applied to every query picture first, but not to the gallery."""
    judge = Dlib()
    people = [person(FIRST + k) for k in range(count)]
    gallery: list[np.ndarray | None] = []
    found: dict[str, list[np.ndarray | None]] = {kind: [] for kind in QUERIES}
    for k, one in enumerate(people):
        gallery.append(judge(render(one, PLAIN, size)))
        for j, kind in enumerate(QUERIES):
            drawn = render(one, query(kind, FIRST + k * len(QUERIES) + j), size)
            found[kind].append(judge(through(drawn) if through else drawn))
    right = {kind: rank_one(gallery, found[kind]) for kind in QUERIES}
    same = [
        float(np.linalg.norm(a - b))
        for kind in QUERIES
        for a, b in zip(found[kind], gallery, strict=True)
        if a is not None and b is not None
    ]
    known = np.stack([one for one in gallery if one is not None])
    apart = np.linalg.norm(known[:, None] - known[None], axis=-1)[np.triu_indices(len(known), 1)]
    every = np.array([right[kind] for kind in QUERIES])
    return {
        "people": count,
        "size": size,
        "detected, plain": float(np.mean([one is not None for one in gallery])),
        "detected": {kind: float(np.mean([one is not None for one in found[kind]])) for kind in QUERIES},
        "rank-1 of 100": {kind: float(np.mean(right[kind])) for kind in QUERIES},
        "rank-1 of 100, mean": float(every.mean()),
        "rank-1 of 100, by group": {name: float(every[:, of].mean()) for name, of in sorted(groups(people).items())},
        "distance, same person": {"median": float(np.median(same)), "95 %": float(np.quantile(same, 0.95))},
        "distance, different people": {"median": float(np.median(apart)), "5 %": float(np.quantile(apart, 0.05))},
    }


LATENTS = {"8 x 8 x 64": (16, 64), "8 x 8 x 96": (16, 96), "8 x 8 x 128": (16, 128), "16 x 16 x 16": (8, 16)}
"""Latent sizes to compare: a patch's side in pixels, and numbers per patch."""


def patches(pictures: np.ndarray, side: int) -> np.ndarray:
    """(N, H, W, 3) uint8 -> flattened side x side patches, one per row, float32 from 0 to 1."""
    n, h, w, _ = pictures.shape
    grid = pictures.reshape(n, h // side, side, w // side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, side * side * 3).astype(np.float32) / 255


def linear_reconstruction(pictures: np.ndarray, held_out: int) -> dict[str, float]:
    """PSNR (dB) of the last `held_out` pictures, reconstructed from principal components of the other pictures' patches: what an
    autoencoder must beat.
    """
    out = {}
    for name, (side, kept) in LATENTS.items():
        mean, moment, count = 0.0, 0.0, 0
        for start in range(0, len(pictures) - held_out, 250):
            x = patches(pictures[start : min(start + 250, len(pictures) - held_out)], side).astype(np.float64)
            mean, moment, count = mean + x.sum(0), moment + x.T @ x, count + len(x)
        mean = mean / count
        _, vectors = np.linalg.eigh(moment / count - np.outer(mean, mean))
        basis = vectors[:, -kept:]
        x = patches(pictures[-held_out:], side) - mean
        error = x - x @ basis @ basis.T
        each = np.square(error).reshape(held_out, -1).mean(1)
        out[name] = float((-10 * np.log10(each)).mean())
    return out


def reconstruction(count: int, size: int = 128) -> dict[str, Any]:
    """PSNR of principal components for `count` pictures in random contexts, four per person, an eighth of them held out."""
    pictures = np.stack([render(person(k // 4), context(k), size) for k in range(count)])
    return {"pictures": count, "size": size, "PSNR of principal components": linear_reconstruction(pictures, max(count // 8 // 4 * 4, 4))}


def autoencoder(count: int, sheet: Path | None = None) -> dict[str, Any]:
    """PSNR (dB) of the queries after the autoencoder, and dlib's figures on these reconstructions.

    Args:
        sheet: a picture file to write, with a different query of each of a few people above its reconstruction.
    """
    import torch

    from ..pixels import to_pixels, to_tensor
    from .sheet import tiled
    from .train import Heads

    vae, pairs = Heads().trained_autoencoder(), []

    @torch.no_grad()
    def through(picture: np.ndarray) -> np.ndarray:
        rebuilt = to_pixels(vae.decode(vae.encode(to_tensor(picture[None])).latent_dist.mode()).sample)[0]
        pairs.append((picture, rebuilt))
        return rebuilt

    figures = ceiling(count, through=through)
    if sheet:
        kinds = ("hat", "night", "surprise", "glasses", "sun")[:count]
        shown = [pairs[k * len(QUERIES) + list(QUERIES).index(kind)] for k, kind in enumerate(kinds)]
        tiled([picture for row in zip(*shown, strict=True) for picture in row], len(shown)).save(sheet)
    errors = [np.square((rebuilt.astype(np.float64) - picture) / 255).mean() for picture, rebuilt in pairs]
    return {"PSNR": float((-10 * np.log10(errors)).mean()), "PSNR of the mean error": float(-10 * np.log10(np.mean(errors))), **figures}


def write(name: str, figures: dict[str, Any]) -> None:
    """Adds a gate's figures to the results file."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results[name] = figures
    temporary = RESULTS.with_suffix(".partial")
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gate", choices=["ceiling", "reconstruction", "autoencoder"])
    parser.add_argument("--people", type=int, default=200, help="for the ceiling and the autoencoder")
    parser.add_argument("--pictures", type=int, default=4000, help="for the reconstruction")
    parser.add_argument("--sheet", type=Path, help="for the autoencoder: a picture of what goes in and what comes out")
    options = parser.parse_args()
    gates = {
        "ceiling": lambda: ceiling(options.people),
        "reconstruction": lambda: reconstruction(options.pictures),
        "autoencoder": lambda: autoencoder(options.people, options.sheet),
    }
    figures = gates[options.gate]()
    write(options.gate, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
