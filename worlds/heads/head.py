"""The mean head, its 100 identity modes and 57 expression shapes, and the texture coordinates of its skin."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .kernels import kernel
from .raster import EMPTY, rasterize

SKIN, MOUTH, TEETH, TONGUE, EYE, LASH = range(6)
WIDTH, HEIGHT = 512, 384
"""Size in texels of the skin's atlas: columns run around the head, rows from the crown down to the neck."""
TOP, BEND, BOTTOM = 19.0, 5.0, -17.0
EYE_CENTER = np.array([3.094, 3.614, 7.995], np.float32)


@dataclass(frozen=True)
class Head:
    """Arrays of the model; lengths are roughly in centimeters, with y up, z to the front and x to the head's left."""

    mean: np.ndarray  # (N, 3) float32
    kind: np.ndarray  # (N,) uint8
    triangles: np.ndarray  # (T, 3) int32
    closed: int  # number of triangles, from the first on, of closed surfaces: skin and eyeballs
    identities: np.ndarray  # (100, N, 3) float32, offsets of one standard deviation
    expressions: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> vertices (K,), offsets (K, 3)
    rims: np.ndarray  # (52, 3) float32, points on the edges of the lids
    openness: np.ndarray  # (N,) float32, 0 to 1: the visible part of the sky (ambient occlusion)
    uv: np.ndarray  # (N, 2) float32, columns and rows of the atlas
    positions: np.ndarray  # (HEIGHT, WIDTH, 3) float32: each texel's point on the mean head


def azimuth(points: np.ndarray) -> np.ndarray:
    """The angle of points (..., 3) around the head: 0 in front, pi at the back, the same for both sides."""
    return np.arctan2(np.abs(points[..., 0]), points[..., 2] - 0.5)


def atlas_coordinates(points: np.ndarray) -> np.ndarray:
    """Atlas coordinates (column, row) of points (..., 3) of the mean head: a cylindrical projection at the neck, a spherical one over the
    crown, with more texels in front.
    """
    t = azimuth(points) / np.pi
    u = 0.5 + np.where(points[..., 0] < 0, -0.5, 0.5) * t * (1.5 - 0.5 * t)
    y = points[..., 1]
    radius = np.hypot(points[..., 0], points[..., 2] - 0.5)
    v = np.where(y > BEND, BEND + 9.0 * np.arctan2(y - BEND, radius), y)
    rows = (TOP - v) / (TOP - BOTTOM) * HEIGHT
    return np.stack([u * WIDTH, rows], -1).astype(np.float32)


def texel_positions(mean: np.ndarray, triangles: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Each texel's point on the mean head, (HEIGHT, WIDTH, 3); texels that no triangle covers take the nearest covered texel's point."""
    from scipy.ndimage import distance_transform_edt

    faces = triangles[np.ptp(uv[triangles][..., 0], axis=1) < WIDTH / 2]
    radius = np.linalg.norm(mean - np.array([0, 2, 1], np.float32), axis=1)
    screen = np.column_stack([uv, -radius]).astype(np.float32)
    depth, owner = np.full((HEIGHT, WIDTH), EMPTY), np.full((HEIGHT, WIDTH), -1, np.int32)
    weights = np.zeros((HEIGHT, WIDTH, 2), np.float32)
    rasterize(screen, faces, len(faces), 0, depth, owner, weights)
    corners = mean[faces[owner]]
    found = (
        corners[..., 0, :]
        + weights[..., :1] * (corners[..., 1, :] - corners[..., 0, :])
        + weights[..., 1:] * (corners[..., 2, :] - corners[..., 0, :])
    )
    row, column = distance_transform_edt(owner < 0, return_distances=False, return_indices=True)
    return np.ascontiguousarray(found[row, column], np.float32)


def closing(mean: np.ndarray, kind: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (K,) and offsets (K, 3) that a closing lid moves besides itself: lashes turn down in front of the fold, and the eyeball
    moves back, because its cornea would pierce the lid.
    """
    lash, eye = (np.flatnonzero((kind == which) & (mean[:, 0] * side > 0)) for which in (LASH, EYE))
    offsets = np.array([[0, 0, 0.22], [0, -0.36, 0.22], [0, 0, -0.25]], np.float32)
    return np.concatenate([lash, eye]).astype(np.int32), np.repeat(offsets, (len(lash) // 2, len(lash) // 2, len(eye)), axis=0)


@lru_cache(maxsize=1)
def load() -> Head:
    with np.load(Path(__file__).with_name("head.npz"), allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    mean, triangles = arrays["mean"], arrays["triangles"].astype(np.int32)
    starts = arrays["expression_starts"]
    expressions = {
        str(name): (
            arrays["expression_vertices"][starts[k] : starts[k + 1]].astype(np.int32),
            arrays["expression_offsets"][starts[k] : starts[k + 1]].astype(np.float32),
        )
        for k, name in enumerate(arrays["expression_names"])
    }
    for name, side in (("eyeBlink_L", 1), ("eyeBlink_R", -1)):
        pairs = zip(expressions[name], closing(mean, arrays["kind"], side), strict=True)
        vertices, offsets = (np.concatenate(pair) for pair in pairs)
        expressions[name] = vertices, offsets
    uv = atlas_coordinates(mean)
    skin = triangles[(arrays["kind"][triangles] == SKIN).all(1)]
    return Head(
        mean=mean,
        kind=arrays["kind"],
        triangles=triangles,
        closed=int(arrays["closed"]),
        identities=arrays["identities"].astype(np.float32),
        expressions=expressions,
        rims=arrays["rims"],
        openness=arrays["openness"].astype(np.float32) / 255,
        uv=uv,
        positions=texel_positions(mean, skin, uv),
    )


@kernel
def add_modes(points, modes, weights):
    """points (N, 3) += sum of weights (K,) times modes (K, N, 3), in one fixed order."""
    for k in range(len(weights)):
        w = weights[k]
        if w != 0.0:
            for i in range(len(points)):
                points[i, 0] += w * modes[k, i, 0]
                points[i, 1] += w * modes[k, i, 1]
                points[i, 2] += w * modes[k, i, 2]


@kernel
def add_sparse(points, vertices, offsets, weight):
    for j in range(len(vertices)):
        i = vertices[j]
        points[i, 0] += weight * offsets[j, 0]
        points[i, 1] += weight * offsets[j, 1]
        points[i, 2] += weight * offsets[j, 2]
