"""A small rasterizer: draws triangles into a depth buffer and records the visible triangle of every pixel.

Compiled by numba without fast math and threads, so that additions keep the order of the source code.
"""

from __future__ import annotations

import numpy as np

from .kernels import kernel

EMPTY = np.float32(1e9)
NOBODY, NO_WEIGHTS = np.zeros((0, 0), np.int32), np.zeros((0, 0, 2), np.float32)


@kernel
def span(wb, wc, step_b, step_c, count):
    """First and end of the pixels in a row where all three barycentric weights can be positive, with a margin of a pixel for rounding."""
    low, high = np.float32(0), np.float32(count)
    wa, step_a = np.float32(1) - wb - wc, -step_b - step_c
    for w, step in ((wa, step_a), (wb, step_b), (wc, step_c)):
        if step > 0:
            low = max(low, -w / step)
        elif step < 0:
            high = min(high, -w / step + np.float32(1))
        elif w < 0:
            return 0, 0
    if low >= high + np.float32(1):
        return 0, 0
    return max(int(low) - 1, 0), min(int(high) + 2, count)


@kernel
def rasterize(screen, triangles, count, closed, depth, owner, weights):
    """Draws triangles into a depth buffer and the buffers that belong to it.

    `screen` (N, 3) float32: column, row (pixels, pixel centers at .5) and distance. `triangles` (T, 3) int32, of which the first
    `count` are drawn; the first `closed` are parts of closed surfaces, whose back faces are culled. `depth` (H, W) float32 and `owner`
    (H, W) int32 (a triangle's index, -1 for none) are updated; `weights` (H, W, 2) are the second and third corner's barycentric weights.
    If `owner` is empty, only `depth` is written.
    """
    height, width = depth.shape
    owned = owner.size > 0
    for t in range(count):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ax, ay, bx, by, cx, cy = screen[a, 0], screen[a, 1], screen[b, 0], screen[b, 1], screen[c, 0], screen[c, 1]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area == 0.0 or (t < closed and area > 0.0):
            continue
        left, right = min(ax, bx, cx), max(ax, bx, cx)
        top, bottom = min(ay, by, cy), max(ay, by, cy)
        x0, x1 = max(int(np.ceil(left - 0.5)), 0), min(int(np.floor(right - 0.5)), width - 1)
        y0, y1 = max(int(np.ceil(top - 0.5)), 0), min(int(np.floor(bottom - 0.5)), height - 1)
        if x0 > x1 or y0 > y1:
            continue
        inverse = np.float32(1.0) / area
        az, bz, cz = screen[a, 2], screen[b, 2], screen[c, 2]
        step_b, step_c = (cy - ay) * inverse, (ay - by) * inverse
        for y in range(y0, y1 + 1):
            py = np.float32(y + 0.5) - ay
            px = np.float32(x0 + 0.5) - ax
            wb = (px * (cy - ay) - py * (cx - ax)) * inverse
            wc = (py * (bx - ax) - px * (by - ay)) * inverse
            first, end = span(wb, wc, step_b, step_c, x1 + 1 - x0)
            wb += step_b * np.float32(first)
            wc += step_c * np.float32(first)
            for x in range(x0 + first, x0 + end):
                if wb >= 0.0 and wc >= 0.0 and wb + wc <= 1.0:
                    z = az + wb * (bz - az) + wc * (cz - az)
                    if z < depth[y, x]:
                        depth[y, x] = z
                        if owned:
                            owner[y, x] = t
                            weights[y, x, 0] = wb
                            weights[y, x, 1] = wc
                wb += step_b
                wc += step_c


def rasterize_depth(screen, triangles, count, closed, depth):
    """Like `rasterize`, but only the depth, for shadow maps."""
    rasterize(screen, triangles, count, closed, depth, NOBODY, NO_WEIGHTS)


@kernel
def vertex_normals(points, triangles, out):
    """Area-weighted normals (N, 3) of points (N, 3), into `out`."""
    out[:] = 0.0
    for t in range(len(triangles)):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ux, uy, uz = points[b, 0] - points[a, 0], points[b, 1] - points[a, 1], points[b, 2] - points[a, 2]
        vx, vy, vz = points[c, 0] - points[a, 0], points[c, 1] - points[a, 1], points[c, 2] - points[a, 2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for v in (a, b, c):
            out[v, 0] += nx
            out[v, 1] += ny
            out[v, 2] += nz
    for v in range(len(out)):
        length = np.sqrt(out[v, 0] * out[v, 0] + out[v, 1] * out[v, 1] + out[v, 2] * out[v, 2])
        scale = np.float32(1.0) / max(length, np.float32(1e-9))
        for k in range(3):
            out[v, k] *= scale


@kernel
def light_screen(points, count, direction, center, half, size, out):
    """Orthographic projection from a light into `out` (N, 3): `direction` (3,) points to the light, and a map with a side of `size` pixels
    spans 2 `half` cm around `center`.
    """
    dx, dy, dz = direction[0], direction[1], direction[2]
    length = max(np.sqrt(dx * dx + dz * dz), np.float32(1e-3))
    rx, rz = dz / length, -dx / length
    ux, uy, uz = dy * rz, dz * rx - dx * rz, -dy * rx
    scale = np.float32(size / (2.0 * half))
    for i in range(count):
        x, y, z = points[i, 0] - center[0], points[i, 1] - center[1], points[i, 2] - center[2]
        out[i, 0] = (x * rx + z * rz + half) * scale
        out[i, 1] = (half - (x * ux + y * uy + z * uz)) * scale
        out[i, 2] = -(x * dx + y * dy + z * dz)


@kernel
def camera_screen(points, count, distance, focal, center, size, out):
    """Perspective projection into `out` (N, 3) from `distance` cm in front of `center`, towards -z; `focal` is in units of the picture's
    height.
    """
    for i in range(count):
        x, y, z = points[i, 0] - center[0], points[i, 1] - center[1], distance - (points[i, 2] - center[2])
        scale = np.float32(size) * focal / z
        out[i, 0] = np.float32(size * 0.5) + x * scale
        out[i, 1] = np.float32(size * 0.5) - y * scale
        out[i, 2] = z
