"""Backgrounds, out of focus: plain, a gradient, or a simple scene. Colors are linear, so that blurring mixes light as a camera does."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .contexts import Context
from .kernels import kernel
from .people import linear

GRID = 48
"""Side of the grid on which scenes are painted before enlargement: a background out of focus has no finer detail."""


@kernel
def enlarge(small, out):
    """Bilinear enlargement of (h, w, 3) to (H, W, 3)."""
    height, width, _ = out.shape
    h, w, _ = small.shape
    for y in range(height):
        v = min(
            max((np.float32(y) + np.float32(0.5)) * np.float32(h) / np.float32(height) - np.float32(0.5), np.float32(0)),
            np.float32(h) - np.float32(1.001),
        )
        r = int(v)
        fv = v - np.float32(r)
        for x in range(width):
            u = min(
                max((np.float32(x) + np.float32(0.5)) * np.float32(w) / np.float32(width) - np.float32(0.5), np.float32(0)),
                np.float32(w) - np.float32(1.001),
            )
            c = int(u)
            fu = u - np.float32(c)
            for k in range(3):
                low = small[r, c, k] + (small[r, c + 1, k] - small[r, c, k]) * fu
                high = small[r + 1, c, k] + (small[r + 1, c + 1, k] - small[r + 1, c, k]) * fu
                out[y, x, k] = low + (high - low) * fv


@lru_cache(maxsize=1)
def axes() -> tuple[np.ndarray, np.ndarray]:
    """Horizontal and vertical coordinates from 0 (left, top) to 1, (GRID, GRID, 1) each."""
    t = (np.arange(GRID) + 0.5) / GRID
    down, across = np.meshgrid(t, t, indexing="ij")
    return across[..., None], down[..., None]


def color(r: int, g: int, b: int) -> np.ndarray:
    return linear(np.array([r, g, b]))


def spots(
    g: np.random.Generator, count: int, size: tuple[float, float], low: float = 0.0, high: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Soft discs: the coverage of each, (count, GRID, GRID, 1), and a random number from 0 to 1 for each, (count,)."""
    across, down = axes()
    x, y, radius = g.uniform(0, 1, count), g.uniform(low, high, count), g.uniform(*size, count)
    distance = np.sqrt((across[None, ..., 0] - x[:, None, None]) ** 2 + (down[None, ..., 0] - y[:, None, None]) ** 2)
    return np.clip((radius[:, None, None] - distance) * GRID * 0.7 + 0.5, 0, 1)[..., None], g.random(count)


def blend(base: np.ndarray, covers: np.ndarray, colors: np.ndarray, opacity: float) -> np.ndarray:
    for cover, tint in zip(covers, colors, strict=True):
        base = base + (tint - base) * cover * opacity
    return base


def edge(at: np.ndarray | float, softness: float) -> np.ndarray:
    """A soft horizontal edge, (GRID, GRID, 1): 0 above the height `at`, 1 below it."""
    return np.clip((axes()[1] - at) / softness + 0.5, 0, 1)


def outdoors(name: str, g: np.random.Generator) -> np.ndarray:
    across, down = axes()
    if name == "forest":
        base = color(150, 176, 120) + (color(40, 64, 34) - color(150, 176, 120)) * down
        covers, numbers = spots(g, 40, (0.03, 0.13))
        base = blend(base, covers, color(34, 66, 28) + numbers[:, None] * (color(150, 180, 84) - color(34, 66, 28)), 0.5)
        for x in g.uniform(0, 1, 5):
            base = base + (color(54, 42, 32) - base) * np.clip(1.3 - np.abs(across - x) / g.uniform(0.015, 0.04), 0, 1) * 0.75
        return base
    if name == "beach":
        sky = color(104, 164, 222) + (color(206, 226, 238) - color(104, 164, 222)) * np.minimum(down / 0.5, 1)
        base = sky + (color(40, 128, 156) - sky) * edge(g.uniform(0.44, 0.52), 0.03)
        return base + (color(222, 200, 158) - base) * edge(g.uniform(0.64, 0.74) + 0.03 * np.sin(across * 5), 0.05)
    if name == "snow":
        sky = color(168, 186, 208) + (color(226, 232, 240) - color(168, 186, 208)) * down
        covers, _ = spots(g, 9, (0.06, 0.16), 0.45, 0.6)
        base = blend(sky, covers, np.tile(color(88, 110, 116), (9, 1)), 0.6)
        base = base + (color(236, 240, 246) - base) * edge(0.62 + 0.03 * np.sin(across * 7 + g.uniform(0, 6)), 0.06)
        covers, _ = spots(g, 45, (0.008, 0.024))
        return blend(base, covers, np.tile(color(250, 252, 255), (45, 1)), 0.8)
    if name == "sunset":
        height = g.uniform(0.62, 0.75)
        base = color(70, 62, 120) + (color(246, 142, 70) - color(70, 62, 120)) * np.minimum(down / height, 1) ** 1.4
        sun = np.exp(-((across - g.uniform(0.15, 0.85)) ** 2 + (down - height + 0.1) ** 2) / 0.012)
        base = base + sun * (color(255, 226, 150) - base)
        return base + (color(58, 40, 52) - base) * edge(height + 0.02 * np.sin(across * 9), 0.03)
    covers, numbers = spots(g, 60, (0.025, 0.075), 0.1, 1.1)  # flowers
    base = color(120, 160, 92) + (color(58, 96, 48) - color(120, 160, 92)) * down
    petals = np.array([color(*c) for c in ((236, 92, 130), (244, 190, 64), (240, 236, 230), (168, 98, 190), (226, 70, 60))])
    return blend(base, covers, petals[(numbers * len(petals)).astype(int)], 0.85)


def indoors(name: str, g: np.random.Generator) -> np.ndarray:
    across, down = axes()
    if name == "room":
        wall = linear(g.uniform([150, 140, 125], [226, 216, 206]))
        base = wall * (1.05 - 0.3 * down)
        left = g.uniform(0.02, 0.62)
        window = np.clip((0.16 - np.abs(across - left - 0.16)) * 30, 0, 1) * np.clip((0.22 - np.abs(down - 0.32)) * 30, 0, 1)
        base = base + (color(232, 240, 250) * 1.2 - base) * window
        base = base + (wall * 0.5 - base) * window * np.clip(1 - np.abs(across - left - 0.16) * 60, 0, 1)
        return base + (color(112, 84, 62) - base) * edge(0.86, 0.03)
    base = np.broadcast_to(color(84, 58, 38), (GRID, GRID, 3)).copy()  # library
    column = (np.arange(GRID) * 0.75).astype(int)
    for shelf in range(6):
        rows = slice(shelf * 8 + 1, shelf * 8 + 7)
        tints = linear(g.uniform([60, 30, 25], [190, 150, 120], (GRID, 3)))
        base[rows] = tints[column][None]
    return (base + np.roll(base, 1, 1) + np.roll(base, 1, 0) + np.roll(base, -1, 0)) / 4 * 0.75


def dark(name: str, g: np.random.Generator) -> np.ndarray:
    _, down = axes()
    if name == "city at night":
        base = color(14, 18, 38) + (color(44, 36, 52) - color(14, 18, 38)) * down
        covers, numbers = spots(g, 36, (0.02, 0.06), 0.15, 1.0)
        lamps = np.array([color(*c) for c in ((255, 190, 96), (255, 226, 170), (235, 84, 70), (96, 150, 240), (120, 220, 190))])
        return blend(base, covers, lamps[(numbers * len(lamps)).astype(int)] * 0.8, 0.6)
    base = color(8, 10, 30) + (color(32, 30, 70) - color(8, 10, 30)) * down  # starry sky
    stars = np.zeros((GRID, GRID, 1))
    stars[g.integers(0, GRID, 45), g.integers(0, GRID, 45), 0] = g.uniform(0.05, 0.8, 45) ** 1.5
    return base + stars * np.array([0.9, 0.95, 1.0])


@lru_cache(maxsize=64)
def painted(name: str, tint: tuple[int, int, int], seed: int) -> np.ndarray:
    across, down = axes()
    g = np.random.default_rng([seed, 17])
    if name == "plain":
        base = linear(np.array(tint)) * (1.06 - 0.22 * ((across - 0.5) ** 2 + (down - 0.4) ** 2))
    elif name == "gradient":
        other = linear(g.uniform(40, 226, 3))
        angle = g.uniform(0, 2 * np.pi)
        t = np.clip(0.5 + (across - 0.5) * np.cos(angle) + (down - 0.5) * np.sin(angle), 0, 1)
        base = linear(np.array(tint)) * (1 - t) + other * t
    elif name in ("room", "library"):
        base = indoors(name, g)
    elif name in ("city at night", "starry sky"):
        base = dark(name, g)
    else:
        base = outdoors(name, g)
    return np.ascontiguousarray(np.broadcast_to(base, (GRID, GRID, 3)), np.float32)


EXPOSURE = {"night": 0.22, "lamp": 0.5, "backlight": 1.25}


def background(context: Context, size: int) -> np.ndarray:
    """A context's background, (size, size, 3) float32, linear; darker in dark light."""
    small = painted(context.background, context.background_color, context.seed)
    if context.background not in ("city at night", "starry sky"):
        small = small * np.float32(EXPOSURE.get(context.light, 1.0))
    out = np.empty((size, size, 3), np.float32)
    enlarge(small, out)
    return out
