"""Clothes, headwear and glasses: small meshes that fit the person's own head and neck."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .contexts import COLORS, Context
from .hair import CENTER, STYLES, radii, skull_map
from .head import EYE, SKIN, load
from .locks import COLUMNS, ROWS, TILT
from .people import Person, linear
from .scene import Mesh
from .shade import CLOTH, GLOSS

if TYPE_CHECKING:
    from collections.abc import Callable

HAIR_LIES_FLAT = ("beanie", "santa hat", "cap", "straw hat", "top hat", "headscarf")
HAT_LINE = 5.0
WHITE = linear(np.array([236, 234, 228]))


def grid(rows: int, columns: int, wrap: bool) -> np.ndarray:
    """Triangles of a grid of rows x columns vertices; `wrap` joins the last column to the first."""
    r, c = np.meshgrid(np.arange(rows - 1), np.arange(columns if wrap else columns - 1), indexing="ij")
    a, b = (r * columns + c).ravel(), (r * columns + (c + 1) % columns).ravel()
    return np.concatenate([np.stack([a, a + columns, b], 1), np.stack([b, a + columns, b + columns], 1)]).astype(np.int32)


def sheet(points: np.ndarray, color: np.ndarray, wrap: bool = True, material: int = CLOTH) -> Mesh:
    """A mesh of a grid of points (rows, columns, 3). So that normals point outwards, columns must run clockwise seen from outside where
    rows run outwards or up.
    """
    rows, columns, _ = points.shape
    return Mesh(points.reshape(-1, 3).astype(np.float32), grid(rows, columns, wrap), material, np.asarray(color, np.float32))


def ball(center: np.ndarray, radii_: tuple[float, float, float], color: np.ndarray, material: int = CLOTH) -> Mesh:
    a, b = np.linspace(2 * np.pi, 0, 16, endpoint=False)[None], np.linspace(-np.pi / 2, np.pi / 2, 9)[:, None]
    unit = np.stack([np.cos(b) * np.sin(a), np.sin(b) + 0 * a, np.cos(b) * np.cos(a)], -1)
    return sheet(center + unit * radii_, color, True, material)


def tube(path: np.ndarray, radius: float | np.ndarray, color: np.ndarray, closed: bool = False, material: int = GLOSS) -> Mesh:
    """A round tube along a path (K, 3)."""
    ahead = np.roll(path, -1, 0) - np.roll(path, 1, 0) if closed else np.gradient(path, axis=0)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    up = np.where(np.abs(ahead[:, 1:2]) > 0.9, [[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]])
    a = np.cross(ahead, up)
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b = np.cross(ahead, a)
    angle = np.linspace(2 * np.pi, 0, 7, endpoint=False)
    around = a[:, None] * np.cos(angle)[None, :, None] + b[:, None] * np.sin(angle)[None, :, None]
    points = path[:, None] + around * np.broadcast_to(np.asarray(radius, float).reshape(-1, 1, 1), (len(path), 1, 1))
    return sheet(np.concatenate([points, points[:1]]) if closed else points, color, True, material)


def skull(direction: np.ndarray) -> np.ndarray:
    """The mean head's radius from `CENTER` in directions (..., 3)."""
    row = np.clip((np.arcsin(np.clip(direction[..., 1], -1, 1)) / np.pi + 0.5) * ROWS - 0.5, 0, ROWS - 1.001)
    column = ((np.arctan2(direction[..., 0], direction[..., 2]) / (2 * np.pi) + 0.5) * COLUMNS - 0.5) % COLUMNS
    r, c = row.astype(int), column.astype(int)
    fr, fc = row - r, column - c
    table, after = radii(), (c + 1) % COLUMNS
    low, high = table[r, c] * (1 - fc) + table[r, after] * fc, table[r + 1, c] * (1 - fc) + table[r + 1, after] * fc
    return low * (1 - fr) + high * fr


def dome(
    edge: Callable[[np.ndarray], np.ndarray], out: Callable[[np.ndarray, np.ndarray], np.ndarray], rows: int = 12, columns: int = 48
) -> np.ndarray:
    """A surface over the skull, (rows, columns, 3), from an edge to the crown. `edge` gives the edge's elevation (radians) by azimuth,
    `out` the distance from the skull (cm) by height (0 at the edge, 1 at the crown) and azimuth.
    """
    azimuth = np.linspace(np.pi, -np.pi, columns, endpoint=False)[None]
    up = np.linspace(0, 1, rows)[:, None]
    elevation = edge(azimuth) + (np.pi / 2 - edge(azimuth)) * up
    direction = np.stack([np.cos(elevation) * np.sin(azimuth), np.sin(elevation) + 0 * azimuth, np.cos(elevation) * np.cos(azimuth)], -1)
    return CENTER + direction * (skull(direction) + out(up, azimuth))[..., None]


def brim_edge(azimuth: np.ndarray) -> np.ndarray:
    """The elevation (radians) of a hat's edge by azimuth: above the brows in front, lower at the back."""
    return 0.36 + 0.24 * np.cos(azimuth) - 0.02 * np.cos(2 * azimuth)


def soft_hat(context: Context, extra: float, color: np.ndarray) -> list[Mesh]:
    """Beanie and santa hat: a dome with a thick edge, and for the santa hat a tip that hangs to one side."""
    santa = context.headwear == "santa hat"
    ribs = 0.0 if santa else 0.10
    points = dome(brim_edge, lambda up, a: 0.7 + extra + ribs * np.cos(30 * a) * (1 - up) + (0.9 if not santa else 1.5) * up**2, 14)
    if santa:
        side = 1.0 if context.seed % 2 else -1.0
        t = np.linspace(0, 1, 14)[:, None]
        points[..., 0] += side * (1.0 * t**2 + 9.5 * t**5)
        points[..., 1] += 6.0 * t**3 - 8.0 * t**7
        points[..., 2] -= 1.5 * t**3
    meshes = [sheet(points, color)]
    cuff = dome(
        lambda a: brim_edge(a) - 0.05,
        lambda up, a: 0.9 + extra + (0.75 if santa else 0.4) * np.sin(np.pi * np.minimum(up / 0.22, 1)) ** 0.5,
        40,
    )[:10]
    meshes.append(sheet(cuff, WHITE if santa else color * 0.85))
    if santa:
        meshes.append(ball(points[-1].mean(0), (1.6, 1.6, 1.6), WHITE))
    elif context.seed % 3 == 0:
        meshes.append(ball(np.add(points[-1].mean(0), (0, 1.2, 0)), (1.9, 1.8, 1.9), color * 0.7 + 0.25))
    return meshes


def stiff_hat(context: Context, extra: float, color: np.ndarray) -> list[Mesh]:
    """Cap, straw hat and top hat: a crown with a visor or a brim."""
    if context.headwear == "cap":
        points = dome(brim_edge, lambda up, a: 0.55 + extra + 0.35 * np.sin(np.pi * up))
        along, t = np.linspace(-np.pi / 2, np.pi / 2, 25), np.linspace(0, 1, 5)[:, None]
        base = dome(brim_edge, lambda up, a: 0.45 + extra + 0 * up * a, 3, 360)[0][(180 - 58 * np.sin(along)).astype(int)]
        reach, x = 6.8 * np.cos(along)[None], base[None, :, 0]
        # the visor spans 58 degrees to each side and is bent like a part of a wide cylinder; it has some thickness, so that its edge and,
        # from below, its shaded side are visible
        top = base + np.stack([0.08 * x * t, 0.25 - 0.29 * reach * t - 0.014 * x**2 * t, reach * t], -1)
        visor = np.concatenate([top, (top - [0, 0.35, 0])[::-1]])
        return [sheet(points, color), sheet(visor, color * 0.7, wrap=False), ball(points[-1].mean(0), (0.7, 0.35, 0.7), color)]
    straw = context.headwear == "straw hat"
    color = linear(np.array([222, 188, 128])) if straw else linear(np.array([34, 32, 36]))
    base = dome(brim_edge, lambda up, a: 0.6 + extra + 0 * up * a, 3)[0]
    middle = base.mean(0)
    flat = base.copy()
    flat[:, 1] = middle[1] + 0.35 * (base[:, 1] - middle[1])
    height = 6.5 if straw else 8.5
    shape = [
        (1.0, 0.0),
        (1.0, 0.18),
        (0.98, 0.5),
        (0.94 if straw else 1.0, 0.8),
        (0.85 if straw else 1.03, 1.0),
        (0.5, 1.03 if straw else 1.0),
        (0.0, 1.05 if straw else 1.0),
    ]
    wall = np.stack([middle + (flat - middle) * [s, 1, s] + [0, h * height, 0] for s, h in shape])
    reach = 0.62 if straw else 0.28
    brim = np.stack(
        [
            middle + (flat - middle) * [1 + reach * t, 1, 1 + reach * t] + [0, -0.9 * t**2 if straw else 0.5 * t**2, 0]
            for t in np.linspace(1, 0, 5)
        ]
    )
    band = np.stack([middle + (flat - middle) * [1.02, 1, 1.02] + [0, h, 0] for h in (0.05, 1.5)])
    return [sheet(wall, color), sheet(brim, color), sheet(band, linear(np.array(COLORS[context.headwear_color])) * 0.8)]


def headscarf(extra: float, color: np.ndarray, neck: float) -> list[Mesh]:
    """Cloth over head and neck that leaves the oval of the face free."""
    angle, t = np.linspace(0, 2 * np.pi, 48, endpoint=False)[None], np.linspace(0, 1, 14)[:, None]
    start = 0.84 - 0.20 * np.sin(angle) + 0.06 * np.cos(2 * angle)
    polar = start + (np.pi - start) * t
    direction = np.stack([np.sin(polar) * np.cos(angle), np.sin(polar) * np.sin(angle), np.cos(polar) + 0 * angle], -1)
    radius = np.minimum(skull(direction), 12.0)
    # cloth bridges the hollows around ears and jaw
    spanned = np.mean([np.roll(np.max([np.roll(radius, k, 1) for k in range(-3, 4)], 0), k, 1) for k in range(-3, 4)], 0)
    radius += (spanned - radius) * np.sqrt(t) + 0.35 + extra * np.minimum(8 * t, 1)
    radius += 0.9 * np.sin(np.pi * np.minimum(1.2 * t, 1)) ** 2 + 0.12 * np.cos(9 * angle + 9 * t) * np.sqrt(t)  # room for hair, and folds
    around = CENTER + direction * radius[..., None]
    rows = np.linspace(0, 1, 12)[:, None]
    a = np.linspace(0, 2 * np.pi, 64, endpoint=False)[None]
    fold = 0.5 * np.sqrt(rows) * np.cos(6 * a + 5 * rows + np.sin(2 * a))
    wide = (6.4 + 6.5 * rows**1.6 + fold) * neck
    drape = np.stack(
        [np.sin(a) * wide * (1.1 + 0.25 * rows), -3.9 - 9.5 * rows**0.8 - 2.0 * rows * np.cos(a), np.cos(a) * (0.8 * wide + 1.8) - 0.6], -1
    )
    return [sheet(around, color), sheet(drape, color * 0.93)]


def headwear(person: Person, context: Context, points: np.ndarray) -> list[Mesh]:
    """The context's headwear, fitted to the person's head without expression (N, 3)."""
    name = context.headwear
    if name == "none":
        return []
    style = STYLES[person.style]
    matrix, offset = skull_map(points)
    upper = (load().kind == SKIN) & (load().mean[:, 1] - TILT * load().mean[:, 2] > HAT_LINE)
    fitted = load().mean[upper] @ matrix + offset
    outwards = fitted - fitted.mean(0)
    outwards /= np.linalg.norm(outwards, axis=1, keepdims=True)
    # the person's raised scalp and bumps of the skull that the affine map misses raise the hat
    extra = max(float(((points[upper] - fitted) * outwards).sum(1).max()) - 0.3, 0.0)
    color = linear(np.array(COLORS[context.headwear_color]))
    if name in ("beanie", "santa hat"):
        meshes = soft_hat(context, extra, linear(np.array(COLORS["red"])) if name == "santa hat" else color)
    elif name == "headscarf":
        meshes = headscarf(extra, color, neck_scale(points))
    elif name == "headband":
        above = 0.5 + (style.volume * (0.75 + 0.7 * style.wave) if style else 0) + extra
        meshes = [
            sheet(
                dome(lambda a: 0.42 + 0.24 * np.cos(a), lambda up, a: above + 0.25 * np.sin(np.pi * np.minimum(up / 0.26, 1)) + 0 * a, 36)[
                    :10
                ],
                color,
            )
        ]
    elif name == "headphones":
        arc = np.linspace(-0.15, np.pi + 0.15, 25)
        above = 1.2 + (1.3 * style.volume if style else 0) + extra
        path = np.stack([np.cos(arc) * (9.3 + above * 0.6), 2.0 + np.sin(arc) * (12.2 + above), np.full(25, -0.6)], 1)
        meshes = [tube(path, 0.55, np.array([0.02, 0.02, 0.022]))]
        meshes += [ball(np.array([(9.1 + 0.5 * above) * side, 1.6, -0.6]), (1.3, 3.0, 2.6), color, GLOSS) for side in (-1, 1)]
    else:
        meshes = stiff_hat(context, extra, color)
    return [Mesh((m.points @ matrix + offset).astype(np.float32), m.triangles, m.material, m.colors) for m in meshes]


def eyewear(context: Context, points: np.ndarray) -> list[Mesh]:
    """The context's glasses on the person's nose: rims, bridge, temples, and dark lenses of sunglasses."""
    if context.eyewear == "none":
        return []
    head = load()
    eyes = [points[(head.kind == EYE) & (head.mean[:, 0] * side > 0)].mean(0) for side in (1, -1)]
    nose = (np.abs(head.mean[:, 0]) < 1.0) & (head.mean[:, 1] > 2.2) & (head.mean[:, 1] < 3.8) & (head.kind == SKIN)
    front = points[nose, 2].max() + 0.12
    wide, high, power = {"glasses": (2.55, 1.75, 0.62), "round glasses": (2.2, 2.2, 1.0), "sunglasses": (2.8, 2.15, 0.72)}[context.eyewear]
    dark = context.eyewear == "sunglasses" or context.seed % 3
    color = np.array([0.012, 0.011, 0.012]) if dark else np.array([0.20, 0.085, 0.03])
    rim = 0.13 if context.eyewear == "round glasses" else 0.2
    a = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    meshes = []
    for eye in eyes:
        side = np.sign(eye[0])
        x = eye[0] + 0.12 * side + wide * np.sign(np.cos(a)) * np.abs(np.cos(a)) ** power
        y = eye[1] - 0.25 + high * np.sign(np.sin(a)) * np.abs(np.sin(a)) ** power
        outline = np.stack([x, y, front - 0.028 * x**2], 1)
        meshes.append(tube(outline, rim, color, closed=True))
        if context.eyewear == "sunglasses":
            middle = np.add(outline.mean(0), (0, 0, 0.25))
            meshes.append(
                sheet(
                    np.stack([np.tile(middle, (28, 1)), (outline + middle) / 2 + [0, 0, 0.1], outline]),
                    np.array([0.018, 0.018, 0.022]),
                    True,
                    GLOSS,
                )
            )
        ear = points[np.square(head.mean - [8.6 * side, 3.6, -0.6]).sum(1).argmin()]
        start = np.array([eye[0] + (wide + 0.15) * side, eye[1] + 0.45, front - 0.028 * (abs(eye[0]) + wide) ** 2])
        meshes.append(
            tube(
                np.stack(
                    [
                        start,
                        np.add(start, (0.45 * side, 0, -0.9)),
                        np.add(ear, (0.55 * side, 0.5, 0)),
                        np.add(ear, (0.2 * side, -0.8, -1.6)),
                    ]
                ),
                0.17,
                color,
            )
        )
    inner = [eye[0] - (wide - 0.15) * np.sign(eye[0]) for eye in eyes]
    height = (eyes[0][1] + eyes[1][1]) / 2 + 0.15
    bridge = np.stack(
        [[x, height + 0.25 * (1 - (2 * k / 6 - 1) ** 2), front + 0.05] for k, x in enumerate(np.linspace(inner[0], inner[1], 7))]
    )
    meshes.append(tube(bridge, rim, color))
    return meshes


def neck_scale(points: np.ndarray) -> float:
    """Width of the person's neck relative to the mean head's, limited to 0.85 to 1.25."""
    band = np.abs(load().mean[:, 1] + 10) < 0.7
    return float(np.clip(np.abs(points[band, 0]).max() / np.abs(load().mean[band, 0]).max(), 0.85, 1.25))


def shoulders(person: Person, neckline: Callable[[np.ndarray], np.ndarray], start: float, scale: float, out: float = 0.0) -> np.ndarray:
    """The surface of clothes from a neckline (height by azimuth) down over the shoulders: points (rows, columns, 3)."""
    a = np.linspace(-np.pi, np.pi, 56, endpoint=False)[None]
    t = np.concatenate([np.linspace(0, 1, 11), [1.15, 1.6]])[:, None]
    reach = (21.0 if person.sex == "man" else 18.0) + out
    wide = start * scale + (reach - start * scale) * np.minimum(t, 1) ** 0.85
    deep = start * scale + 0.3 + (9.8 - start * scale) * np.minimum(t, 1) ** 0.7
    fall = 6.5 * np.minimum(t, 1) ** 1.6 + 12 * np.maximum(t - 1, 0)
    y = neckline(a) * (1 - np.minimum(t * 1.6, 1)) + (-11.6 + out) * np.minimum(t * 1.6, 1) - fall * (0.45 + 0.55 * np.abs(np.sin(a)))
    return np.stack([np.sin(a) * wide, y, np.cos(a) * (deep + out) - 1.6], -1)


def collar(color: np.ndarray, scale: float) -> Mesh:
    """A shirt's collar, which stands up around the neck, folds over and is open in front."""
    a = np.linspace(0.20, 2 * np.pi - 0.20, 40)[None]
    front = np.exp(-np.square(np.minimum(a, 2 * np.pi - a) / 0.55))
    rows = []
    for radius, y, drop in ((6.6, -12.0, 1.2), (6.7, -9.9, 2.2), (7.3, -10.3, 2.5), (8.3, -12.2, 3.0)):
        rows.append(
            np.stack([np.sin(a) * radius * scale, y - drop * front - 0.4 * np.cos(a), np.cos(a) * (radius + 0.2) * scale - 1.2], -1)[0]
        )
    return sheet(np.stack(rows), color, wrap=False)


def clothes(person: Person, context: Context, points: np.ndarray) -> list[Mesh]:
    """Clothes around the person's neck, in the body's frame."""
    color = linear(np.array(COLORS[context.clothes_color]))
    scale = neck_scale(points)

    def crew(a: np.ndarray) -> np.ndarray:
        return -11.0 - 1.0 * np.cos(a) - 0.4 * np.cos(a) ** 2

    def deep(a: np.ndarray) -> np.ndarray:
        return crew(a) - 7.0 * np.exp(-np.square(a / 0.42))

    name = context.clothes
    if name == "v-neck":
        return [sheet(shoulders(person, deep, 7.2, scale), color)]
    body = sheet(shoulders(person, crew, 6.9, scale), color)
    if name == "turtleneck":
        a, t = np.linspace(-np.pi, np.pi, 40, endpoint=False)[None], np.linspace(0, 1, 6)[:, None]
        wide = (6.25 + 0.9 * t**2 + 0.2 * np.sin(np.pi * t)) * scale
        neck = np.stack([np.sin(a) * wide, -8.4 - 4.2 * t - 0.9 * np.cos(a), np.cos(a) * (wide + 0.1) - 0.9], -1)
        return [body, sheet(neck, color)]
    if name == "hoodie":
        a = np.linspace(-np.pi, np.pi, 40, endpoint=False)
        ring = np.stack([np.sin(a) * 8.2 * scale, -12.0 - 1.6 * np.cos(a), np.cos(a) * 7.8 * scale - 2.2], 1)
        return [body, tube(ring, 1.5 - 0.4 * np.cos(a), color * 0.9, closed=True, material=CLOTH)]
    if name == "shirt":
        return [body, collar(color * 1.2 + 0.06, scale)]
    if name == "suit":
        jacket = shoulders(person, lambda a: crew(a) - 0.6 - 9.0 * np.exp(-np.square(a / 0.50)), 8.0, scale, 0.5)
        z = 7.4 * scale
        tie = np.array(
            [
                [[-0.7, -12.6, z + 0.1], [0.7, -12.6, z + 0.1]],
                [[-0.5, -13.8, z + 0.4], [0.5, -13.8, z + 0.4]],
                [[-1.3, -20, z + 0.9], [1.3, -20, z + 0.9]],
            ]
        )
        inner = sheet(shoulders(person, crew, 6.9, scale, -0.4), WHITE * 0.9)
        tie_color = linear(np.array(list(COLORS.values())[context.seed % len(COLORS)])) * 0.8
        return [sheet(jacket, color * 0.5 + 0.01), inner, collar(WHITE * 0.9, scale), sheet(tie, tie_color, wrap=False)]
    return [body]


def dress(person: Person, context: Context, points: np.ndarray) -> tuple[list[Mesh], list[Mesh]]:
    """Meshes that turn with the head (headwear, glasses), and meshes that stay with the body (clothes)."""
    return headwear(person, context, points) + eyewear(context, points), clothes(person, context, points)


def hat_line(context: Context) -> float:
    """The height (cm) above which hair lies flat under a hat; 99 without a hat."""
    return HAT_LINE if context.headwear in HAIR_LIES_FLAT else 99.0
