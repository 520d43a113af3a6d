"""Drawing styles as filters of a finished picture (H, W, 3) uint8: pencil drawing, black and white, oil painting."""

from __future__ import annotations

import numpy as np

from .kernels import kernel


@kernel
def box(gray, radius, out):
    """Box filter: the mean over a square with a side of 2 radius + 1 pixels, edges repeated; rows first, then columns."""
    height, width = gray.shape
    middle = np.empty_like(gray)
    scale = np.float32(1) / np.float32(2 * radius + 1)
    for y in range(height):
        total = np.float32(0)
        for i in range(-radius, radius + 1):
            total += gray[y, min(max(i, 0), width - 1)]
        for x in range(width):
            middle[y, x] = total * scale
            total += gray[y, min(x + radius + 1, width - 1)] - gray[y, max(x - radius, 0)]
    for x in range(width):
        total = np.float32(0)
        for i in range(-radius, radius + 1):
            total += middle[min(max(i, 0), height - 1), x]
        for y in range(height):
            out[y, x] = total * scale
            total += middle[min(y + radius + 1, height - 1), x] - middle[max(y - radius, 0), x]


def gray_of(picture: np.ndarray) -> np.ndarray:
    return (picture[..., 0] * np.float32(0.299) + picture[..., 1] * np.float32(0.587) + picture[..., 2] * np.float32(0.114)).astype(
        np.float32
    )


def pencil(picture: np.ndarray, seed: int) -> np.ndarray:
    """Lines where tones change, hatching where it is dark, on warm paper."""
    gray = gray_of(picture)
    soft, wide = np.empty_like(gray), np.empty_like(gray)
    scale = len(gray) / 128
    box(gray, max(round(2 * scale), 1), soft)
    box(soft, max(round(3 * scale), 1), wide)
    lines = np.clip(1 - np.maximum(wide - gray, 0) / 42, 0.05, 1)
    y, x = np.mgrid[: gray.shape[0], : gray.shape[1]].astype(np.float32) / np.float32(scale)
    jitter = np.random.default_rng([seed, 19]).normal(0, 0.35, gray.shape)
    hatch = 0.5 + 0.5 * np.sin((x + y) * 1.9 + jitter)
    dark = np.clip((150 - soft) / 150, 0, 1)
    tone = 1 - 0.62 * dark * (0.45 + 0.55 * hatch)
    value = np.clip(lines * tone, 0, 1)[..., None]
    paper, lead = np.array([246, 243, 235]), np.array([44, 44, 50])
    return np.round(lead + (paper - lead) * value).astype(np.uint8)


def black_and_white(picture: np.ndarray, seed: int) -> np.ndarray:
    x = gray_of(picture) / 255
    x = x + 0.18 * (x * x * (3 - 2 * x) - x) * 2
    grain = np.random.default_rng([seed, 23]).normal(0, 0.012, x.shape)
    return np.round(np.clip(x + grain, 0, 1) * 255).astype(np.uint8)[..., None].repeat(3, -1)


@kernel
def kuwahara(picture, radius, out):
    """Kuwahara filter: each pixel becomes the mean of the one of its four neighboring quadrants with the least variance."""
    height, width, _ = picture.shape
    mean = np.empty(3, np.float32)
    for y in range(height):
        for x in range(width):
            best = np.float32(1e18)
            for quarter in range(4):
                y0 = y - radius if quarter < 2 else y
                x0 = x - radius if quarter % 2 == 0 else x
                r, g, b, square, count = np.float32(0), np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for v in range(max(y0, 0), min(y0 + radius, height - 1) + 1):
                    for u in range(max(x0, 0), min(x0 + radius, width - 1) + 1):
                        p, q, s = np.float32(picture[v, u, 0]), np.float32(picture[v, u, 1]), np.float32(picture[v, u, 2])
                        r, g, b, count = r + p, g + q, b + s, count + np.float32(1)
                        square += p * p + q * q + s * s
                r, g, b = r / count, g / count, b / count
                spread = square / count - (r * r + g * g + b * b)
                if spread < best:
                    best = spread
                    mean[0], mean[1], mean[2] = r, g, b
            for k in range(3):
                out[y, x, k] = mean[k]


def oil(picture: np.ndarray, seed: int) -> np.ndarray:
    """Flat strokes with more saturated colors and a light canvas grain."""
    flat = np.empty(picture.shape, np.float32)
    kuwahara(picture, max(round(3 * len(picture) / 128), 1), flat)
    gray = flat.mean(-1, keepdims=True)
    grain = np.random.default_rng([seed, 29]).normal(0, 2.2, picture.shape[:2])[..., None]
    return np.round(np.clip(gray + (flat - gray) * 1.15 + grain, 0, 255)).astype(np.uint8)


FILTERS = {"pencil": pencil, "black and white": black_and_white, "oil": oil}


def apply(style: str, picture: np.ndarray, seed: int) -> np.ndarray:
    """A picture in a style of `contexts.STYLES`."""
    return FILTERS[style](picture, seed) if style in FILTERS else picture
