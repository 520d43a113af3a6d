"""Sheets for visual inspection: `python -m worlds.heads.sheet -o people.png` draws 40 people, and a second sheet of two in 20 contexts."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from . import context, person, render
from .contexts import PLAIN, Context

SHOWN = [
    PLAIN,
    Context(expression="smile", background="forest", clothes="shirt", clothes_color="blue", light="sun", seed=1),
    Context(expression="laugh", yaw=-25, background="beach", clothes_color="yellow", light="sun", seed=2),
    Context(expression="surprise", yaw=12, background="room", clothes="hoodie", clothes_color="teal", seed=3),
    Context(expression="anger", background="gradient", clothes="suit", clothes_color="navy", seed=4),
    Context(
        expression="sadness",
        pitch=-8,
        background="snow",
        headwear="beanie",
        headwear_color="green",
        clothes="turtleneck",
        clothes_color="brown",
        seed=5,
    ),
    Context(expression="wink", background="flowers", clothes="v-neck", clothes_color="white", seed=6),
    Context(expression="kiss", yaw=20, background="plain", background_color=(214, 120, 130), clothes_color="black", seed=7),
    Context(yaw=48, background="plain", clothes="shirt", clothes_color="white", seed=8),
    Context(yaw=-40, expression="smile", background="library", light="lamp", eyewear="round glasses", seed=9),
    Context(expression="smile", headwear="santa hat", background="snow", clothes="turtleneck", clothes_color="red", seed=10),
    Context(headwear="cap", headwear_color="blue", eyewear="sunglasses", background="beach", light="sun", seed=11),
    Context(background="city at night", light="night", clothes="hoodie", clothes_color="gray", yaw=-15, seed=12),
    Context(background="sunset", light="backlight", headwear="straw hat", expression="smile", yaw=15, seed=13),
    Context(background="library", light="lamp", eyewear="glasses", clothes="suit", clothes_color="gray", seed=14),
    Context(
        headwear="headband", headwear_color="orange", background="gradient", background_color=(60, 120, 140), expression="laugh", seed=15
    ),
    Context(style="pencil", yaw=10, expression="smile", seed=16),
    Context(style="black and white", yaw=-18, light="sun", background="room", seed=17),
    Context(style="oil", yaw=22, background="forest", light="lamp", seed=18),
    Context(headwear="headphones", headwear_color="pink", background="starry sky", light="night", expression="smile", seed=19),
]
"""Twenty contexts with examples of every kind of choice."""


def tiled(pictures: list[np.ndarray], columns: int) -> Image.Image:
    rows = [np.concatenate(pictures[k : k + columns], 1) for k in range(0, len(pictures), columns)]
    return Image.fromarray(np.concatenate(rows))


def people_sheet(first: int, count: int, size: int, world: int = 0) -> Image.Image:
    """`count` people with random clothes and backgrounds, studio light or sun, and no hats or glasses."""
    pictures = []
    for k in range(first, first + count):
        drawn = context(k, world, headwear="none", eyewear="none", style="photo", light="studio" if k % 3 else "sun")
        face = "smile" if k % 2 else "neutral"
        pictures.append(render(person(k, world), replace(drawn, expression=face, yaw=drawn.yaw * 0.7), size))
    return tiled(pictures, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG of the people; the other's name gets -contexts appended")
    parser.add_argument("--first", type=int, default=0, help="the first person")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--summary", action="store_true", help="one sheet: 30 people, then one of them in 10 contexts")
    options = parser.parse_args()
    if options.summary:
        people = people_sheet(options.first, 30, options.size)
        chosen = [render(person(options.first + 3), SHOWN[k], options.size) for k in (1, 3, 5, 8, 9, 10, 13, 12, 16, 18)]
        tiled([*np.split(np.asarray(people), 3), np.concatenate(chosen, 1)], 1).save(options.output, optimize=True)
        return
    people_sheet(options.first, 40, options.size).save(options.output, optimize=True)
    contexts = [render(person(k), c, options.size) for k in (options.first + 2, options.first + 7) for c in SHOWN]
    tiled(contexts, 10).save(options.output.with_stem(options.output.stem + "-contexts"), optimize=True)


if __name__ == "__main__":
    main()
