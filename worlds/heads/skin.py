"""The skin's texture, painted once per person: color, lips, brows, stubble, scalp, freckles, moles, wrinkles.

The regions of the face are the same for everybody in the coordinates of the mean head, and computed once per process (`regions`);
a person's texture combines them with noise that is shifted by an offset of that person.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .head import HEIGHT, WIDTH, azimuth, load
from .kernels import kernel

if TYPE_CHECKING:
    from .people import Person

(LIP, LIP_LINE, CHEEK, NOSE, UNDER_EYE, LID, RIM, ALONG_BROW, ACROSS_BROW) = range(9)
(BEARD, MUSTACHE, GOATEE, FOREHEAD, NASOLABIAL, CROW, SCALP, FRECKLE, NOSTRIL) = range(9, 18)
"""Indices of the maps in `regions`."""
HAIRLINE = np.array(
    [
        *[(0, 9.9), (0.4, 10.1), (0.72, 9.6), (0.92, 7.9), (1.08, 5.6), (1.2, 3.6), (1.26, 1.2), (1.42, 1.2), (1.47, 4.4), (1.7, 5.5)],
        *[(1.9, 4.6), (2.05, 1.0), (2.25, -2.5), (2.7, -4.6), (3.1416, -5.2)],
    ]
)
"""Azimuth (radians) and height (cm) of the hairline: over the forehead, down to the ear, around it, to the nape."""
BROW = np.array([(1.15, 5.55), (2.6, 6.12), (4.1, 6.2), (5.75, 5.25)])
NOISE_CELLS = (28.0, 11.0, 5.0, 2.4, 1.3)


def bump(*distances: np.ndarray) -> np.ndarray:
    return np.exp(-sum(np.square(d) for d in distances))


def smooth(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def polyline(points: np.ndarray, line: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For points (..., 2): the distance to a polyline, the position of the nearest point along it (0 to 1), and the distance with a sign
    (positive to the left of the line).
    """
    lengths = np.linalg.norm(np.diff(line, axis=0), axis=1)
    starts = np.concatenate([[0], lengths.cumsum()])
    best, along, across = (np.full(points.shape[:-1], fill) for fill in (np.inf, 0.0, 0.0))
    for k, (a, b) in enumerate(pairwise(line)):
        unit = (b - a) / lengths[k]
        offset = points - a
        t = np.clip(offset @ unit, 0, lengths[k])
        distance = np.linalg.norm(offset - t[..., None] * unit, axis=-1)
        nearer = distance < best
        best = np.where(nearer, distance, best)
        along = np.where(nearer, (starts[k] + t) / starts[-1], along)
        side = unit[0] * offset[..., 1] - unit[1] * offset[..., 0]
        across = np.where(nearer, np.copysign(distance, side), across)
    return best, along, across


def above_hairline(points: np.ndarray) -> np.ndarray:
    """Signed distance (cm) of points (..., 3) of the mean head to the hairline, positive where hair grows."""
    flat = np.stack([azimuth(points) * 8.5, points[..., 1]], -1)
    line = HAIRLINE * [8.5, 1]
    distance, _, _ = polyline(flat, line)
    inside = points[..., 1] > np.interp(flat[..., 0], line[:, 0], line[:, 1])
    return np.where(inside, distance, -distance)


def beard_line(ax: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Approximate signed distance (cm) into the beard's area, positive inside: its upper edge runs from the sideburn over the cheek to the
    corner of the mouth, its lower edge on the neck.
    """
    edge = np.interp(ax, [0, 1.6, 2.6, 4.0, 5.5, 6.8, 7.6, 9], [-4.9, -4.7, -3.4, -3.0, -2.3, -0.8, 1.6, 3.6])
    return np.minimum(np.minimum(edge - y, y + 7.9 + 0.32 * np.maximum(z - 2, 0)), (z - 0.6) * 0.8)


@lru_cache(maxsize=1)
def regions() -> np.ndarray:
    """Maps of the face's regions, (18, HEIGHT, WIDTH) float32: mostly 0 to 1, but distances in cm for RIM, ACROSS_BROW and SCALP."""
    p = load().positions.astype(np.float64)
    x, y, z = np.moveaxis(p, -1, 0)
    ax, front = np.abs(x), z > 4
    maps = np.zeros((NOSTRIL + 1, *x.shape))
    arc = np.clip(1 - np.square(ax / 2.42), 0, 1)
    top = -3.36 + 0.88 * arc**0.75 - 0.16 * bump(ax / 0.33)
    low = -3.36 - 1.22 * arc**0.62
    maps[LIP] = smooth(-0.12, 0.12, np.minimum(top - y, y - low)) * (ax < 2.42) * (z > 8)
    maps[LIP_LINE] = bump((y + 3.36 - 0.015 * ax**2) / 0.10) * (ax < 2.5) * (z > 8)
    maps[CHEEK] = bump((ax - 4.7) / 2.3, (y - 0.3) / 1.9) * front
    maps[NOSE] = bump(x / 1.7, (y - 0.2) / 1.5, (z - 12.6) / 2) + 0.6 * bump((ax - 8.8) / 1.2, (y - 2) / 3) * (z < 2)
    maps[UNDER_EYE] = bump((ax - 3.0) / 1.7, (y - 2.25) / 0.75) * front
    maps[LID] = bump((ax - 3.1) / 1.8, (y - 4.6) / 0.6) * front
    rim = np.full_like(x, 9)
    near = (y > 1.5) & (y < 6) & (z > 6)
    rim[near] = np.linalg.norm(p[near][:, None] - load().rims[None], axis=-1).min(1)
    maps[RIM] = rim
    _, maps[ALONG_BROW], across = polyline(np.stack([ax, y], -1), BROW)
    maps[ACROSS_BROW] = np.where(front & (ax < 7), across, 9)
    edge = beard_line(ax, y, z)
    lip_gap = smooth(-0.35, 0.05, np.minimum(top - y, y - low)) * (ax < 2.5) * (z > 8)
    maps[BEARD] = smooth(-0.3, 0.9, edge) * (1 - lip_gap)
    mustache = smooth(0.75, 0.35, np.abs(y + 2.05 + 0.16 * ax**2 * 0.55)) * smooth(2.9, 2.2, ax) * (z > 8)
    maps[MUSTACHE] = np.maximum(mustache, bump((ax - 2.75) / 0.4, (y + 3.5) / 0.8) * (z > 7)) * (1 - lip_gap)
    maps[GOATEE] = smooth(3.0, 2.2, ax + 0.25 * np.abs(y + 6)) * smooth(-4.75, -5.2, y) * smooth(-9.8, -9.0, y) * (z > 6) * (1 - lip_gap)
    curve = y + 0.06 * ax**2 - 0.15 * np.sin(x * 0.9)
    lines = sum(bump((curve - at) / 0.16) for at in (7.3, 8.1, 8.9))
    maps[FOREHEAD] = lines * smooth(5.0, 3.0, ax) * front + bump((ax - 0.45) / 0.13) * smooth(5.0, 5.5, y) * smooth(6.9, 6.3, y) * front
    fold = ax - (1.75 + 0.38 * (0.4 - y) - 0.02 * (0.4 - y) ** 2)
    maps[NASOLABIAL] = bump(fold / 0.22) * smooth(0.9, 0.0, y) * smooth(-4.6, -2.8, y) * (z > 7)
    maps[CROW] = smooth(0.4, 0.9, np.sin(np.arctan2(y - 3.5, ax - 4.2) * 9)) * bump((ax - 5.9) / 0.8, (y - 3.3) / 1.3) * (z > 3)
    maps[SCALP] = above_hairline(p)
    maps[FRECKLE] = bump((ax - 2.6) / 3.6, (y - 0.8) / 2.0) * front
    maps[NOSTRIL] = bump((ax - 0.75) / 0.42, (y + 0.98) / 0.22) * (z > 10)
    return maps.astype(np.float32)


@lru_cache(maxsize=1)
def busy() -> np.ndarray:
    """Texels with more than bare skin or the scalp's hair, (HEIGHT, WIDTH) bool: `paint` takes a shortcut for all others."""
    maps = regions()
    found = (maps[RIM] < 0.4) | (np.abs(maps[ACROSS_BROW]) < 1.3)
    for region in set(range(len(maps))) - {RIM, ALONG_BROW, ACROSS_BROW, SCALP}:
        found |= maps[region] > 0.02
    return found


@lru_cache(maxsize=1)
def noises() -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise at five scales (5, 2 HEIGHT, 2 WIDTH), with zero mean and unit standard deviation; and a map of freckles, 0 to 1."""
    from scipy.ndimage import gaussian_filter

    generator = np.random.default_rng(20)
    shape = (2 * HEIGHT, 2 * WIDTH)
    layers = []
    for cell in NOISE_CELLS:
        layer = gaussian_filter(generator.standard_normal(shape), cell / 2.2, mode="wrap")
        layers.append(layer / layer.std())
    spots = np.zeros(shape)
    count = shape[0] * shape[1] // 60
    spots[generator.integers(0, shape[0], count), generator.integers(0, shape[1], count)] = generator.uniform(0.2, 1, count)
    spots = gaussian_filter(spots, 1.1, mode="wrap") * 7
    return np.stack(layers).astype(np.float32), np.minimum(spots, 1).astype(np.float32)


FLUSHED = np.array([0.05, -0.20, -0.19], np.float32)
"""Relative change of each skin channel by a blush; the next three are relative reductions by tiredness, wrinkles and spots."""
TIRED = np.array([0.12, 0.22, 0.17], np.float32)
WRINKLED = np.array([0.30, 0.38, 0.38], np.float32)
SPOTTED = np.array([0.28, 0.45, 0.52], np.float32)


@kernel
def step(low, high, x):
    t = min(max((x - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


@kernel
def brow_cover(along, across, brow, arch, density, grain):
    """A brow's coverage of a point, 0 to `density`; brows are wide at the nose and narrow at the temple."""
    offset = across - arch * 1.2 * along * (1 - along)
    width = brow * (1.05 - 0.75 * along * along) * step(-0.05, 0.12, along)
    return step(width * 1.25, width * 0.3, abs(offset) + grain) * density


@kernel
def receded(azimuth, front, temples):
    """How far the hairline recedes (cm) at an azimuth from 0 (front) to 1 (back)."""
    return front * step(0.42, 0.2, azimuth) + temples * step(0.1, 0.3, azimuth) * step(0.55, 0.4, azimuth)


@kernel
def paint(maps, busy, noise, spots, corner, values, colors, out):
    """Writes the texture (HEIGHT, WIDTH, 4) float32: linear color and hair coverage. `values` and `colors` are built in `texture`."""
    blush, lips, freckles, age, brow, arch, stubble, mustache, goatee, cover, front, temples, ruddy, makeup, density = values
    skin, hair, lip_color, brow_color = colors[0], colors[1], colors[2], colors[3]
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            i, j = corner[0] + r, corner[1] + c
            n0, n1, n2, n3, n4 = noise[0, i, j], noise[1, i, j], noise[2, i, j], noise[3, i, j], noise[4, i, j]
            shade = 1 + 0.030 * n1 + 0.018 * n2 + (0.02 + 0.015 * age) * n3
            flush = ruddy * (n0 * 0.35 + n2 * 0.25)
            azimuth = abs(2.0 * c / out.shape[1] - 1)
            height = maps[SCALP, r, c]
            grown = 0.0
            if height > -2.6:
                height -= receded(azimuth, front, temples)
                grown = cover * step(-0.35, 0.75, height + 0.16 * n3 + 0.14 * n4 + 0.12 * n1)
            weave = 1 + 0.12 * n3 + 0.10 * n4
            if not busy[r, c]:
                for k in range(3):
                    value = skin[k] * shade * (1 + FLUSHED[k] * flush)
                    out[r, c, k] = max(value + (hair[k] * weave - value) * grown, 0.0)
                out[r, c, 3] = grown
                continue
            flush += blush * (maps[CHEEK, r, c] + 0.8 * maps[NOSE, r, c])
            tired = maps[UNDER_EYE, r, c] * (0.25 + 0.55 * age) + maps[LID, r, c] * (0.25 + makeup * 0.8)
            wrinkles = age * (maps[FOREHEAD, r, c] * 0.6 + maps[NASOLABIAL, r, c] * 0.8 + maps[CROW, r, c] * 0.7)
            wrinkles = wrinkles * (1 + 0.35 * n2) + maps[NASOLABIAL, r, c] * 0.12
            spot = min(freckles * maps[FRECKLE, r, c] * spots[i, j] + age * age * 0.35 * step(1.3, 2.2, n2), 1.0)
            lip = maps[LIP, r, c] * (0.75 + 0.1 * lips)
            dim = (1 - 0.55 * maps[LIP_LINE, r, c]) * (1 - 0.7 * maps[NOSTRIL, r, c])
            dim *= 1 - (0.35 + 0.45 * makeup) * step(0.32, 0.05, maps[RIM, r, c])
            brows = brow_cover(maps[ALONG_BROW, r, c], maps[ACROSS_BROW, r, c], brow, arch, density, 0.03 * n3 + 0.025 * n4)
            chin = max(maps[BEARD, r, c] * stubble, maps[MUSTACHE, r, c] * mustache, maps[GOATEE, r, c] * goatee)
            grown = max(step(0.0, 1.0, chin * (1.25 + 0.10 * n3 + 0.07 * n4)), grown)
            for k in range(3):
                value = skin[k] * shade * (1 + FLUSHED[k] * flush) * (1 - TIRED[k] * tired) * (1 - WRINKLED[k] * wrinkles)
                value *= 1 - SPOTTED[k] * spot
                value = (value + (lip_color[k] * (1 + 0.05 * n3) - value) * lip) * dim
                value += (brow_color[k] - value) * brows
                out[r, c, k] = max(value + (hair[k] * weave - value) * grown, 0.0)
            out[r, c, 3] = max(grown, brows)


@kernel
def speck(positions, x, y, radius, color, out):
    """Paints a mole of a radius (cm) at a point (x, y) of the mean head's face."""
    for r in range(out.shape[0]):
        if abs(positions[r, out.shape[1] // 2, 1] - y) > 3:
            continue
        for c in range(out.shape[1]):
            dx, dy = positions[r, c, 0] - x, positions[r, c, 1] - y
            d = dx * dx + dy * dy
            if d < 4 * radius * radius and positions[r, c, 2] > 3:
                mark = min(max(1.6 - np.sqrt(d) / radius, 0.0), 1.0) * 0.85
                for k in range(3):
                    out[r, c, k] += mark * (color[k] - out[r, c, k])


def texture(person: Person) -> np.ndarray:
    """The texture of the person's skin, (HEIGHT, WIDTH, 4) float32: linear color and hair coverage."""
    noise, spots = noises()
    marks = [person.blush, person.lips, person.freckles, person.wrinkles, person.brow, person.brow_arch]
    grown = [*person.beard_cover, person.scalp_cover, person.hairline, person.temples]
    values = np.array([*marks, *grown, person.ruddy, person.makeup, person.brow_density], np.float32)
    colors = np.array([person.skin, person.hair_color, person.lip_color, person.brow_color], np.float32)
    out = np.empty((HEIGHT, WIDTH, 4), np.float32)
    paint(regions(), busy(), noise, spots, np.array(person.noise, np.int64), tuple(values), colors, out)
    for x, y, radius in person.moles:
        speck(load().positions, x, y, radius, (person.skin * [0.30, 0.20, 0.17]).astype(np.float32), out)
    return out
