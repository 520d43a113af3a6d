"""Compiled kernels that grow locks of hair and turn them into ribbons."""

from __future__ import annotations

import numpy as np

from .kernels import kernel

ROWS, COLUMNS = 64, 96
"""Size of the table of the head's radius by direction: elevation from straight down to up, and azimuth."""
TILT = 0.2
"""How fast a hat's edge rises towards the front."""


@kernel
def height_of(radius, x, y, z):
    """The head's radius in the direction of (x, y, z), relative to the center."""
    length = max(np.sqrt(x * x + y * y + z * z), 1e-4)
    r = (np.arcsin(min(max(y / length, -1), 1)) / np.pi + 0.5) * ROWS - 0.5
    c = (np.arctan2(x, z) / (2 * np.pi) + 0.5) * COLUMNS - 0.5
    r = min(max(r, 0), ROWS - 1.001)
    i, j = int(np.floor(r)), int(np.floor(c))
    fr, fc = r - i, c - j
    a, b = j % COLUMNS, (j + 1) % COLUMNS
    low = radius[i, a] + (radius[i, b] - radius[i, a]) * fc
    high = radius[i + 1, a] + (radius[i + 1, b] - radius[i + 1, a]) * fc
    return low + (high - low) * fr


@kernel
def grow(root, direction, length, clearance, aside, gravity, back, end, tight, hat, wave, turns, phase, center, radius, out):
    """Writes the paths of K locks to `out` (K, S, 3). They grow in steps of 0.25 cm, fall with `gravity`, bend to the `back`, keep a
    distance of at least `clearance` to the head, and are cut at the height `end`.

    Under a hat (above the height `hat` of its edge) locks stay close to the head; where `tight` (K,) isn't 0 they stay within 0.1 cm of
    their clearance. `aside` (K,), -1 or 1, is the side to which a lock is pushed off the face; 0 lets it fall over the face.
    """
    path = np.empty((160, 3), np.float32)
    stride = 0.25
    for k in range(len(root)):
        x, y, z = root[k, 0], root[k, 1], root[k, 2]
        dx, dy, dz = direction[k, 0], direction[k, 1], direction[k, 2]
        count = min(max(int(length[k] / stride), 2), 159)
        last = 0
        for s in range(count + 1):
            px, py, pz = x - center[0], y - center[1], z - center[2]
            r = max(np.sqrt(px * px + py * py + pz * pz), 1e-3)
            nx, ny, nz = px / r, py / r, pz / r
            rise = min(s * stride * 0.5, 1)
            under = y > hat + TILT * z
            least = height_of(radius, px, py, pz) + (0.1 if under else clearance[k] * rise)
            most = least + (0.05 if under else 1000 if tight[k] == 0.0 else 0.1)
            if r < least or r > most:
                target = least if r < least else most
                x, y, z = center[0] + nx * target, center[1] + ny * target, center[2] + nz * target
                inward = dx * nx + dy * ny + dz * nz
                if inward < 0 or r > most:
                    dx, dy, dz = dx - nx * inward, dy - ny * inward, dz - nz * inward
            if aside[k] != 0.0 and y < 9.5 and z > 2:
                # pushed aside and behind the cheek as a curtain, farther the lower it hangs
                push = min(9.5 - y, 3) * 0.085
                if x * aside[k] < 6.6:
                    x += aside[k] * push
                    dx += aside[k] * push * 0.6
                z -= 0.7 * push
                dz -= 0.5 * push
            a = phase[k] + turns * s * stride
            bend = wave * rise * (0.1 if under else 1)
            path[s, 0] = x + bend * (np.cos(a) * nz + np.sin(a) * nx * 0.6)
            path[s, 1] = y + bend * np.sin(a) * 0.4
            path[s, 2] = z + bend * (-np.cos(a) * nx + np.sin(a) * nz * 0.6)
            last = s
            if y < end[k]:
                break
            dy -= gravity * stride
            dz -= back * stride if z > center[2] else 0
            scale = 1 / max(np.sqrt(dx * dx + dy * dy + dz * dz), 1e-4)
            dx, dy, dz = dx * scale, dy * scale, dz * scale
            x, y, z = x + dx * stride, y + dy * stride, z + dz * stride
        for j in range(out.shape[1]):
            at = last * (j / (out.shape[1] - 1)) ** 1.4  # closer at the root, where locks bend
            i = min(int(at), last - 1) if last > 0 else 0
            f = at - i
            for m in range(3):
                out[k, j, m] = path[i, m] + (path[min(i + 1, last), m] - path[i, m]) * f


@kernel
def ribbons(paths, widths, rolls, center, points, normals, tangents):
    """Writes two vertices, left and right, for each point of a path: ribbons lie flat on the head except for `rolls` (K, S, radians), look
    round because of their normals, and narrow to the tip.
    """
    count = paths.shape[1]
    for k in range(len(paths)):
        for j in range(count):
            a, b = max(j - 1, 0), min(j + 1, count - 1)
            tx, ty, tz = paths[k, b, 0] - paths[k, a, 0], paths[k, b, 1] - paths[k, a, 1], paths[k, b, 2] - paths[k, a, 2]
            scale = 1 / max(np.sqrt(tx * tx + ty * ty + tz * tz), 1e-5)
            tx, ty, tz = tx * scale, ty * scale, tz * scale
            x, y, z = paths[k, j, 0], paths[k, j, 1], paths[k, j, 2]
            # locks below the chin hang: there the outward direction is horizontal
            nx, ny, nz = x - center[0], max(y - center[1], 0), z - center[2]
            scale = 1 / max(np.sqrt(nx * nx + ny * ny + nz * nz), 1e-5)
            nx, ny, nz = nx * scale, ny * scale, nz * scale
            sx, sy, sz = ty * nz - tz * ny, tz * nx - tx * nz, tx * ny - ty * nx
            length = np.sqrt(sx * sx + sy * sy + sz * sz)
            if length < 0.15:  # a lock that points straight outwards is spread along x
                sx, sy, sz = 1, 0, 0
                length = 1
            sx, sy, sz = sx / length, sy / length, sz / length
            c, s = np.cos(rolls[k, j]), np.sin(rolls[k, j])  # some locks don't lie flat, so that hair has thickness seen from the side too
            sx, sy, sz, nx, ny, nz = c * sx + s * nx, c * sy + s * ny, c * sz + s * nz, c * nx - s * sx, c * ny - s * sy, c * nz - s * sz
            t = j / (count - 1)
            w = widths[k] * (0.75 + 0.5 * t * (1 - t)) * (1 - 0.8 * t**4)
            for side in range(2):
                sign = 2 * side - 1
                i = (k * count + j) * 2 + side
                points[i, 0], points[i, 1], points[i, 2] = x + sign * w * sx, y + sign * w * sy, z + sign * w * sz
                lean = sign * 0.65
                mx, my, mz = nx + lean * sx, ny + lean * sy, nz + lean * sz
                scale = 1 / np.sqrt(mx * mx + my * my + mz * mz)
                normals[i, 0], normals[i, 1], normals[i, 2] = mx * scale, my * scale, mz * scale
                tangents[i, 0], tangents[i, 1], tangents[i, 2] = tx, ty, tz
