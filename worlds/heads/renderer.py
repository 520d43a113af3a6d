"""Renders a picture of a person in a context."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from . import filters, hair, wear
from .backgrounds import background
from .contexts import LIGHTS, Context
from .head import load
from .people import Person
from .raster import EMPTY, camera_screen, light_screen, rasterize, rasterize_depth, vertex_normals
from .scene import Mesh, Pose, Scene, express, expression, head_mesh, merge, neutral
from .shade import develop, film, shade
from .skin import texture

DISTANCE, SPAN = 75.0, 35.5
"""The camera's distance, and the height in cm that a picture shows at the distance of `CENTER`."""
CENTER = np.array([0.0, 2.3, 0.0], np.float32)
SHADOW_SIZE, SHADOW_HALF = 176, np.float32(22)


@lru_cache(maxsize=4)
def prepared(person: Person) -> tuple[np.ndarray, np.ndarray]:
    """The parts of a person that don't depend on the context: the head without expression (N, 3) and the skin's texture."""
    points = neutral(person)
    normals = np.empty_like(points)
    vertex_normals(points, load().triangles, normals)
    return points + normals * hair.cap(person)[:, None], texture(person)


@lru_cache(maxsize=8)
def grown(person: Person, hat: float) -> list[hair.Locks]:
    """The person's hair and beard, in the frame of the head without expression."""
    points, _ = prepared(person)
    return [locks for locks in (hair.hair(person, points, hat), hair.beard(person, points)) if locks is not None]


def lights_of(context: Context) -> np.ndarray:
    """Lights (6, 3) float32 in the order of `shade`; a seed other than 0 varies the key light a little and chooses its side."""
    light = LIGHTS[context.light]
    rows = np.array([light[name] for name in ("key", "key_color", "fill", "fill_color", "sky", "ground")], np.float64)
    g = np.random.default_rng([context.seed, 13])
    if context.seed:
        rows[0] += g.normal(0, 0.10, 3)
        if g.random() < 0.5:
            rows[[0, 2], 0] *= -1
        rows[[1, 3, 4]] *= np.exp(g.normal(0, 0.04, 3))
    rows[[0, 2]] /= np.linalg.norm(rows[[0, 2]], axis=1, keepdims=True)
    return rows.astype(np.float32)


def build(person: Person, context: Context) -> Scene:
    head = load()
    still, _ = prepared(person)
    points = still.copy()
    express(points, expression(person, context))
    pose = Pose(context.yaw, context.pitch)
    posed = pose(points, pose.neck(head.mean[:, 1]))
    meshes: list[Mesh] = [head_mesh(posed)]
    turning, staying = wear.dress(person, context, still)
    meshes += [pose.mesh(mesh) for mesh in turning]
    meshes += [replace(mesh, points=pose(mesh.points, 0.0)) for mesh in staying]
    for locks in [] if context.headwear == "headscarf" else grown(person, wear.hat_line(context)):
        moved = locks.mesh.points
        if locks.vertices[0] >= 0:
            moved = moved + (points - still)[locks.of_point]
        meshes.append(pose.mesh(locks.mesh, moved))
    return merge(meshes)


def draw(scene: Scene, person: Person, context: Context, size: int) -> np.ndarray:
    """Renders a scene: linear color and coverage, (size, size, 4) float32."""
    _, skin = prepared(person)
    lights = lights_of(context)
    count = len(scene.points)
    screen = np.empty((count, 3), np.float32)
    light_screen(scene.points, count, lights[0], CENTER, SHADOW_HALF, SHADOW_SIZE, screen)
    shadow = np.full((SHADOW_SIZE, SHADOW_SIZE), EMPTY)
    rasterize_depth(screen, scene.triangles, len(scene.triangles), scene.closed, shadow)
    shifted = scene.points + np.float32(0.4) * scene.normals
    shadow_points = np.empty((count, 3), np.float32)
    light_screen(shifted, count, lights[0], CENTER, SHADOW_HALF, SHADOW_SIZE, shadow_points)
    camera_screen(scene.points, count, np.float32(DISTANCE), np.float32(DISTANCE / SPAN), CENTER, size, screen)
    depth, owner = np.full((size, size), EMPTY), np.full((size, size), -1, np.int32)
    weights = np.empty((size, size, 2), np.float32)
    rasterize(screen, scene.triangles, len(scene.triangles), scene.closed, depth, owner, weights)
    out = np.empty((size, size, 4), np.float32)
    shade(
        owner, weights, scene.triangles, scene.materials, scene.normals, scene.tangents, scene.colors, scene.uv,
        skin, person.iris.astype(np.float32), lights, shadow, shadow_points, np.float32(person.gloss), out,
    )  # fmt: skip
    return out


def render(person: Person, context: Context, size: int = 128, factor: int = 2) -> np.ndarray:
    """A picture (size, size, 3) uint8, the same for the same person and context; every pixel is the mean of `factor` x `factor` samples."""
    linear = draw(build(person, context), person, context, size * factor)
    picture = np.empty((size, size, 3), np.uint8)
    develop(linear, background(context, size), factor, film(), picture)
    return filters.apply(context.style, picture, context.seed)
