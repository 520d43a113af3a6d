"""Hair and full beards: several hundred locks, each a ribbon that grows from the scalp in the direction of its style, falls with
gravity, and stays outside the head.

Locks are grown around the mean head and fitted to the person's skull by an affine map. Below them is the painted scalp, slightly raised
(`cap`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .head import SKIN, load
from .locks import COLUMNS, ROWS, TILT, grow, ribbons
from .people import Person
from .scene import Mesh
from .shade import HAIR
from .skin import BEARD, GOATEE, MUSTACHE, SCALP, above_hairline, regions, smooth

CENTER = np.array([0.0, 3.0, 1.0], np.float32)
ROOTS, BEARD_ROOTS, SEGMENTS = 640, 170, 8


@dataclass(frozen=True)
class Style:
    """How locks grow. Lengths are in cm; `end` is the height (y) at which locks are cut."""

    flow: str  # crown, part, back, up, forward, target
    top: float  # length on top
    sides: float  # length on the sides and the back
    end: float = -30.0
    lift: float = 0.2  # how steeply locks leave the scalp, on top
    gravity: float = 0.25
    back: float = 0.0  # how strongly locks bend to the back
    volume: float = 0.7  # how far above the scalp the outer locks lie
    wave: float = 0.0  # amplitude
    turns: float = 0.0  # radians a cm
    width: float = 0.62  # half a lock's width
    fringe: float = 0.0  # length of locks that fall over the forehead
    cap: float = 0.3
    part: float = 2.0  # x of the parting
    target: tuple[float, float, float] = (0.0, 11.0, -8.0)


STYLES: dict[str, Style | None] = {
    "bald": None,
    "buzz": None,
    "receding": Style("crown", 1.5, 1.0, lift=0.3, volume=0.35, width=0.34, cap=0.2),
    "short": Style("crown", 2.4, 1.2, lift=0.5, gravity=0.3, volume=0.7, width=0.36, fringe=1.2),
    "side part": Style("part", 5.5, 1.5, lift=0.32, gravity=0.3, volume=0.9, width=0.42),
    "quiff": Style("up", 5.2, 1.1, lift=0.75, gravity=0.12, back=0.3, volume=1.0, width=0.42),
    "pixie": Style("part", 5.5, 2.6, end=0.5, lift=0.3, gravity=0.3, volume=0.8, fringe=6.0, part=3.0, width=0.42),
    "bob": Style("part", 18, 13, end=-5.0, lift=0.35, gravity=0.35, volume=1.2, part=1.5, width=0.5),
    "long": Style("part", 32, 28, end=-15.0, lift=0.3, gravity=0.35, volume=1.1, part=0.3, width=0.55),
    "long fringe": Style("part", 32, 28, end=-13.0, lift=0.3, gravity=0.35, volume=1.1, fringe=6.5, part=0.0, width=0.52),
    "wavy": Style("part", 26, 22, end=-11.0, lift=0.45, gravity=0.3, volume=1.6, wave=0.42, turns=1.0, part=2.2, width=0.55),
    "curly": Style("crown", 8.0, 8.0, end=-6.0, lift=0.9, gravity=0.22, volume=1.9, wave=0.7, turns=2.2, width=0.45),
    "afro": Style("crown", 4.5, 4.2, lift=1.5, gravity=0.0, volume=0.9, wave=0.6, turns=3.2, width=0.5, cap=2.0),
    "bun": Style("target", 17, 17, lift=0.1, gravity=0.0, volume=0.3, width=0.5, target=(0.0, 14.8, -2.0), cap=0.35),
    "ponytail": Style("target", 17, 17, lift=0.1, gravity=0.0, volume=0.3, width=0.5, target=(0.0, 9.5, -8.8), cap=0.35),
}


@lru_cache(maxsize=1)
def radii() -> np.ndarray:
    """Distance of the mean head's surface from `CENTER` by direction, (ROWS, COLUMNS): elevation from straight down to up, azimuth."""
    from scipy.ndimage import gaussian_filter

    p = load().positions[2:-2].reshape(-1, 3) - CENTER
    distance = np.linalg.norm(p, axis=1)
    row = np.clip(((np.arcsin(p[:, 1] / distance) / np.pi + 0.5) * ROWS).astype(int), 0, ROWS - 1)
    column = ((np.arctan2(p[:, 0], p[:, 2]) / (2 * np.pi) + 0.5) * COLUMNS).astype(int) % COLUMNS
    out = np.zeros((ROWS, COLUMNS))
    np.maximum.at(out, (row, column), np.minimum(distance, 13))
    out = np.where(
        out > 0,
        out,
        gaussian_filter(out, 2, mode=("nearest", "wrap")) / np.maximum(gaussian_filter((out > 0) * 1.0, 2, mode=("nearest", "wrap")), 1e-3),
    )
    return gaussian_filter(out, (1.0, 1.2), mode=("nearest", "wrap")).astype(np.float32)


@lru_cache(maxsize=1)
def roots() -> tuple[np.ndarray, np.ndarray]:
    """Roots of locks, (ROOTS, 3), spread evenly over the scalp, and roots of the beard, (BEARD_ROOTS, 3)."""
    positions = load().positions
    across, down = np.gradient(positions, axis=1), np.gradient(positions, axis=0)
    area = np.linalg.norm(np.cross(across, down), axis=-1)
    area[:, :1], area[:, -1:], area[:2], area[-2:] = 0, 0, 0, 0
    found = []
    for mask, count in (
        (regions()[SCALP] > 0.15, ROOTS),
        (regions()[BEARD] > 0.55, BEARD_ROOTS),
    ):
        generator = np.random.default_rng(5)
        weight = np.where(mask, np.minimum(area, 0.05), 0).ravel()
        total = weight.cumsum()
        candidates = positions.reshape(-1, 3)[np.searchsorted(total, generator.random(count * 8) * total[-1])]
        # farthest-point sampling from eight times as many candidates
        chosen = [0]
        distance = np.full(len(candidates), np.inf)
        for _ in range(count - 1):
            distance = np.minimum(distance, np.square(candidates - candidates[chosen[-1]]).sum(1))
            chosen.append(int(distance.argmax()))
        found.append(candidates[chosen].astype(np.float32))
    return found[0], found[1]


@lru_cache(maxsize=8)
def ribbon_triangles(locks: int, count: int) -> np.ndarray:
    k, j = np.meshgrid(np.arange(locks), np.arange(count - 1), indexing="ij")
    a = ((k * count + j) * 2).ravel()
    return np.concatenate([np.stack([a, a + 1, a + 2], 1), np.stack([a + 1, a + 3, a + 2], 1)]).astype(np.int32)


def skull_map(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The affine map (3, 3), (3,) that takes the mean skull to a person's."""
    mean = load().mean
    chosen = np.flatnonzero((load().kind == SKIN) & (mean[:, 1] > 2) & (np.abs(mean[:, 0]) < 8.3))[::7]
    source, wanted = mean[chosen].astype(np.float64), points[chosen].astype(np.float64)
    center = source.mean(0)
    matrix = np.linalg.solve((source - center).T @ (source - center), (source - center).T @ (wanted - wanted.mean(0)))
    return matrix, wanted.mean(0) - center @ matrix


def flows(style: Style, root: np.ndarray, normal: np.ndarray, top: np.ndarray, g: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Initial directions of locks (K, 3), and whether each belongs to the fringe (K,), 0 or 1."""
    x, _, z = root.T
    down = np.array([0, -1.0, 0])
    fringe = np.zeros(len(root))
    if style.flow == "crown":
        flow = root - np.array([1.0, 13.5, -4.0])
    elif style.flow == "part":
        side = np.where(x > style.part, 1.0, -1.0)
        flow = np.stack([side, -0.25 + 0 * x, 0.30 - 0.55 * (1 - smooth(2, 7, z))], 1)
        flow = flow * top[:, None] + (down + np.array([0, 0, -0.25])) * (1 - top[:, None])
    elif style.flow == "up":
        flow = np.array([0.25, 0.6, -0.55]) * top[:, None] + (down + np.array([0, 0, -0.4])) * (1 - top[:, None])
    else:
        flow = np.array(style.target) - root
    if style.fringe:
        fringe = smooth(4.5, 6.5, z) * smooth(6.5, 4.5, np.abs(x - 0.25 * style.part)) * (top > 0.3)
        fringe = np.round(fringe)
        over = np.stack([-0.14 * x + (-0.7 if style.flow == "part" and style.part > 1 else 0), -0.5 + 0 * x, 1 + 0 * x], 1)
        flow = flow * (1 - fringe[:, None]) + over * fringe[:, None]
    far = np.linalg.norm(flow, axis=1, keepdims=True)
    flow = flow / far + g.normal(0, 0.16, root.shape)
    flow -= normal * (flow * normal).sum(1, keepdims=True)
    flow /= np.maximum(np.linalg.norm(flow, axis=1, keepdims=True), 1e-6)
    lift = style.lift * (0.35 + 0.65 * top) * (1 - 0.6 * fringe)
    lift = lift * smooth(-1, 4, far[:, 0]) if style.flow == "crown" else lift  # otherwise locks at the whorl would stand straight up
    lift = lift * smooth(-8, 7, z) * (0.3 + 0.7 * top) if style.flow == "up" else lift  # a quiff rises only in front
    out = flow + normal * (lift * np.exp(g.normal(0, 0.25, len(root))))[:, None]
    return out / np.linalg.norm(out, axis=1, keepdims=True), fringe


@lru_cache(maxsize=1)
def hairlines() -> tuple[np.ndarray, np.ndarray]:
    """`above_hairline` of the mean head's vertices and of the roots."""
    return above_hairline(load().mean), above_hairline(roots()[0])


@lru_cache(maxsize=1)
def beard_vertices() -> np.ndarray:
    """The vertex nearest to each root of a beard."""
    skin = np.flatnonzero(load().kind == SKIN)
    return np.array([skin[np.square(load().mean[skin] - r).sum(1).argmin()] for r in roots()[1]])


def shifted_hairline(person: Person, points: np.ndarray, height: np.ndarray) -> np.ndarray:
    """`above_hairline` of points (given as `height`), minus how far the person's hairline recedes; the same as in `skin.paint`."""
    angle = np.arctan2(points[:, 0], points[:, 2] - 0.5)
    t = np.abs(angle) / np.pi
    u = t * (1.5 - 0.5 * t)
    back = person.hairline * smooth(0.42, 0.2, u) + person.temples * smooth(0.1, 0.3, u) * smooth(0.55, 0.4, u)
    return height - back


@dataclass(frozen=True)
class Locks:
    """Ribbons on the person's neutral head; `vertices` (K,) is the head vertex whose motion each lock follows, -1 for none."""

    mesh: Mesh
    vertices: np.ndarray

    @property
    def of_point(self) -> np.ndarray:
        return np.repeat(self.vertices, len(self.mesh.points) // max(len(self.vertices), 1))


def locks_mesh(
    paths: np.ndarray,
    widths: np.ndarray,
    color: np.ndarray,
    matrix: np.ndarray,
    offset: np.ndarray,
    g: np.random.Generator,
    dark: np.ndarray,
    hat: float = 99.0,
) -> Mesh:
    count = paths.shape[0] * paths.shape[1] * 2
    rolls = g.normal(0, 0.5, len(paths))[:, None] * np.where(paths[..., 1] > hat + TILT * paths[..., 2], 0.1, 1)
    paths = (paths @ matrix + offset).astype(np.float32)
    points, normals, tangents = (np.empty((count, 3), np.float32) for _ in range(3))
    ribbons(paths, widths.astype(np.float32), rolls.astype(np.float32), CENTER, points, normals, tangents)
    t = np.linspace(0, 1, paths.shape[1])
    tone = np.exp(g.normal(0, 0.16, len(paths)))[:, None] * (0.72 + 0.40 * t)[None]
    colors = (color[None, None] * np.repeat(tone, 2, 1)[..., None]).reshape(-1, 3)
    # u: position across the lock plus an offset for each lock; shading draws strands from it
    uv = np.column_stack(
        [np.tile([0.0, 1.0], count // 2) + np.repeat(np.arange(len(paths)) * 1.37 % 40, paths.shape[1] * 2), np.zeros(count)]
    )
    openness = np.repeat(dark[:, None] * (0.45 + 0.55 * np.minimum(t * 2.5, 1))[None], 2, 1).ravel()
    return Mesh(points, ribbon_triangles(*paths.shape[:2]), HAIR, colors, normals, tangents, uv, openness)


def tie(style: Style, count: int, g: np.random.Generator) -> np.ndarray:
    """Paths of locks beyond the point where hair is tied, (K, count, 3): a bun of locks around a ball, or a ponytail."""
    t = np.linspace(0, 1, count)[None, :, None]
    target = np.array(style.target)
    if target[1] > 12:
        axis = g.normal(0, 1, (70, 3))
        axis /= np.linalg.norm(axis, axis=1, keepdims=True)
        a = np.cross(axis, [0.3, 0.9, 0.2])
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        b = np.cross(axis, a)
        angle = g.uniform(0, 2 * np.pi, 70)[:, None, None] + t * 2.2
        return target + np.array([0, 1.5, -0.3]) + 2.3 * (a[:, None] * np.cos(angle) + b[:, None] * np.sin(angle)) * [1.1, 0.85, 1.0]
    spread = g.normal(0, 1, (60, 1, 3)) * [1.1, 0.3, 0.7]
    hang = np.array([0, -1, 0]) * 19 * t * g.uniform(0.75, 1, (60, 1, 1)) + np.array([0, 0.6, -2.6]) * np.sin(
        np.pi * np.minimum(t * 1.6, 1)
    )
    return target + hang + spread * (0.35 + np.sin(np.pi * t))


def hair(person: Person, points: np.ndarray, hat: float = 99.0) -> Locks | None:
    """The person's hair on a neutral head (N, 3), or None without locks; it lies flat above the height `hat` (cm) of a hat's edge."""
    style = STYLES[person.style]
    if style is None:
        return None
    g = np.random.default_rng([person.seed_hair, 3])
    scale = float(np.exp(g.normal(0, 0.14)))
    style = replace(
        style,
        volume=style.volume * scale,
        top=style.top * scale,
        end=style.end + g.normal(0, 1.2),
        part=style.part * (1 if g.random() < 0.5 else -1),
    )
    root = roots()[0] + g.normal(0, 0.12, (ROOTS, 3)).astype(np.float32)
    inside = shifted_hairline(person, root, hairlines()[1])
    if style.end < -29:  # short hair keeps off the ears
        ear = (np.abs(root[:, 0]) > 7) & (np.abs(root[:, 1] - 1) < 3.4) & (root[:, 2] > -4)
        inside = np.where(ear, -1, inside)
    root, inside = root[inside > 0.1], inside[inside > 0.1]
    normal = root - CENTER
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    top = smooth(6.5, 9.5, root[:, 1])
    direction, fringe = flows(style, root, normal, top, g)
    length = style.top * top + style.sides * (1 - top)
    length = length * (1 - fringe) + max(style.fringe, 0.5) * fringe if style.fringe else length
    if style.wave > 0.6:  # curls over the forehead are shorter
        length = length * (1 - 0.5 * smooth(3, 7, root[:, 2]))
    length = length * np.exp(g.normal(0, 0.10, len(root)))
    if (
        style.flow in ("crown", "up", "part") and style.end < -29
    ) or style.flow == "target":  # short or tied hair follows the hairline closely
        length = length * (0.45 + 0.55 * smooth(0, 2.0, inside)) * (0.4 + 0.6 * smooth(2, 6, root[:, 1]))
    if style.flow == "target":
        length = np.minimum(length, np.linalg.norm(root - np.array(style.target), axis=1) * 1.12)
    ragged = g.normal(0, 0.5, len(root))
    end = style.end + ragged + 1.5 * smooth(0, 6, root[:, 2])
    end = np.where(fringe > 0, np.maximum(end, 7.0 + 0.7 * ragged), end)  # above the brows
    style = replace(style, volume=min(style.volume, 0.4)) if hat < 90 else style
    close = 0.2 if style.sides < 2 else 0.45
    clearance = style.volume * g.random(len(root)) ** 0.8 * (close + (1 - close) * top) * (1 - 0.5 * fringe)
    clearance += 0.12 + max(style.cap - 0.4, 0)
    wave = style.wave * (0.7 + 0.6 * person.curl) + (0.22 * person.curl if style.end > -29 else 0.08 * person.curl)
    aside = np.where(root[:, 0] > style.part, 1.0, -1.0) * (fringe < 0.3) if style.flow == "part" else np.sign(root[:, 0]) * (length > 4)
    paths = np.empty((len(root), SEGMENTS + 1 + 4 * (style.wave > 0.4), 3), np.float32)
    tight = np.maximum(fringe, style.flow == "target" or style.cap > 1)
    phase = g.random(len(root)) * 2 * np.pi * (1 if style.wave > 0.6 else 0.25)
    from_root = (np.ascontiguousarray(a, np.float32) for a in (root, direction, length, clearance, aside))
    falling = (np.float32(style.gravity), np.float32(style.back), end.astype(np.float32), tight.astype(np.float32), np.float32(hat))
    waving = (np.float32(wave), np.float32(style.turns or 0.8), phase.astype(np.float32))
    grow(*from_root, *falling, *waving, CENTER, radii(), paths)
    matrix, offset = skull_map(points)
    outer = smooth(0.0, 0.8, (clearance - clearance.min()) / max(style.volume, 0.1))
    widths = 1.08 * style.width * np.exp(g.normal(0, 0.18, len(root))) * (0.75 + 0.25 * top)
    dark = 0.55 + 0.45 * outer
    if style.flow == "target" and hat > 90:
        tied = tie(style, paths.shape[1], g)
        paths, widths, dark = (
            np.concatenate([paths, tied]),
            np.concatenate([widths, np.full(len(tied), 0.5)]),
            np.concatenate([dark, np.ones(len(tied))]),
        )
    mesh = locks_mesh(paths, widths, person.hair_color, matrix, offset, g, dark, hat)
    root = paths[:, 0]
    return Locks(mesh, np.full(len(root), -1))


def beard(person: Person, points: np.ndarray) -> Locks | None:
    """Locks of a full beard; None otherwise, since shorter beards are painted."""
    if person.beard != "full":
        return None
    g = np.random.default_rng([person.seed_hair, 4])
    root = roots()[1]
    near = beard_vertices()
    moved = root + points[near] - load().mean[near]
    direction = np.stack([0.05 * root[:, 0], -0.9 + 0 * root[:, 0], 0.15 + 0.30 * smooth(2, 8, root[:, 2])], 1) + g.normal(
        0, 0.07, root.shape
    )
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    length = (0.7 + 1.3 * smooth(-3, -7, root[:, 1]) * g.uniform(0.7, 1.4)) * np.exp(g.normal(0, 0.15, len(root)))
    t = np.linspace(0, 1, 5)[None, :, None]
    outward = np.stack([root[:, 0] / 8, 0 * root[:, 0], root[:, 2] / 10], 1)[:, None]
    paths = moved[:, None] + direction[:, None] * length[:, None, None] * t + outward * 0.25 * np.sqrt(t)
    mesh = locks_mesh(
        paths.astype(np.float32), np.full(len(root), 0.42), person.hair_color, np.eye(3), np.zeros(3), g, np.full(len(root), 0.9)
    )
    return Locks(mesh, near)


def cap(person: Person) -> np.ndarray:
    """How far each vertex under the painted scalp and beard is raised, (N,) cm."""
    head = load()
    style = STYLES[person.style]
    height = 0.0 if person.style == "bald" else 0.14 if style is None else style.cap
    raised = height * smooth(0.1, 1.6 + 0.6 * max(height - 0.4, 0), shifted_hairline(person, head.mean, hairlines()[0]))
    row = np.clip(head.uv[:, 1].astype(int), 0, regions().shape[1] - 1)
    column = np.clip(head.uv[:, 0].astype(int), 0, regions().shape[2] - 1)
    at = regions()[[BEARD, MUSTACHE, GOATEE]][:, row, column]
    grown = (at * np.maximum(np.array(person.beard_cover) - 0.5, 0)[:, None]).max(0)
    return np.where(head.kind == SKIN, raised + 0.5 * grown, 0).astype(np.float32)
