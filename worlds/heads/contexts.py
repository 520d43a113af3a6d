"""How a person is drawn: pose, expression, light, things worn, background and drawing style."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperdreambooth.errors import InputError

from .people import HAIR

if TYPE_CHECKING:
    from .people import Person

EXPRESSIONS: dict[str, dict[str, float]] = {
    "neutral": {},
    "smile": {"mouthSmile": 0.75, "cheekSquint": 0.55, "mouthUpperUp": 0.25, "mouthLowerDown": 0.2, "eyeSquint": 0.25, "mouthDimple": 0.2},
    "laugh": {
        "mouthSmile": 0.85,
        "cheekSquint": 0.8,
        "mouthUpperUp": 0.45,
        "mouthLowerDown": 0.35,
        "jawOpen": 0.32,
        "eyeSquint": 0.5,
        "eyeBlink": 0.12,
    },
    "surprise": {"jawOpen": 0.42, "browInnerUp": 0.8, "browOuterUp": 0.75, "eyeWide": 0.6, "mouthFunnel": 0.25},
    "anger": {"browDown": 0.95, "noseSneer": 0.4, "mouthFrown": 0.4, "eyeSquint": 0.35, "mouthPress": 0.5},
    "sadness": {"browInnerUp": 0.85, "mouthFrown": 0.75, "mouthShrugLower": 0.45, "eyeBlink": 0.18, "eyeLookDown": 0.2},
    "wink": {"eyeBlink_L": 1.0, "cheekSquint_L": 0.6, "mouthSmile": 0.55, "mouthSmile_L": 0.25, "mouthDimple": 0.2},
    "kiss": {"mouthPucker": 0.85, "mouthFunnel": 0.2, "eyeSquint": 0.15, "browInnerUp": 0.2},
}
"""Weights of expression shapes; a name without a side (_L, _R) means both sides."""

LIGHTS: dict[str, dict[str, tuple[float, ...]]] = {
    "studio": {
        "key": (0.45, 0.50, 0.80),
        "key_color": (0.70, 0.69, 0.67),
        "fill": (-0.75, 0.15, 0.55),
        "fill_color": (0.17, 0.175, 0.18),
        "sky": (0.33, 0.34, 0.36),
        "ground": (0.23, 0.22, 0.21),
    },
    "sun": {
        "key": (0.85, 0.42, 0.38),
        "key_color": (1.28, 1.15, 0.94),
        "fill": (-0.8, 0.2, 0.3),
        "fill_color": (0.15, 0.18, 0.23),
        "sky": (0.30, 0.35, 0.43),
        "ground": (0.19, 0.17, 0.13),
    },
    "night": {
        "key": (0.70, 0.35, 0.50),
        "key_color": (0.42, 0.46, 0.66),
        "fill": (-0.85, 0.1, 0.05),
        "fill_color": (0.36, 0.20, 0.10),
        "sky": (0.055, 0.07, 0.13),
        "ground": (0.04, 0.04, 0.06),
    },
    "lamp": {
        "key": (0.55, 0.10, 0.70),
        "key_color": (1.02, 0.72, 0.45),
        "fill": (-0.7, 0.3, 0.2),
        "fill_color": (0.07, 0.07, 0.09),
        "sky": (0.12, 0.10, 0.09),
        "ground": (0.16, 0.11, 0.07),
    },
    "backlight": {
        "key": (-0.55, 0.50, -0.62),
        "key_color": (1.9, 1.65, 1.30),
        "fill": (0.5, 0.3, 0.8),
        "fill_color": (0.24, 0.24, 0.26),
        "sky": (0.34, 0.35, 0.38),
        "ground": (0.22, 0.21, 0.20),
    },
}
"""Directions towards the lights (x to the picture's right, y up, z to the viewer) and linear colors of the lights."""

HEADWEAR = ("none", "beanie", "santa hat", "cap", "headband", "straw hat", "top hat", "headscarf", "headphones")
EYEWEAR = ("none", "glasses", "round glasses", "sunglasses")
CLOTHES = ("crew neck", "v-neck", "shirt", "turtleneck", "hoodie", "suit")
BACKGROUNDS = ("plain", "gradient", "forest", "beach", "city at night", "snow", "room", "library", "sunset", "flowers", "starry sky")
STYLES = ("photo", "pencil", "black and white", "oil")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (176, 32, 36), "orange": (214, 110, 36), "yellow": (222, 184, 52), "green": (44, 112, 62),
    "teal": (32, 120, 124), "blue": (44, 84, 164),
    "navy": (28, 36, 72), "purple": (104, 56, 136), "pink": (218, 128, 152), "brown": (102, 68, 46),
    "white": (228, 226, 222), "gray": (128, 130, 134),
    "black": (30, 30, 33),
}  # fmt: skip
"""sRGB colors of clothes and hats."""
LARGEST_YAW, LARGEST_PITCH = 50.0, 20.0


@dataclass(frozen=True)
class Context:
    """Everything in a picture except the person. `yaw` and `pitch` are in degrees, positive to the picture's right and upwards; `seed`
    varies details without a field of their own. Raises InputError for unknown names and for angles that are too large.
    """

    expression: str = "neutral"
    yaw: float = 0.0
    pitch: float = 0.0
    light: str = "studio"
    headwear: str = "none"
    headwear_color: str = "red"
    eyewear: str = "none"
    clothes: str = "crew neck"
    clothes_color: str = "gray"
    background: str = "plain"
    background_color: tuple[int, int, int] = (176, 186, 194)
    style: str = "photo"
    seed: int = 0

    def __post_init__(self) -> None:
        known = {"expression": EXPRESSIONS, "light": LIGHTS, "headwear": HEADWEAR, "eyewear": EYEWEAR, "clothes": CLOTHES}
        known |= {"background": BACKGROUNDS, "style": STYLES, "headwear_color": COLORS, "clothes_color": COLORS}
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; it can be: {', '.join(names)}")
        if not (abs(self.yaw) <= LARGEST_YAW and abs(self.pitch) <= LARGEST_PITCH):
            raise InputError(
                f"yaw={self.yaw} or pitch={self.pitch} is too large; up to {LARGEST_YAW:.0f} and {LARGEST_PITCH:.0f} degrees can be drawn"
            )

    def values(self) -> dict[str, Any]:
        return asdict(self)


PLAIN = Context()
"""The plain front picture that serves as a person's gallery picture."""


def pick(generator: np.random.Generator, names: Any, common: float = 0.0) -> str:
    """A random name: the first with probability `common`, otherwise any of them."""
    names = list(names)
    if generator.random() < common:
        return str(names[0])
    return str(names[int(generator.integers(len(names)))])


def context(seed: int, world: int = 0, **fixed: Any) -> Context:
    """Context `seed` of a world: random except for the fields that are `fixed`."""
    known = {field.name for field in fields(Context)}
    if not set(fixed) <= known:
        raise InputError(f"a context has no {sorted(set(fixed) - known)}; it has {sorted(known)}")
    g = np.random.default_rng([world, seed, 11])
    yaw = float(np.clip(g.normal(0, 20), -LARGEST_YAW, LARGEST_YAW))
    pitch = float(np.clip(g.normal(0, 6), -LARGEST_PITCH, LARGEST_PITCH))
    drawn = Context(
        expression=pick(g, EXPRESSIONS, 0.3), yaw=yaw, pitch=pitch, light=pick(g, LIGHTS, 0.3),
        headwear=pick(g, HEADWEAR, 0.6), headwear_color=pick(g, COLORS), eyewear=pick(g, EYEWEAR, 0.7),
        clothes=pick(g, CLOTHES), clothes_color=pick(g, COLORS), background=pick(g, BACKGROUNDS, 0.1),
        background_color=tuple(int(c) for c in g.integers(40, 226, 3)), style=pick(g, STYLES, 0.75), seed=int(g.integers(2**31)),
    )  # fmt: skip
    if drawn.background in ("city at night", "starry sky") and "light" not in fixed and g.random() < 0.7:
        drawn = replace(drawn, light="night")
    return replace(drawn, **fixed)


HAIR_WORDS = {
    "bald": "bald", "buzz": "very short {color} hair", "receding": "receding {color} hair", "short": "short {color} hair",
    "side part": "{color} hair with a side part", "quiff": "a {color} quiff", "pixie": "a {color} pixie cut", "bob": "a {color} bob",
    "long": "long {color} hair", "long fringe": "long {color} hair and a fringe",
    "wavy": "wavy {color} hair", "curly": "curly {color} hair",
    "afro": "a {color} afro", "bun": "{color} hair in a bun", "ponytail": "a {color} ponytail",
}  # fmt: skip
WHERE = {
    "forest": "in a forest", "beach": "at the beach", "city at night": "in the city at night", "snow": "in the snow", "room": "in a room",
    "library": "in a library", "sunset": "at sunset", "flowers": "among flowers", "starry sky": "under a starry sky",
}  # fmt: skip
MOODS = {
    "smile": "smiling",
    "laugh": "laughing",
    "surprise": "surprised",
    "anger": "angry",
    "sadness": "sad",
    "wink": "winking",
    "kiss": "blowing a kiss",
}
STYLE_WORDS = {
    "photo": "a photo of",
    "pencil": "a pencil drawing of",
    "black and white": "a black and white photo of",
    "oil": "an oil painting of",
}
LIGHT_WORDS = {
    "sun": "in sunlight from the side",
    "night": "at night",
    "lamp": "in the warm light of a lamp",
    "backlight": "with the light behind",
}


def a(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def who(person: Person, generator: np.random.Generator, looks: float) -> str:
    """A phrase for the person: "a woman" or "a man", with probability `looks` described by age, skin, hair and beard."""
    if generator.random() >= looks:
        return a(person.sex)
    age = "young " if person.age < 30 else "middle-aged " if person.age < 55 else "old "
    skin = "fair-skinned " if person.tone < 4 else "brown-skinned " if person.tone < 7 else "dark-skinned "
    text = a((age if generator.random() < 0.6 else "") + (skin if generator.random() < 0.5 else "") + person.sex)
    hair = HAIR_WORDS[person.style].format(color=person.hair_name)
    if person.style == "bald":
        return f"a bald {text.split(' ', 1)[1]}"
    beard = {"mustache": " and a mustache", "goatee": " and a goatee", "short": " and a short beard", "full": " and a full beard"}.get(
        person.beard, ""
    )
    return f"{text} with {hair}{beard}"


CLOTHES_WORDS = {name: "sweater" if name == "crew neck" else name for name in CLOTHES}


def caption(person: Person, context: Context, generator: np.random.Generator, looks: float = 0.5, subject: str | None = None) -> str:
    """A picture's caption: the context (clothes with probability 0.4), and with probability `looks` a description of the person.

    `subject`, for example "a [V] face", replaces the description.
    """
    words = [f"{STYLE_WORDS[context.style]} {subject or who(person, generator, looks)}"]
    worn = (
        []
        if context.headwear == "none"
        else [context.headwear if context.headwear == "headphones" else a(f"{context.headwear_color} {context.headwear}")]
    )
    if context.headwear in ("santa hat", "straw hat", "top hat"):
        worn = [a(context.headwear)]
    worn += [] if context.eyewear == "none" else [context.eyewear]
    if generator.random() < 0.4:
        worn.append(a(f"{context.clothes_color} {CLOTHES_WORDS[context.clothes]}"))
    if worn:
        words.append("wearing " + ", ".join(worn[:-1]) + (" and " if len(worn) > 1 else "") + worn[-1])
    if context.expression in MOODS:
        words.append(MOODS[context.expression])
    if abs(context.yaw) >= 12:
        words.append(f"turned {'far ' if abs(context.yaw) > 32 else ''}to the {'right' if context.yaw > 0 else 'left'}")
    if abs(context.pitch) >= 8:
        words.append(f"looking {'up' if context.pitch > 0 else 'down'}")
    if context.light in LIGHT_WORDS and not (context.light == "night" and "night" in WHERE.get(context.background, "")):
        words.append(LIGHT_WORDS[context.light])
    if context.background in WHERE:
        words.append(WHERE[context.background])
    return ", ".join(words)


def vocabulary() -> list[str]:
    """Every word that a caption can contain."""
    phrases = [*HAIR_WORDS.values(), *WHERE.values(), *MOODS.values(), *STYLE_WORDS.values(), *LIGHT_WORDS.values()]
    phrases += [*HEADWEAR, *EYEWEAR, *CLOTHES_WORDS.values(), *COLORS, *HAIR]
    phrases += [
        "woman man person face an young middle-aged old fair-skinned brown-skinned dark-skinned with and mustache goatee short full beard"
    ]
    phrases += ["wearing turned far to the right left looking up down bald plain background"]
    return sorted(set(re.findall("[a-z]+", " ".join(phrases).replace("{color}", ""))))


POSES = ("far left", "left", "front", "right", "far right")


def classes() -> dict[str, list[str]]:
    """The kinds of context that the classifier predicts, with the names of their values."""
    return {
        "expression": list(EXPRESSIONS),
        "light": list(LIGHTS),
        "headwear": list(HEADWEAR),
        "eyewear": list(EYEWEAR),
        "background": list(BACKGROUNDS),
        "style": list(STYLES),
        "pose": list(POSES),
    }


def classified(context: Context) -> dict[str, str]:
    """The class of a context in each kind; yaw becomes one of `POSES`, with the same limits as in captions."""
    pose = POSES[2 + int(np.sign(context.yaw)) * ((abs(context.yaw) >= 12) + (abs(context.yaw) > 32))]
    return {kind: pose if kind == "pose" else getattr(context, kind) for kind in classes()}


def slots() -> list[list[str]]:
    """The alternative phrases for each part of a photo's caption, as `stages.describe` takes them."""
    return [
        ["a photo of a [V] face"],
        ["", *(f", wearing {worn}" for worn in EYEWEAR[1:])],
        ["", *(f", {mood}" for mood in MOODS.values())],
        ["", ", turned to the left", ", turned to the right"],
        ["", *(f", {light}" for light in LIGHT_WORDS.values())],
        ["", *(f", {where}" for where in WHERE.values())],
    ]
