"""A scene: the person's posed head with hair, clothes and everything worn, as one list of triangles."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from .contexts import EXPRESSIONS, Context
from .head import EYE, EYE_CENTER, LASH, SKIN, TEETH, TONGUE, Head, add_modes, add_sparse, load
from .kernels import kernel
from .people import Person
from .raster import vertex_normals

PIVOT = np.array([0.0, -4.5, -1.0], np.float32)
"""The point about which the head turns."""


@dataclass
class Mesh:
    """Triangles with all inputs of shading; `material` is one for the whole mesh or one per triangle."""

    points: np.ndarray  # (N, 3) float32
    triangles: np.ndarray  # (T, 3) int32
    material: int | np.ndarray
    colors: np.ndarray  # (3,) or (N, 3) linear
    normals: np.ndarray | None = None  # computed where None
    tangents: np.ndarray | None = None  # only hair has them
    uv: np.ndarray | None = None
    openness: np.ndarray | float = 1.0


@dataclass
class Scene:
    points: np.ndarray
    triangles: np.ndarray
    materials: np.ndarray
    normals: np.ndarray
    tangents: np.ndarray
    colors: np.ndarray
    uv: np.ndarray
    closed: int = 0  # number of triangles, from the first on, whose back faces are culled


def merge(meshes: list[Mesh]) -> Scene:
    """Joins meshes into one list of triangles; the head's mesh must come first."""
    count, faces = sum(len(m.points) for m in meshes), sum(len(m.triangles) for m in meshes)
    scene = Scene(
        np.empty((count, 3), np.float32), np.empty((faces, 3), np.int32), np.empty(faces, np.uint8), np.empty((count, 3), np.float32),
        np.zeros((count, 3), np.float32), np.empty((count, 4), np.float32), np.zeros((count, 2), np.float32),
    )  # fmt: skip
    v = t = 0
    scene.closed = load().closed
    for mesh in meshes:
        at, of = slice(v, v + len(mesh.points)), slice(t, t + len(mesh.triangles))
        scene.points[at], scene.triangles[of], scene.materials[of] = mesh.points, mesh.triangles + v, mesh.material
        if mesh.normals is None:
            vertex_normals(np.ascontiguousarray(mesh.points, np.float32), mesh.triangles, scene.normals[at])
        else:
            scene.normals[at] = mesh.normals
        if mesh.tangents is not None:
            scene.tangents[at] = mesh.tangents
        if mesh.uv is not None:
            scene.uv[at] = mesh.uv
        scene.colors[at, :3], scene.colors[at, 3] = mesh.colors, mesh.openness
        v, t = at.stop, of.stop
    return scene


@kernel
def turn(points, weights, yaw, pitch, body, pivot):
    """Rotates points in place (angles in radians): points of weight 1 as the head, points of weight 0 as the body."""
    last = np.float32(-1)
    ca = sa = ct = st = np.float32(0)
    for i in range(len(points)):
        w = weights[i]
        if w != last:
            last = w
            angle, tilt = np.float32(body + (yaw - body) * w), np.float32(-pitch * w)
            ca, sa, ct, st = np.cos(angle), np.sin(angle), np.cos(tilt), np.sin(tilt)
        x, y, z = points[i, 0] - pivot[0], points[i, 1] - pivot[1], points[i, 2] - pivot[2]
        y, z = y * ct - z * st, y * st + z * ct
        x, z = x * ca + z * sa, z * ca - x * sa
        points[i, 0], points[i, 1], points[i, 2] = x + pivot[0], y + pivot[1], z + pivot[2]


def smooth(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


@dataclass
class Pose:
    """Rotations of head and body (degrees), applied to points in the head's own frame."""

    yaw: float
    pitch: float
    body: float = field(init=False)

    def __post_init__(self) -> None:
        self.body = 0.35 * self.yaw

    def __call__(self, points: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
        points = np.array(points, np.float32)
        full = np.broadcast_to(np.asarray(weights, np.float32), len(points))
        turn(points, np.ascontiguousarray(full), *np.radians(np.float32([self.yaw, self.pitch, self.body])), PIVOT)
        return points

    def mesh(self, mesh: Mesh, points: np.ndarray | None = None) -> Mesh:
        """A mesh of the head's frame, rotated; lower points follow the head less."""
        points = mesh.points if points is None else points
        weights = self.neck(points[:, 1])
        normals, tangents = (None if a is None else self(a + PIVOT, weights) - PIVOT for a in (mesh.normals, mesh.tangents))
        return replace(mesh, points=self(points, weights), normals=normals, tangents=tangents)

    def neck(self, height: np.ndarray) -> np.ndarray:
        """How much points at a height (cm) follow the head's rotation, 0 to 1."""
        return smooth(-13.5, -7.0, height)


def neutral(person: Person) -> np.ndarray:
    """The person's head without expression, (N, 3)."""
    head = load()
    points = head.mean.copy()
    add_modes(points, head.identities, person.modes)
    blink, squint = person.lids
    express(points, {"eyeBlink": blink, "eyeSquint": squint})
    # the head is scaled as a whole, but not the lower end of the neck, because the shoulders stay where they are
    weight = smooth(-16, -9, head.mean[:, 1])[:, None]
    center = np.array([0, 0, 2], np.float32)
    points += (points - center) * (person.stretch - 1) * weight
    # narrows the lower end of the neck to fit inside the clothes, which have shoulders of their own
    low = 1 - smooth(-11.6, -8.8, head.mean[:, 1])
    reach = np.hypot(points[:, 0] / 6.3, (points[:, 2] + 0.9) / 6.5)
    inwards = (1 / np.maximum(reach, 1) - 1) * low
    points[:, 0] += points[:, 0] * inwards
    points[:, 2] += (points[:, 2] + 0.9) * inwards
    return points.astype(np.float32)


def express(points: np.ndarray, amounts: dict[str, float]) -> None:
    """Adds expression shapes to points, in place."""
    shapes = load().expressions
    for name, amount in amounts.items():
        for key in (name,) if name in shapes else (f"{name}_L", f"{name}_R"):
            add_sparse(points, *shapes[key], np.float32(amount))


def expression(person: Person, context: Context) -> dict[str, float]:
    """Weights of a context's expression shapes, with the eyes turned about half of the way back to the viewer."""
    amounts = dict(EXPRESSIONS[context.expression])
    gaze = float(np.clip(context.yaw / 30 * 0.45, -0.6, 0.6))
    for name, amount in (("eyeLookIn_L", -gaze), ("eyeLookOut_R", -gaze), ("eyeLookOut_L", gaze), ("eyeLookIn_R", gaze)):
        if amount < 0:
            amounts[name] = -amount
    if context.pitch:
        amounts["eyeLookDown" if context.pitch > 0 else "eyeLookUp"] = min(abs(context.pitch) / 40, 0.4)
    return amounts


TINT = {
    0: (0.5, 0.5, 0.5),
    1: (0.26, 0.075, 0.065),
    2: (0.70, 0.66, 0.58),
    3: (0.40, 0.14, 0.13),
    4: (0.7, 0.7, 0.7),
    5: (0.015, 0.012, 0.010),
}
"""Linear colors of the head's parts (those of skin and eyes are replaced by the texture and the iris)."""


def head_uv(head: Head) -> np.ndarray:
    """Texture coordinates (N, 2): atlas coordinates of skin, offsets (cm) from the pupil for eyes, the tooth's position along the arch for
    teeth.
    """
    uv = head.uv.copy()
    eye = head.kind == EYE
    side = np.where(head.mean[eye, 0] > 0, 1, -1)
    uv[eye] = np.column_stack([head.mean[eye, 0] * side - EYE_CENTER[0], head.mean[eye, 1] - EYE_CENTER[1]])
    teeth = head.kind == TEETH
    x = head.mean[teeth, 0]
    uv[teeth] = np.column_stack([np.where(head.mean[teeth, 1] > -3.35, x / 0.78, x / 0.52 + 0.5), x])
    return uv


_fixed: dict[str, np.ndarray] = {}


def head_mesh(points: np.ndarray) -> Mesh:
    """The head's mesh at given points (N, 3), with each vertex's openness to the sky for shading."""
    head = load()
    if not _fixed:
        first = head.kind[head.triangles[:, 0]]
        _fixed["material"] = first
        _fixed["uv"] = head_uv(head)
        _fixed["colors"] = np.array([TINT[k] for k in head.kind], np.float32)
        opened = 0.25 + 0.75 * smooth(0.0, 0.9, head.openness)
        inside = np.isin(head.kind, (TONGUE, TEETH))
        _fixed["openness"] = np.where(
            inside, 0.75, np.where(head.kind == SKIN, opened, np.where(head.kind == EYE, 0.85, np.where(head.kind == LASH, 1, 0.55)))
        )
        deep = smooth(5.0, 10.5, head.mean[:, 2])
        _fixed["colors"][head.kind == 1] *= 0.15 + 0.85 * deep[head.kind == 1, None] ** 2
    normals = np.empty_like(points)
    vertex_normals(points, head.triangles, normals)
    return Mesh(points, head.triangles, _fixed["material"], _fixed["colors"], normals, None, _fixed["uv"], _fixed["openness"])
