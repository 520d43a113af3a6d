"""Skin as a texture, painted once a person: color, lips, brows, stubble, scalp, freckles, moles, wrinkles.

Where things are on a face is the same for everybody, in the coordinates of the mean head, and computed once a process (`regions`); a person's own
texture mixes them with noise that is shifted by the person's own offset.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from .head import HEIGHT, WIDTH, azimuth, load

if TYPE_CHECKING:
    from .people import Person

REGIONS = (
    "lip lip_line cheek nose under_eye lid rim along_brow across_brow beard mustache goatee forehead nasolabial crow scalp freckle nostril".split()
)
HAIRLINE = np.array(
    [(0, 9.9), (0.4, 10.1), (0.72, 9.6), (0.92, 7.9), (1.08, 5.6), (1.2, 3.6), (1.26, 1.2), (1.42, 1.2), (1.47, 4.4), (1.7, 5.5)]
    + [(1.9, 4.6), (2.05, 1.0), (2.25, -2.5), (2.7, -4.6), (3.1416, -5.2)]
)
"""Azimuth and height of where hair begins: over the forehead, down to the ear, around it, to the nape."""
BROW = np.array([(1.15, 5.55), (2.6, 6.12), (4.1, 6.2), (5.75, 5.25)])
NOISE_CELLS = (28.0, 11.0, 5.0, 2.4, 1.3)


def bump(*distances: np.ndarray) -> np.ndarray:
    return np.exp(-sum(np.square(d) for d in distances))


def smooth(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def polyline(points: np.ndarray, line: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For points (..., 2): the distance to a polyline, how far along it (0 to 1) that is, and the signed offset across it (left is positive)."""
    lengths = np.linalg.norm(np.diff(line, axis=0), axis=1)
    starts = np.concatenate([[0], lengths.cumsum()])
    best, along, across = (np.full(points.shape[:-1], fill) for fill in (np.inf, 0.0, 0.0))
    for k, (a, b) in enumerate(zip(line[:-1], line[1:], strict=True)):
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
    """Signed distance-like height below a beard's upper edge: from the sideburn over the cheek to the corner of the mouth, ending on the neck."""
    edge = np.interp(ax, [0, 1.6, 2.6, 4.0, 5.5, 6.8, 7.6, 9], [-4.9, -4.7, -3.4, -3.0, -2.3, -0.8, 1.6, 3.6])
    return np.minimum(np.minimum(edge - y, y + 7.9 + 0.32 * np.maximum(z - 2, 0)), (z - 0.6) * 0.8)


@lru_cache(maxsize=1)
def regions() -> np.ndarray:
    """(regions, HEIGHT, WIDTH) float32, in the order of `REGIONS`."""
    p = load().positions.astype(np.float64)
    x, y, z = np.moveaxis(p, -1, 0)
    ax, front = np.abs(x), z > 4
    maps = dict.fromkeys(REGIONS, np.zeros_like(x))
    arc = np.clip(1 - np.square(ax / 2.42), 0, 1)
    top = -3.36 + 0.88 * arc**0.75 - 0.16 * bump(ax / 0.33)
    low = -3.36 - 1.22 * arc**0.62
    maps["lip"] = smooth(-0.12, 0.12, np.minimum(top - y, y - low)) * (ax < 2.42) * (z > 8)
    maps["lip_line"] = bump((y + 3.36 - 0.015 * ax**2) / 0.10) * (ax < 2.5) * (z > 8)
    maps["cheek"] = bump((ax - 4.7) / 2.3, (y - 0.3) / 1.9) * front
    maps["nose"] = bump(x / 1.7, (y - 0.2) / 1.5, (z - 12.6) / 2) + 0.6 * bump((ax - 8.8) / 1.2, (y - 2) / 3) * (z < 2)
    maps["under_eye"] = bump((ax - 3.0) / 1.7, (y - 2.25) / 0.75) * front
    maps["lid"] = bump((ax - 3.1) / 1.8, (y - 4.6) / 0.6) * front
    rim = np.full_like(x, 9)
    near = (y > 1.5) & (y < 6) & (z > 6)
    rim[near] = np.linalg.norm(p[near][:, None] - load().rims[None], axis=-1).min(1)
    maps["rim"] = rim
    _, maps["along_brow"], across = polyline(np.stack([ax, y], -1), BROW)
    maps["across_brow"] = np.where(front & (ax < 7), across, 9)
    edge = beard_line(ax, y, z)
    lip_gap = smooth(-0.35, 0.05, np.minimum(top - y, y - low)) * (ax < 2.5) * (z > 8)
    maps["beard"] = smooth(-0.3, 0.9, edge) * (1 - lip_gap)
    mustache = smooth(0.75, 0.35, np.abs(y + 2.05 + 0.16 * ax**2 * 0.55)) * smooth(2.9, 2.2, ax) * (z > 8)
    maps["mustache"] = np.maximum(mustache, bump((ax - 2.75) / 0.4, (y + 3.5) / 0.8) * (z > 7)) * (1 - lip_gap)
    maps["goatee"] = smooth(3.0, 2.2, ax + 0.25 * np.abs(y + 6)) * smooth(-4.75, -5.2, y) * smooth(-9.8, -9.0, y) * (z > 6) * (1 - lip_gap)
    curve = y + 0.06 * ax**2 - 0.15 * np.sin(x * 0.9)
    lines = sum(bump((curve - at) / 0.16) for at in (7.3, 8.1, 8.9))
    maps["forehead"] = lines * smooth(5.0, 3.0, ax) * front + bump((ax - 0.45) / 0.13) * smooth(5.0, 5.5, y) * smooth(6.9, 6.3, y) * front
    fold = ax - (1.75 + 0.38 * (0.4 - y) - 0.02 * (0.4 - y) ** 2)
    maps["nasolabial"] = bump(fold / 0.22) * smooth(0.9, 0.0, y) * smooth(-4.6, -2.8, y) * (z > 7)
    maps["crow"] = smooth(0.4, 0.9, np.sin(np.arctan2(y - 3.5, ax - 4.2) * 9)) * bump((ax - 5.9) / 0.8, (y - 3.3) / 1.3) * (z > 3)
    maps["scalp"] = above_hairline(p)
    maps["freckle"] = bump((ax - 2.6) / 3.6, (y - 0.8) / 2.0) * front
    maps["nostril"] = bump((ax - 0.75) / 0.42, (y + 0.98) / 0.22) * (z > 10)
    return np.stack([maps[name] for name in REGIONS]).astype(np.float32)


@lru_cache(maxsize=1)
def busy() -> np.ndarray:
    """Where more than bare skin or the scalp's hair is painted, (HEIGHT, WIDTH)."""
    maps = dict(zip(REGIONS, regions(), strict=True))
    found = (maps["rim"] < 0.4) | (np.abs(maps["across_brow"]) < 1.3)
    for name in set(REGIONS) - {"rim", "across_brow", "along_brow", "scalp"}:
        found |= maps[name] > 0.02
    return found


@lru_cache(maxsize=1)
def noises() -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise of several grain sizes (5, 2 HEIGHT, 2 WIDTH), zero mean, unit deviation; and a field of freckles, 0 to 1."""
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


ONE = np.float32(1)


@njit(cache=True)
def step(low, high, x):
    t = min(max((x - low) / (high - low), np.float32(0)), np.float32(1))
    return t * t * (np.float32(3) - np.float32(2) * t)


@njit(cache=True)
def paint(maps, busy, noise, spots, corner, values, colors, out):
    """The texture (HEIGHT, WIDTH, 4) float32: linear color, and how much of it is hair. `values` and `colors` are those of `texture`."""
    blush, lips, freckles, age, brow, arch, stubble, mustache, goatee, cover, front, temples, ruddy, makeup, density = values
    skin, hair, lip_color, brow_color = colors[0], colors[1], colors[2], colors[3]
    dark = np.float32(1) - min(max(skin[0] * np.float32(2.2), np.float32(0)), np.float32(1))
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            i, j = corner[0] + r, corner[1] + c
            n0, n1, n2, n3, n4 = noise[0, i, j], noise[1, i, j], noise[2, i, j], noise[3, i, j], noise[4, i, j]
            shade = np.float32(1) + np.float32(0.030) * n1 + np.float32(0.018) * n2 + np.float32(0.02 + 0.015 * age) * n3
            if not busy[r, c] and maps[15, r, c] < np.float32(-2.6):
                flush = ruddy * (n0 * np.float32(0.35) + n2 * np.float32(0.25))
                out[r, c, 0], out[r, c, 1] = skin[0] * shade * (ONE + np.float32(0.05) * flush), skin[1] * shade * (ONE - np.float32(0.20) * flush)
                out[r, c, 2], out[r, c, 3] = skin[2] * shade * (ONE - np.float32(0.19) * flush), np.float32(0)
                continue
            if not busy[r, c] and cover * step(np.float32(-0.2), np.float32(0.9), maps[15, r, c] - front - temples - np.float32(1.6)) == cover:
                weave = cover * (ONE + np.float32(0.12) * n3 + np.float32(0.10) * n4)
                for k in range(3):
                    out[r, c, k] = max(skin[k] * shade * (ONE - cover) + hair[k] * weave, np.float32(0))
                out[r, c, 3] = cover
                continue
            flush = blush * (maps[2, r, c] + np.float32(0.8) * maps[3, r, c]) + ruddy * (n0 * np.float32(0.35) + n2 * np.float32(0.25))
            tired = maps[4, r, c] * (np.float32(0.25) + np.float32(0.55) * age) + maps[5, r, c] * (np.float32(0.25) + makeup * np.float32(0.8))
            wrinkles = age * (maps[12, r, c] * np.float32(0.6) + maps[13, r, c] * np.float32(0.8) + maps[14, r, c] * np.float32(0.7))
            wrinkles = wrinkles * (np.float32(1) + np.float32(0.35) * n2) + maps[13, r, c] * np.float32(0.12)
            spot = freckles * maps[16, r, c] * spots[i, j]
            spot = min(spot + age * age * np.float32(0.35) * step(np.float32(1.3), np.float32(2.2), n2), np.float32(1))
            red = skin[0] * shade * (1 + np.float32(0.05) * flush) * (ONE - np.float32(0.12) * tired) * (ONE - np.float32(0.30) * wrinkles) * (ONE - np.float32(0.28) * spot)
            green = skin[1] * shade * (ONE - np.float32(0.20) * flush) * (ONE - np.float32(0.22) * tired) * (ONE - np.float32(0.38) * wrinkles) * (ONE - np.float32(0.45) * spot)
            blue = skin[2] * shade * (ONE - np.float32(0.19) * flush) * (ONE - np.float32(0.17) * tired) * (ONE - np.float32(0.38) * wrinkles) * (ONE - np.float32(0.52) * spot)
            lip = maps[0, r, c] * (np.float32(0.75) + np.float32(0.1) * lips)
            tone = np.float32(1) + np.float32(0.05) * n3
            red, green, blue = red + (lip_color[0] * tone - red) * lip, green + (lip_color[1] * tone - green) * lip, blue + (lip_color[2] * tone - blue) * lip
            dim = (ONE - np.float32(0.55) * maps[1, r, c]) * (ONE - np.float32(0.7) * maps[17, r, c])
            dim *= 1 - (np.float32(0.35) + np.float32(0.45) * makeup) * step(np.float32(0.32), np.float32(0.05), maps[6, r, c])
            red, green, blue = red * dim, green * dim, blue * dim
            # hair of all kinds: brows, beard, scalp
            s, d = maps[7, r, c], maps[8, r, c] - arch * np.float32(1.2) * maps[7, r, c] * (ONE - maps[7, r, c])
            width = brow * (np.float32(1.05) - np.float32(0.75) * s * s) * step(np.float32(-0.05), np.float32(0.12), s)
            brows = step(width * np.float32(1.25), width * np.float32(0.3), abs(d) + np.float32(0.03) * n3 + np.float32(0.025) * n4) * density
            chin = max(maps[9, r, c] * stubble, max(maps[10, r, c] * mustache, maps[11, r, c] * goatee))
            chin = step(np.float32(0.0), np.float32(1.0), chin * (np.float32(1.25) + np.float32(0.10) * n3 + np.float32(0.07) * n4))
            height = maps[15, r, c]
            azimuth = abs(np.float32(2 * c) / np.float32(out.shape[1]) - np.float32(1))
            height -= front * step(np.float32(0.42), np.float32(0.2), azimuth) + temples * step(np.float32(0.1), np.float32(0.3), azimuth) * step(np.float32(0.55), np.float32(0.4), azimuth)
            scalp = cover * step(np.float32(-0.35), np.float32(0.75), height + np.float32(0.16) * n3 + np.float32(0.14) * n4 + np.float32(0.12) * n1)
            weave = np.float32(1) + np.float32(0.12) * n3 + np.float32(0.10) * n4
            brows = min(max(brows * (ONE - dark * np.float32(0.1)), np.float32(0)), np.float32(1))
            red, green, blue = red + (brow_color[0] - red) * brows, green + (brow_color[1] - green) * brows, blue + (brow_color[2] - blue) * brows
            grown = max(chin, scalp)
            red, green, blue = red + (hair[0] * weave - red) * grown, green + (hair[1] * weave - green) * grown, blue + (hair[2] * weave - blue) * grown
            out[r, c, 0], out[r, c, 1], out[r, c, 2] = max(red, np.float32(0)), max(green, np.float32(0)), max(blue, np.float32(0))
            out[r, c, 3] = max(grown, brows)


@njit(cache=True)
def speck(positions, x, y, radius, color, out):
    """A mole of a radius (cm) at a place of the mean head's face."""
    for r in range(out.shape[0]):
        if abs(positions[r, out.shape[1] // 2, 1] - y) > np.float32(3):
            continue
        for c in range(out.shape[1]):
            dx, dy = positions[r, c, 0] - x, positions[r, c, 1] - y
            d = dx * dx + dy * dy
            if d < np.float32(4) * radius * radius and positions[r, c, 2] > np.float32(3):
                mark = min(max(np.float32(1.6) - np.sqrt(d) / radius, np.float32(0)), ONE) * np.float32(0.85)
                for k in range(3):
                    out[r, c, k] += mark * (color[k] - out[r, c, k])


def texture(person: Person) -> np.ndarray:
    """The person's skin, (HEIGHT, WIDTH, 4) float32: linear color, and how much of it is hair."""
    noise, spots = noises()
    values = np.array(
        [person.blush, person.lips, person.freckles, person.wrinkles, person.brow, person.brow_arch, *person.beard_cover, person.scalp_cover]
        + [person.hairline, person.temples, person.ruddy, person.makeup, person.brow_density],
        np.float32,
    )
    colors = np.array([person.skin, person.hair_color, person.lip_color, person.brow_color], np.float32)
    out = np.empty((HEIGHT, WIDTH, 4), np.float32)
    paint(regions(), busy(), noise, spots, np.array(person.noise, np.int64), tuple(values), colors, out)
    for x, y, radius in person.moles:
        speck(load().positions, np.float32(x), np.float32(y), np.float32(radius), (person.skin * [0.30, 0.20, 0.17]).astype(np.float32), out)
    return out
