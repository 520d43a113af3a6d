"""Makes `head.npz` from the ICT-FaceKit model: `python -m worlds.heads.reduce SOURCE.npz`.

SOURCE holds ICT-FaceKit's mean head, identity modes, expression shapes, triangles and parts as arrays (`mean`, `identities`,
`expression_names`, `expression_vertices`, `expression_offsets`, `expression_starts`, `triangles`, `part`). Parts that 128 pixels never
show are removed: tear films, sockets, gums, inner eyeballs, the back of the mouth. Teeth, tongue and lashes become smooth strips that move
as the source's vertices near them do. Offsets are kept as float16; each vertex's openness to the sky (ambient occlusion) is computed on
the mean head.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from .raster import EMPTY, light_screen, rasterize, rasterize_depth, vertex_normals

SKIN, MOUTH, TEETH, TONGUE, EYE, LASH = range(6)
"""The parts of the reduced head: the kind of each vertex."""
TARGET = Path(__file__).with_name("head.npz")


def strip(rows: int, columns: int, first: int) -> np.ndarray:
    """Triangles of a grid whose vertices are numbered row by row from `first`."""
    a = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)[None]).ravel() + first
    return np.concatenate([np.stack([a, a + columns, a + 1], 1), np.stack([a + 1, a + columns, a + columns + 1], 1)])


def arch(low: float, high: float, depth: float, half: float, rows: int = 4) -> np.ndarray:
    """A smooth dental arch: points (rows x 17, 3), rows from top to bottom."""
    x = np.linspace(-1, 1, 17) * half
    z = depth - 0.30 * np.abs(x) ** 2
    y = np.linspace(high, low, rows)
    return np.stack([np.tile(x, rows), np.repeat(y, 17), np.tile(z, rows)], 1)


def lid_edges(mean: np.ndarray, part: np.ndarray, triangles: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The edges of the upper and the lower lid as seen from the front: points (13, 3) each, from the nose outwards."""
    faces = triangles[np.isin(part[triangles], (0, 5, 7)).all(1)].astype(np.int32)
    scale, x0, y0 = 100, 1.4, 5.6  # pixels a centimeter; the window's corner
    screen = np.column_stack([(mean[:, 0] * side - x0) * scale, (y0 - mean[:, 1]) * scale, -mean[:, 2]]).astype(np.float32)
    depth, owner = np.full((380, 380), EMPTY), np.full((380, 380), -1, np.int32)
    rasterize(screen, faces, len(faces), 0, depth, owner, np.zeros((380, 380, 2), np.float32))
    eye = (owner >= 0) & np.isin(part[faces[owner, 0]], (5, 7))
    columns = np.flatnonzero(eye.any(0))
    columns = columns[np.linspace(1, len(columns) - 2, 13).astype(int)]

    def edge(rows: np.ndarray) -> np.ndarray:
        return np.column_stack([(columns / scale + x0) * side, y0 - rows / scale, -depth[rows, columns]])

    return edge(eye.argmax(0)[columns] - 2), edge(len(eye) + 1 - eye[::-1].argmax(0)[columns])


def lashes(root: np.ndarray, side: int) -> np.ndarray:
    """A strip of lashes from the upper lid's edge (13, 3) outwards: points (2 x 13, 3)."""
    length = np.interp(np.linspace(0, 1, 13), [0, 0.3, 0.8, 1], [0.03, 0.16, 0.34, 0.22])[:, None]
    return np.concatenate([root + np.array([0, -0.03, 0.02]), root + length * np.array([0.45 * side, 0.35, 0.9])])


def openness(points: np.ndarray, triangles: np.ndarray, directions: int = 160) -> np.ndarray:
    """The cosine-weighted part of the directions around each vertex that nothing occludes (ambient occlusion): (N,) from 0 to 1."""
    points = points.astype(np.float32)
    normals = np.zeros_like(points)
    vertex_normals(points, triangles, normals)
    k = np.arange(directions) + 0.5
    height, angle = 1 - 2 * k / directions, np.pi * (1 + 5**0.5) * k
    ring = np.sqrt(1 - height**2)
    seen, total = np.zeros(len(points)), np.zeros(len(points))
    screen = np.zeros_like(points)
    center, half, size = np.zeros(3, np.float32), np.float32(24), 384
    for direction in np.stack([ring * np.cos(angle), height, ring * np.sin(angle)], 1).astype(np.float32):
        depth = np.full((size, size), EMPTY)
        light_screen(points, len(points), direction, center, half, size, screen)
        rasterize_depth(screen, triangles, len(triangles), 0, depth)
        light_screen(points + 0.25 * normals, len(points), direction, center, half, size, screen)
        column, row = (np.clip(screen[:, i].astype(int), 0, size - 1) for i in (0, 1))
        weight = np.maximum(normals @ direction, 0)
        seen += weight * (screen[:, 2] <= depth[row, column] + 0.1)
        total += weight
    return seen / np.maximum(total, 1e-6)


def masculine(points: np.ndarray, modes: np.ndarray) -> np.ndarray:
    """Weights of the identity modes (100,) that best approximate a wider jaw and neck, a longer chin, a stronger brow and a larger nose."""
    x, y, z = points.T
    side = np.sign(x)

    def near(value: np.ndarray, center: float, width: float) -> np.ndarray:
        return np.exp(-np.square((value - center) / width))

    front = z > 3
    wish = np.zeros_like(points)
    wish[:, 0] = side * (0.45 * near(y, -5, 2.5) * near(np.abs(x), 6, 2.5) + 0.4 * (y < -8) * near(y, -11, 3))
    wish[:, 0] += side * 0.12 * near(y, 0, 1.5) * near(np.abs(x), 1.6, 0.8) * front
    wish[:, 1] = -0.45 * near(y, -8, 1.6) * front * near(x, 0, 4) - 0.12 * near(y, 5.5, 1.2) * front
    wish[:, 2] = 0.30 * near(y, 5.3, 1.0) * near(np.abs(x), 2.6, 2.5) * front + 0.30 * near(y, 0.3, 2.0) * near(x, 0, 1.3) * front
    wish[:, 2] += -0.15 * near(y, -3.4, 1.0) * near(x, 0, 2) * front + 0.2 * near(y, -7.5, 1.5) * near(x, 0, 2) * front
    matrix = modes.reshape(len(modes), -1).T.astype(np.float64)
    found = np.linalg.solve(matrix.T @ matrix + 0.2 * len(matrix) * np.eye(len(modes)) * np.square(matrix).mean(), matrix.T @ wish.ravel())
    return (found * 2.4 / np.linalg.norm(found)).astype(np.float32)


def reduce(source: Path) -> dict[str, np.ndarray]:
    data = np.load(source, allow_pickle=False)
    mean, part, triangles = data["mean"].astype(np.float64), data["part"], data["triangles"].astype(np.int64)
    identities = data["identities"].astype(np.float32)
    names, starts = [str(name) for name in data["expression_names"]], data["expression_starts"]
    expressions = np.zeros((len(names), len(mean), 3), np.float32)
    for k in range(len(names)):
        window = slice(starts[k], starts[k + 1])
        expressions[k, data["expression_vertices"][window]] = data["expression_offsets"][window]

    _, y, z = mean.T
    keep = (part <= 1) | ((part == 2) & (y < 0)) | (np.isin(part, (5, 7)) & (z > 7.9))
    faces = triangles[keep[triangles].all(1)]
    used = np.unique(faces)
    number = np.full(len(mean), -1)
    number[used] = np.arange(len(used))
    kinds = np.where(part[used] <= 1, SKIN, np.where(part[used] == 2, MOUTH, EYE))
    points, groups, new_faces = [mean[used]], [used[:, None].repeat(8, 1)], [number[faces]]
    new_kinds = [kinds]

    falls = expressions[names.index("jawOpen"), :, 1] < -0.3
    upper, lower, lid = (part == 4) & ~falls, (part == 4) & falls, (part == 0) & (y > 2) & (y < 6)
    tongue = np.stack(np.meshgrid(np.linspace(-1, 1, 7), np.linspace(0, 1, 5)), -1).reshape(-1, 2)
    tongue = np.stack(
        [
            2.1 * tongue[:, 0] * (1 - 0.25 * tongue[:, 1] ** 2),
            -3.75 - 0.5 * tongue[:, 0] ** 2 - 0.3 * tongue[:, 1] ** 2,
            5 + 4.6 * tongue[:, 1],
        ],
        1,
    )
    edges = {side: lid_edges(mean, part, triangles, side) for side in (1, -1)}
    strips = [
        (arch(-3.28, -1.3, 10.62, 2.75), 4, TEETH, upper),
        (arch(-5.3, -3.42, 10.32, 2.5), 4, TEETH, lower),
        (tongue, 5, TONGUE, lower),
        *((lashes(edges[side][0], side), 2, LASH, lid) for side in (1, -1)),
    ]
    for grid, rows, kind, follow in strips:
        candidates = np.flatnonzero(follow)
        # the whole length of a lash moves as the lid's edge does
        near = np.concatenate([grid[: len(grid) // 2]] * 2) if kind == LASH else grid
        distance = np.square(near[:, None] - mean[candidates][None]).sum(-1)
        groups.append(candidates[np.argsort(distance, axis=1)[:, :8]])
        new_faces.append(strip(rows, len(grid) // rows, sum(map(len, points))))
        points.append(grid)
        new_kinds.append(np.full(len(grid), kind))

    group = np.concatenate(groups)
    points_all = np.concatenate(points)
    faces_all = np.concatenate(new_faces).astype(np.int32)
    kinds_all = np.concatenate(new_kinds)
    # closed surfaces come first, so that a renderer can cull their back faces
    inside = ~np.isin(kinds_all[faces_all], (SKIN, EYE)).all(1)
    faces_all = faces_all[np.argsort(inside, kind="stable")]
    moved = expressions[:, group].mean(2)
    large = np.abs(moved).max(-1) > 0.004
    skin = kinds_all == SKIN
    return {
        "masculine": masculine(points_all[skin], identities[:, group].mean(2)[:, skin]),
        "mean": points_all.astype(np.float32),
        "kind": kinds_all.astype(np.uint8),
        "rims": np.concatenate([*edges[1], *edges[-1]]).astype(np.float32),
        "closed": np.array((~inside).sum(), np.int32),
        "triangles": faces_all.astype(np.uint16),
        "identities": identities[:, group].mean(2).astype(np.float16),
        "expression_names": np.array(names),
        "expression_starts": np.concatenate([[0], large.sum(1).cumsum()]).astype(np.int32),
        "expression_vertices": np.nonzero(large)[1].astype(np.uint16),
        "expression_offsets": moved[large].astype(np.float16),
        "openness": np.round(openness(points_all, faces_all) * 255).astype(np.uint8),
    }


if __name__ == "__main__":
    arrays = reduce(Path(sys.argv[1]))
    temporary = TARGET.with_name("partial-head.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(TARGET)
    print({name: array.shape for name, array in arrays.items()}, f"{TARGET.stat().st_size / 1e6:.1f} MB")
