"""Color of every pixel whose triangle is known: soft wrapped diffuse light, a soft highlight, sky and ground, shadow from a depth map."""

from __future__ import annotations

import numpy as np
from numba import njit

SKIN, MOUTH, TEETH, TONGUE, EYE, LASH, HAIR, CLOTH, GLOSS = range(9)
"""Materials; the first six are also the parts of the head."""
KEY, KEY_COLOR, FILL, FILL_COLOR, SKY, GROUND = range(6)
"""Rows of the array of lights."""


@njit(cache=True)
def texel(texture, u, v, out):
    """Bilinear look-up of a texture (H, W, 4)."""
    height, width, _ = texture.shape
    u, v = min(max(u - np.float32(0.5), np.float32(0)), np.float32(width - 1.001)), min(max(v - np.float32(0.5), np.float32(0)), np.float32(height - 1.001))
    c, r = int(u), int(v)
    fu, fv = u - np.float32(c), v - np.float32(r)
    a, b, d = (1 - fu) * (1 - fv), fu * (1 - fv), (1 - fu) * fv
    e = fu * fv
    for k in range(4):
        out[k] = a * texture[r, c, k] + b * texture[r, c + 1, k] + d * texture[r + 1, c, k] + e * texture[r + 1, c + 1, k]


@njit(cache=True)
def lit(shadow, column, row, z):
    """How much of the light arrives, 0 to 1: the mean of nine comparisons, weighted so that it changes smoothly."""
    size = shadow.shape[0]
    column, row = column - np.float32(1), row - np.float32(1)
    c, r = int(np.floor(column)), int(np.floor(row))
    if c < 0 or r < 0 or c + 3 > size or r + 3 > size:
        return np.float32(1)
    fu, fv = column - np.float32(c), row - np.float32(r)
    one, zero, slope = np.float32(1), np.float32(0), np.float32(4)
    z = one - z * slope
    total = zero
    for j in range(3):
        line = (one - fu) * min(max(shadow[r + j, c] * slope + z, zero), one) + min(max(shadow[r + j, c + 1] * slope + z, zero), one)
        line += fu * min(max(shadow[r + j, c + 2] * slope + z, zero), one)
        total += line * (one - fv if j == 0 else fv if j == 2 else one)
    return total * np.float32(0.25)


@njit(cache=True)
def step(low, high, x):
    t = min(max((x - low) / (high - low), np.float32(0)), np.float32(1))
    return t * t * (np.float32(3) - np.float32(2) * t)


@njit(cache=True)
def eye_color(dx, dy, iris, out):
    """Sclera, iris and pupil at a point of the eyeball, given relative to where it looks (cm)."""
    d = np.sqrt(dx * dx + dy * dy)
    shade = np.float32(1) - np.float32(0.25) * step(np.float32(0.7), np.float32(1.4), abs(dx))
    red, green, blue = np.float32(0.70) * shade, np.float32(0.655) * shade, np.float32(0.63) * shade
    ray = np.sin(np.arctan2(dy, dx) * np.float32(17)) * np.float32(0.12) + np.float32(1)
    tone = ray * (np.float32(1.35) - np.float32(0.75) * step(np.float32(0.48), np.float32(0.72), d)) * (np.float32(1) - np.float32(0.25) * dy)
    w = step(np.float32(0.78), np.float32(0.66), d)
    red, green, blue = red + (iris[0] * tone - red) * w, green + (iris[1] * tone - green) * w, blue + (iris[2] * tone - blue) * w
    w = np.float32(1) - np.float32(0.96) * step(np.float32(0.34), np.float32(0.25), d)
    out[0], out[1], out[2] = red * w, green * w, blue * w


@njit(cache=True)
def shade(owner, weights, triangles, materials, points, normals, tangents, colors, uv, texture, iris, lights, shadow, shadow_points, gloss, out):
    """Writes linear color and coverage (H, W, 4). `colors` (N, 4): color and openness; `shadow_points` (N, 3): points in the shadow map."""
    height, width = owner.shape
    skin = np.zeros(4, np.float32)
    zero, one, half = np.float32(0), np.float32(1), np.float32(0.5)
    kx, ky, kz = lights[0, 0], lights[0, 1], lights[0, 2]
    fx, fy, fz = lights[2, 0], lights[2, 1], lights[2, 2]
    hx, hy, hz = kx, ky, kz + one
    length = max(np.sqrt(hx * hx + hy * hy + hz * hz), np.float32(1e-3))
    hx, hy, hz = hx / length, hy / length, hz / length
    for y in range(height):
        for x in range(width):
            t = owner[y, x]
            if t < 0:
                out[y, x, 0], out[y, x, 1], out[y, x, 2], out[y, x, 3] = zero, zero, zero, zero
                continue
            a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            wb, wc = weights[y, x, 0], weights[y, x, 1]
            wa = one - wb - wc
            material = materials[t]
            nx = wa * normals[a, 0] + wb * normals[b, 0] + wc * normals[c, 0]
            ny = wa * normals[a, 1] + wb * normals[b, 1] + wc * normals[c, 1]
            nz = wa * normals[a, 2] + wb * normals[b, 2] + wc * normals[c, 2]
            if nz < 0 and material >= 6:
                nx, ny, nz = -nx, -ny, -nz
            length = one / max(np.sqrt(nx * nx + ny * ny + nz * nz), np.float32(1e-6))
            nx, ny, nz = nx * length, ny * length, nz * length
            red = wa * colors[a, 0] + wb * colors[b, 0] + wc * colors[c, 0]
            green = wa * colors[a, 1] + wb * colors[b, 1] + wc * colors[c, 1]
            blue = wa * colors[a, 2] + wb * colors[b, 2] + wc * colors[c, 2]
            open_ = wa * colors[a, 3] + wb * colors[b, 3] + wc * colors[c, 3]
            u = wa * uv[a, 0] + wb * uv[b, 0] + wc * uv[c, 0]
            v = wa * uv[a, 1] + wb * uv[b, 1] + wc * uv[c, 1]
            wrap, shine, sharp, sheen = zero, np.float32(0.04), np.float32(12), zero
            if material == 0:
                texel(texture, u, v, skin)
                red, green, blue = skin[0], skin[1], skin[2]
                wrap, shine, sharp = (one - skin[3]) * np.float32(0.30), np.float32(0.085) * gloss * (one - skin[3] * np.float32(0.8)), np.float32(16)
                sheen = np.float32(0.05) * (one - skin[3])
            elif material == 4:
                eye_color(u, v, iris, skin)
                red, green, blue = skin[0], skin[1], skin[2]
                open_ *= one - np.float32(0.6) * step(np.float32(0.15), np.float32(0.75), v)
                shine, sharp = np.float32(0.9), np.float32(120)
            elif material == 2:
                gap = abs(u - np.floor(u) - half)
                tint = one - np.float32(0.22) * step(np.float32(0.42), np.float32(0.5), gap)
                red, green, blue = red * tint, green * tint, blue * tint
                shine, sharp = np.float32(0.2), np.float32(40)
            elif material == 1 or material == 3:
                shine, sharp = np.float32(0.15), np.float32(30)
            elif material == 8:
                shine, sharp = np.float32(0.6), np.float32(60)
            sx = wa * shadow_points[a, 0] + wb * shadow_points[b, 0] + wc * shadow_points[c, 0]
            sy = wa * shadow_points[a, 1] + wb * shadow_points[b, 1] + wc * shadow_points[c, 1]
            sz = wa * shadow_points[a, 2] + wb * shadow_points[b, 2] + wc * shadow_points[c, 2]
            nk = nx * kx + ny * ky + nz * kz
            nf = nx * fx + ny * fy + nz * fz
            light = lit(shadow, sx, sy, sz) if nk > -wrap else zero
            # red light travels farther under the skin than blue light does
            wr, wg, wb2 = wrap, wrap * np.float32(0.45), wrap * np.float32(0.3)
            dr, dg, db = max(nk + wr, zero) / (one + wr), max(nk + wg, zero) / (one + wg), max(nk + wb2, zero) / (one + wb2)
            lr, lg, lb = min(light + wrap * np.float32(0.25), one), light, light
            er, eg, eb = max(nf + wr, zero) / (one + wr), max(nf + wg, zero) / (one + wg), max(nf + wb2, zero) / (one + wb2)
            up = half + half * ny
            ambient = open_ * (np.float32(0.35) + np.float32(0.65) * open_)
            ar = lights[5, 0] + (lights[4, 0] - lights[5, 0]) * up
            ag = lights[5, 1] + (lights[4, 1] - lights[5, 1]) * up
            ab = lights[5, 2] + (lights[4, 2] - lights[5, 2]) * up
            high = np.float32(0)
            if material == 6:
                strand = one + np.float32(0.16) * np.sin(u * np.float32(17)) + np.float32(0.14) * np.sin(u * np.float32(41) + np.float32(1))
                red, green, blue = red * strand, green * strand, blue * strand
                tx = wa * tangents[a, 0] + wb * tangents[b, 0] + wc * tangents[c, 0]
                ty = wa * tangents[a, 1] + wb * tangents[b, 1] + wc * tangents[c, 1]
                tz = wa * tangents[a, 2] + wb * tangents[b, 2] + wc * tangents[c, 2]
                along = tx * hx + ty * hy + tz * hz
                across = max(one - along * along, zero)
                high = across**12 * np.float32(0.045) * gloss * max(nk + np.float32(0.3), zero)
                high += across**60 * np.float32(0.04) * gloss
                # the glow of hair takes the hair's own color
                glow = across**5 * np.float32(0.8) * max(nk + np.float32(0.2), zero)
                dr, dg, db = dr * np.float32(0.75) + glow, dg * np.float32(0.75) + glow, db * np.float32(0.75) + glow
            else:
                nh = max(nx * hx + ny * hy + nz * hz, zero)
                if nh > np.float32(0.7) and nk > zero:
                    high = nh**sharp * shine * np.sqrt(nk)
            facing = one - max(nz, zero)
            facing = facing * facing * facing * facing * sheen
            out[y, x, 0] = red * (lights[1, 0] * dr * lr + lights[3, 0] * er + ar * ambient) + high * light * lights[1, 0] + facing * (ar + lights[3, 0] * max(nf, zero))
            out[y, x, 1] = green * (lights[1, 1] * dg * lg + lights[3, 1] * eg + ag * ambient) + high * light * lights[1, 1] + facing * (ag + lights[3, 1] * max(nf, zero))
            out[y, x, 2] = blue * (lights[1, 2] * db * lb + lights[3, 2] * eb + ab * ambient) + high * light * lights[1, 2] + facing * (ab + lights[3, 2] * max(nf, zero))
            out[y, x, 3] = one


@njit(cache=True)
def develop(linear, background, factor, out):
    """Averages `factor` x `factor` samples over a background (H, W, 3) and writes sRGB as uint8."""
    height, width, _ = out.shape
    scale = np.float32(1.0 / (factor * factor))
    for y in range(height):
        for x in range(width):
            covered = np.float32(0)
            for j in range(factor):
                for i in range(factor):
                    covered += linear[y * factor + j, x * factor + i, 3]
            for k in range(3):
                total = np.float32(0)
                for j in range(factor):
                    for i in range(factor):
                        total += min(linear[y * factor + j, x * factor + i, k], np.float32(3))
                value = total * scale + (np.float32(1) - covered * scale) * background[y, x, k]
                if value > np.float32(0.6):  # a soft shoulder, so that nothing burns out at once
                    value = np.float32(1) - np.float32(0.4) * np.exp(-(value - np.float32(0.6)) / np.float32(0.4))
                if value <= np.float32(0.0031308):
                    value = value * np.float32(12.92)
                else:
                    value = np.float32(1.055) * value ** np.float32(1 / 2.4) - np.float32(0.055)
                out[y, x, k] = np.uint8(min(max(value, np.float32(0)), np.float32(1)) * np.float32(255) + np.float32(0.5))
