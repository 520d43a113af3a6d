"""People: a person is a number of a world, and all attributes follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .head import HEIGHT, WIDTH

TONES = np.array(
    [
        (228, 188, 169),
        (223, 180, 157),
        (217, 171, 143),
        (207, 160, 127),
        (198, 148, 112),
        (174, 123, 90),
        (150, 103, 75),
        (126, 84, 62),
        (103, 69, 53),
        (82, 56, 45),
    ]
)
"""sRGB skin colors in plain light, one for each step of the Monk scale."""
HAIR = {
    "black": (0.012, 0.010, 0.009),
    "dark brown": (0.032, 0.019, 0.012),
    "brown": (0.075, 0.043, 0.024),
    "light brown": (0.16, 0.095, 0.052),
    "blond": (0.36, 0.24, 0.115),
    "red": (0.24, 0.075, 0.025),
    "gray": (0.36, 0.35, 0.34),
    "white": (0.68, 0.66, 0.63),
}
IRIS = {
    "dark brown": (0.035, 0.017, 0.009),
    "brown": (0.085, 0.042, 0.018),
    "hazel": (0.13, 0.090, 0.035),
    "green": (0.10, 0.135, 0.065),
    "blue": (0.10, 0.19, 0.30),
    "gray": (0.17, 0.20, 0.22),
}
STYLES_WOMEN = {
    "bald": 1,
    "buzz": 3,
    "short": 8,
    "side part": 5,
    "pixie": 8,
    "bob": 14,
    "long": 18,
    "long fringe": 10,
    "wavy": 14,
    "curly": 7,
    "afro": 7,
    "bun": 10,
    "ponytail": 7,
}
STYLES_MEN = {
    "bald": 11,
    "buzz": 15,
    "short": 22,
    "side part": 16,
    "quiff": 12,
    "receding": 8,
    "curly": 5,
    "afro": 5,
    "long": 2,
    "wavy": 2,
    "bun": 2,
}
TEXTURED = {"afro": 3.0, "curly": 1.8, "buzz": 1.6, "bald": 1.3}
"""Factors of hair styles' weights for people with a tone above 6.5 on the Monk scale; all other styles get 0.7."""
BEARDS = {"none": 38, "stubble": 22, "mustache": 8, "goatee": 8, "short": 14, "full": 10}


def linear(rgb: np.ndarray) -> np.ndarray:
    """sRGB from 0 to 255 as linear values from 0 to 1."""
    x = np.asarray(rgb, np.float64) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


@dataclass(frozen=True, eq=False)
class Person:
    """A person of a world. Colors are linear; amounts are from 0 to 1 unless noted. People are compared by object identity."""

    seed: int
    world: int
    sex: str  # woman, man
    age: int  # years
    tone: float  # Monk scale, 1 to 10
    modes: np.ndarray  # (100,) in standard deviations
    stretch: np.ndarray  # (3,) scale of the head
    lids: tuple[float, float]  # how far the lids hang, and squint
    skin: np.ndarray  # (3,)
    lip_color: np.ndarray
    hair_color: np.ndarray
    hair_name: str
    brow_color: np.ndarray
    iris: np.ndarray
    eyes: str
    style: str
    curl: float
    hairline: float  # cm by which the hairline recedes above the forehead
    temples: float  # cm by which it recedes at the temples
    scalp_cover: float
    beard: str
    beard_cover: tuple[float, float, float]  # cheeks and jaw, mustache, goatee
    brow: float  # half width, cm
    brow_arch: float  # cm
    brow_density: float
    blush: float
    ruddy: float
    freckles: float
    wrinkles: float
    makeup: float
    lips: float
    moles: tuple[tuple[float, float, float], ...]  # x, y, radius, cm
    gloss: float
    noise: tuple[int, int]
    seed_hair: int


@lru_cache(maxsize=1)
def masculine() -> np.ndarray:
    """Weights of the identity modes (100,) that broaden jaw, brow, nose and neck."""
    with np.load(Path(__file__).with_name("head.npz"), allow_pickle=False) as data:
        return data["masculine"]


def choose(generator: np.random.Generator, weights: dict[str, float]) -> str:
    names = list(weights)
    total = np.cumsum([weights[name] for name in names])
    return names[min(int(np.searchsorted(total, generator.random() * total[-1], side="right")), len(names) - 1)]


def hair_of(generator: np.random.Generator, tone: float, age: int) -> tuple[str, np.ndarray]:
    """Name and linear color of hair: fair colors occur with fair skin only, gray with age."""
    light = float(np.clip((5.0 - tone) / 3.0, 0, 1))
    weights = {
        "black": 22 + 60 * (1 - light),
        "dark brown": 22,
        "brown": 18 * light + 2,
        "light brown": 12 * light,
        "blond": 17 * light,
        "red": 8 * light,
    }
    name = choose(generator, weights)
    color = np.array(HAIR[name]) * np.exp(generator.normal(0, 0.18)) * np.exp(generator.normal(0, 0.04, 3))
    gray = float(np.clip((age - 43 + generator.normal(0, 10)) / 34, 0, 1))
    if gray > 0.35:
        name = "white" if gray > 0.85 and generator.random() < 0.6 else "gray"
        color = color + (np.array(HAIR[name]) - color) * min(gray, 0.92)
    return name, color


@lru_cache(maxsize=64)
def person(seed: int, world: int = 0) -> Person:
    """Person `seed` of a world, always the same. Half are women; skin tones are uniform over the Monk scale, ages are from 18 to 80."""
    g = np.random.default_rng([world, seed, 7])
    man = bool(g.random() < 0.5)
    age = int(18 + 62 * g.beta(1.15, 1.7))
    tone = float(g.uniform(1, 10))
    modes = g.standard_normal(100) * 1.2 + masculine() * (1 if man else -1) * g.normal(1.0, 0.25)
    stretch = np.exp(g.normal(0, [0.028, 0.03, 0.025]))
    old = float(np.clip((age - 32) / 45, 0, 1))
    skin = (
        linear(np.array([np.interp(tone, np.arange(1, 11), TONES[:, k]) for k in range(3)]))
        * np.exp(g.normal(0, 0.05))
        * np.exp(g.normal(0, [0.03, 0.02, 0.04]))
    )
    hair_name, hair = hair_of(g, tone, age)
    fair = tone < 5
    if fair:
        eyes = choose(g, {"dark brown": 18, "brown": 24, "hazel": 12, "green": 12, "blue": 26, "gray": 8})
    else:
        eyes = choose(g, {"dark brown": 60, "brown": 34, "hazel": 5, "green": 1})
    iris = np.array(IRIS[eyes]) * np.exp(g.normal(0, 0.15))
    weights = dict(STYLES_MEN if man else STYLES_WOMEN)
    if tone > 6.5:
        weights = {name: weight * TEXTURED.get(name, 0.7) for name, weight in weights.items()}
    if man and age > 50:
        weights["bald"], weights["receding"] = weights["bald"] * 1.6, weights["receding"] * 2
    style = choose(g, weights)
    beard = choose(g, BEARDS) if man else "none"
    strength = float(g.uniform(0.75, 1.0))
    shadow = float(g.uniform(0.12, 0.34)) * (0.6 if hair_name in ("blond", "red", "white") else 1) if man else 0.0
    cover = {"none": (shadow * 0.6, shadow * 0.5, 0), "stubble": (0.35 + 0.3 * strength, 0.6, 0.5), "mustache": (shadow, strength, 0)}
    cover |= {"goatee": (shadow, strength, strength), "short": (strength, strength, strength), "full": (1.0, 1.0, 1.0)}
    lips = float(g.uniform(0, 1)) if not man and g.random() < 0.65 else 0.0
    natural = skin * np.array([0.86, 0.55, 0.53]) * (1 - 0.08 * old)
    paint = np.array([[0.42, 0.035, 0.05], [0.40, 0.11, 0.12], [0.22, 0.02, 0.05], [0.45, 0.16, 0.14]])[int(g.integers(4))]
    blush, ruddy = float(g.uniform(0.2, 1.0)), float(g.uniform(0, 0.35)) * (1.0 if fair else 0.5)
    freckles = float(g.uniform(0.4, 1.0)) if tone < 5 and g.random() < (0.65 if hair_name == "red" else 0.25) else 0.0
    moles = tuple((float(g.uniform(-6, 6)), float(g.uniform(-6.5, 8)), float(g.uniform(0.10, 0.19))) for _ in range(g.poisson(0.7)))
    brow = float(g.uniform(0.42, 0.68) if man else g.uniform(0.28, 0.50))
    return Person(
        seed=seed, world=world, sex="man" if man else "woman", age=age, tone=tone,
        modes=modes.astype(np.float32), stretch=stretch.astype(np.float32),
        lids=(float(g.uniform(-0.02, 0.12)), float(g.uniform(0, 0.25))),
        skin=skin, lip_color=natural + (paint - natural) * lips * 0.75,
        hair_color=hair, hair_name=hair_name,
        brow_color=hair * (0.55 if hair_name not in ("black", "dark brown") else 0.9) + 0.004, iris=iris, eyes=eyes,
        style=style, curl=float(g.uniform(0, 1)),
        hairline=float(g.normal(0, 0.35) + (1.0 * old if man else 0) + (2.2 if style == "receding" else 0)),
        temples=float(abs(g.normal(0, 0.5)) * (1 if man else 0.4) + (1.6 if style == "receding" else 0)),
        scalp_cover=0.0 if style == "bald" and not g.random() < 0.4 else (0.35 if style == "bald" else 0.97),
        beard=beard, beard_cover=cover[beard],
        brow=brow, brow_arch=float(g.normal(0.0 if man else 0.12, 0.16)), brow_density=float(g.uniform(0.6, 0.92)),
        blush=blush, ruddy=ruddy, freckles=freckles, wrinkles=old * float(g.uniform(0.7, 1.1)),
        makeup=0.0 if man else float(g.uniform(0, 1) ** 1.5),
        lips=lips, moles=moles, gloss=float(g.uniform(0.6, 1.3)),
        noise=(int(g.integers(HEIGHT)), int(g.integers(WIDTH))), seed_hair=int(g.integers(2**31)),
    )  # fmt: skip
