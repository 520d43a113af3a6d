"""Shading of every pixel after rasterization: soft wrapped diffuse light, a soft highlight, sky and ground light, a shadow map."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .kernels import kernel

SKIN, MOUTH, TEETH, TONGUE, EYE, LASH, HAIR, CLOTH, GLOSS = range(9)
"""Materials; the first six are also the parts of the head."""
LEVELS = 8192  # Steps per unit of linear light in the table of `film`.
KEY, KEY_COLOR, FILL, FILL_COLOR, SKY, GROUND = range(6)
"""Rows of the array of lights."""
SCATTER = np.array([1.0, 0.45, 0.30], np.float32)
"""Factors of `wrap` by channel: red light scatters farther under the skin than blue light does."""
LEAK = np.array([0.25, 0.0, 0.0], np.float32)
"""Part of the key light that reaches into cast shadows per unit of `wrap`, by channel."""


@kernel
def texel(texture, u, v, out):
    """Bilinear lookup in a texture (H, W, 4)."""
    height, width, _ = texture.shape
    u, v = min(max(u - 0.5, 0.0), width - 1.001), min(max(v - 0.5, 0.0), height - 1.001)
    c, r = int(u), int(v)
    fu, fv = u - c, v - r
    a, b, d = (1 - fu) * (1 - fv), fu * (1 - fv), (1 - fu) * fv
    e = fu * fv
    for k in range(4):
        out[k] = a * texture[r, c, k] + b * texture[r, c + 1, k] + d * texture[r + 1, c, k] + e * texture[r + 1, c + 1, k]


@kernel
def lit(shadow, column, row, z):
    """The part of the key light that arrives, 0 to 1: a weighted mean of nine shadow map comparisons, which changes smoothly."""
    size = shadow.shape[0]
    column, row = column - 1.0, row - 1.0
    c, r = int(np.floor(column)), int(np.floor(row))
    if c < 0 or r < 0 or c + 3 > size or r + 3 > size:
        return 1.0
    fu, fv = column - c, row - r
    near = 1.0 - z * 4.0  # comparisons are soft over a depth difference of 0.25 cm
    total = 0.0
    for j in range(3):
        line = (1.0 - fu) * min(max(shadow[r + j, c] * 4.0 + near, 0.0), 1.0) + min(max(shadow[r + j, c + 1] * 4.0 + near, 0.0), 1.0)
        line += fu * min(max(shadow[r + j, c + 2] * 4.0 + near, 0.0), 1.0)
        total += line * (1.0 - fv if j == 0 else fv if j == 2 else 1.0)
    return total * 0.25


@kernel
def step(low, high, x):
    t = min(max((x - low) / (high - low), 0), 1)
    return t * t * (3 - 2 * t)


@kernel
def eye_color(dx, dy, iris, out):
    """The color of sclera, iris or pupil at an offset (cm) from the pupil's center."""
    d = np.sqrt(dx * dx + dy * dy)
    shade = 1 - 0.25 * step(0.7, 1.4, abs(dx))
    red, green, blue = 0.70 * shade, 0.655 * shade, 0.63 * shade
    ray = np.sin(np.arctan2(dy, dx) * 17) * 0.12 + 1
    tone = ray * (1.35 - 0.75 * step(0.48, 0.72, d)) * (1 - 0.25 * dy)
    w = step(0.78, 0.66, d)
    red, green, blue = red + (iris[0] * tone - red) * w, green + (iris[1] * tone - green) * w, blue + (iris[2] * tone - blue) * w
    w = 1 - 0.96 * step(0.34, 0.25, d)
    out[0], out[1], out[2] = red * w, green * w, blue * w


@kernel
def blend(values, a, b, c, wb, wc, k):
    """Interpolates column `k` of per-vertex values between a triangle's corners."""
    return values[a, k] + wb * (values[b, k] - values[a, k]) + wc * (values[c, k] - values[a, k])


@kernel
def surface(material, u, v, texture, iris, gloss, color):
    """Changes `color` where the material has a texture; returns wrap, highlight strength and exponent, sheen, hidden part of the sky."""
    if material == SKIN:
        texel(texture, u, v, color)
        bare = 1.0 - color[3]
        return 0.30 * bare, 0.085 * gloss * (0.2 + 0.8 * bare), 16.0, 0.05 * bare, 0.0
    if material == EYE:
        eye_color(u, v, iris, color)
        return 0.0, 0.9, 120.0, 0.0, 0.6 * step(0.15, 0.75, v)
    if material == TEETH:
        tint = 1.0 - 0.22 * step(0.42, 0.5, abs(u - np.floor(u) - 0.5))
        for k in range(3):
            color[k] *= tint
        return 0.0, 0.2, 40.0, 0.0, 0.0
    if material == HAIR:
        strand = 1.0 + 0.16 * np.sin(u * 17.0) + 0.14 * np.sin(u * 41.0 + 1.0)
        for k in range(3):
            color[k] *= strand
        return 0.0, 0.0, 1.0, 0.0, 0.0
    if material in (MOUTH, TONGUE):
        return 0.0, 0.15, 30.0, 0.0, 0.0
    if material == GLOSS:
        return 0.0, 0.6, 60.0, 0.0, 0.0
    return 0.0, 0.04, 12.0, 0.0, 0.0


@kernel
def hair_light(along, nk, gloss):
    """Highlight and glow of hair by the Kajiya-Kay model; `along` is the cosine between tangent and half vector."""
    across = max(1.0 - along * along, 0.0)
    return (across**12 * 0.045 * max(nk + 0.3, 0.0) + across**60 * 0.04) * gloss, across**5 * 0.8 * max(nk + 0.2, 0.0)


@kernel
def shade(owner, weights, triangles, materials, normals, tangents, colors, uv, texture, iris, lights, shadow, shadow_points, gloss, out):
    """Writes linear color and coverage (H, W, 4). `colors` (N, 4): color and openness; `shadow_points` (N, 3): points in the shadow map."""
    height, width = owner.shape
    color = np.zeros(4, np.float32)
    n = np.zeros(3, np.float32)
    key, fill = lights[KEY], lights[FILL]
    h = key + np.array([0, 0, 1], np.float32)  # half vector between the light and the viewer
    h /= max(np.sqrt(h[0] * h[0] + h[1] * h[1] + h[2] * h[2]), 1e-3)
    for y in range(height):
        for x in range(width):
            t = owner[y, x]
            if t < 0:
                for k in range(4):
                    out[y, x, k] = 0.0
                continue
            a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            wb, wc, material = weights[y, x, 0], weights[y, x, 1], materials[t]
            for k in range(3):
                n[k] = blend(normals, a, b, c, wb, wc, k)
                color[k] = blend(colors, a, b, c, wb, wc, k)
            scale = 1.0 / max(np.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2]), 1e-6)
            if n[2] < 0 and material >= HAIR:  # thin surfaces are two-sided
                scale = -scale
            nx, ny, nz = n[0] * scale, n[1] * scale, n[2] * scale
            u, v = blend(uv, a, b, c, wb, wc, 0), blend(uv, a, b, c, wb, wc, 1)
            wrap, shine, sharp, sheen, hidden = surface(material, u, v, texture, iris, gloss, color)
            nk, nf = nx * key[0] + ny * key[1] + nz * key[2], nx * fill[0] + ny * fill[1] + nz * fill[2]
            light = 0.0
            if nk > -wrap:
                sx, sy = blend(shadow_points, a, b, c, wb, wc, 0), blend(shadow_points, a, b, c, wb, wc, 1)
                light = lit(shadow, sx, sy, blend(shadow_points, a, b, c, wb, wc, 2))
            high, glow, share = 0.0, 0.0, 1.0
            if material == HAIR:
                along = 0.0
                for k in range(3):
                    along += blend(tangents, a, b, c, wb, wc, k) * h[k]
                high, glow = hair_light(along, nk, gloss)
                share = 0.75
            else:
                nh = nx * h[0] + ny * h[1] + nz * h[2]
                if nh > 0.7 and nk > 0:
                    high = nh**sharp * shine * np.sqrt(nk)
            edge = 1.0 - max(nz, 0.0)
            edge = edge * edge * edge * edge * sheen
            opened = blend(colors, a, b, c, wb, wc, 3) * (1.0 - hidden)
            opened *= 0.35 + 0.65 * opened
            for k in range(3):
                soft = wrap * SCATTER[k]
                sky = lights[GROUND, k] + (lights[SKY, k] - lights[GROUND, k]) * (0.5 + 0.5 * ny)
                value = lights[KEY_COLOR, k] * (max(nk + soft, 0.0) / (1.0 + soft) * share + glow) * min(light + wrap * LEAK[k], 1.0)
                value += lights[FILL_COLOR, k] * max(nf + soft, 0.0) / (1.0 + soft) + sky * opened
                value = color[k] * value + high * light * lights[KEY_COLOR, k]
                out[y, x, k] = value + edge * (sky + lights[FILL_COLOR, k] * max(nf, 0.0))
            out[y, x, 3] = 1.0


@lru_cache(maxsize=1)
def film() -> np.ndarray:
    """A table from linear light (0 to 3, `LEVELS` steps per unit) to sRGB (0 to 255), with a soft shoulder so that highlights clip late."""
    x = np.arange(3 * LEVELS + 1) / LEVELS
    x = np.where(x > 0.6, 1 - 0.4 * np.exp(-(x - 0.6) / 0.4), x)
    return np.round(np.where(x <= 0.0031308, x * 12.92, 1.055 * x ** (1 / 2.4) - 0.055) * 255).astype(np.uint8)


@kernel
def develop(linear, background, factor, table, out):
    """Averages `factor` x `factor` samples over a background (H, W, 3) and writes sRGB as uint8; `table` is the result of `film`."""
    height, width, _ = out.shape
    scale = 1.0 / (factor * factor)
    for y in range(height):
        for x in range(width):
            covered = 0.0
            for j in range(factor):
                for i in range(factor):
                    covered += linear[y * factor + j, x * factor + i, 3]
            for k in range(3):
                total = 0.0
                for j in range(factor):
                    for i in range(factor):
                        total += min(linear[y * factor + j, x * factor + i, k], 3.0)
                value = total * scale + (1.0 - covered * scale) * background[y, x, k]
                out[y, x, k] = table[int(min(max(value, 0.0), 3.0) * LEVELS + 0.5)]
