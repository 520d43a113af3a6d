"""The settings of personalizing and drawing, the one place where a setting gets its value, and the schema that files of them are checked by.

What a user may leave open (`PersonalizeChoices`, `GenerateChoices`: None is "not said") and what a stage runs with
(`PersonalizeConfig`, `GenerateConfig`: no None but where it means something) are two types. `resolve` makes the second
from the first. The settings of the trainings, which have no such layers, are in `training_settings.py`.

Every command saves its own settings beside what it made, as JSON, and takes them from such a file, or from YAML. A hypernetwork's
config.json is read by the same functions.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .errors import InputError

RESOLVED = "resolved"  # What saved settings hold for people alone: nothing is read from it.
T = TypeVar("T")
Crop = Literal["auto", "center", "face"]  # What of a photo is taken.
Layout = Literal["diffusers", "kohya"]  # How a LoRA file names its layers.


@dataclass
class PersonalizeChoices:
    """Rank-relaxed fast fine-tuning."""

    steps: int | None = None  # Fine-tuning steps. 0 stops at the prediction. Default: the hypernetwork's own (25), or 300 from scratch.
    rank: int | None = None  # Rank of the residual that is trained beside the prediction. Default: the hypernetwork's own, or 4.
    targets: tuple[str, ...] | None = None
    """Glob patterns of the layers that are fine-tuned, such as "*up_blocks.1*": of those that the hypernetwork predicts ("*": all of
    them); without one, of the base's linear layers. Default: the hypernetwork's own, or all; without one, the base's own."""
    order: Literal["residual", "merged"] | None = None
    """residual: the prediction stays frozen, a residual is trained (the paper). merged: all of it is trained. Default: residual."""
    learning_rate: float | None = None
    """Peak learning rate; constant, then it falls over the last fifth. Default: the hypernetwork's own, or 1e-3."""
    copies: int | None = None  # Noised copies of the photo in every step. Default: the hypernetwork's own, or 4.
    noise_mean: float | None = None
    """Mean of logit(u), where noise levels u are drawn from: high ones ask who it is, those near 0 what the details are.
    Default: the hypernetwork's own, or 1.5."""
    noise_std: float | None = None  # Standard deviation of logit(u). Default: the hypernetwork's own, or 1.
    prior_pictures: int | None = None  # Prior preservation: pictures of the class that the base generates first. Default: 0, none.
    prior_weight: float | None = None  # Weight of the prior loss. Default: 1.
    seed: int | None = None  # Noise and the residual's start follow from this number. Default: 0.
    crop: Crop | None = None
    """What of a photo is taken. auto: the face where one is found, else the middle, and it says which. face: the face, or an error. center: the
    middle square. Faces are found with the extra `faces`. Default: auto."""
    face: int | None = None  # Which face, by size from 1, where there are several. Default: the largest.


@dataclass
class PersonalizeConfig:
    """What fine-tuning runs with; `PersonalizeChoices` explains each."""

    steps: int = 25
    rank: int = 4
    targets: tuple[str, ...] = ()
    order: Literal["residual", "merged"] = "residual"
    learning_rate: float = 1e-3
    copies: int = 4
    noise_mean: float = 1.5
    noise_std: float = 1.0
    prior_pictures: int = 0
    prior_weight: float = 1.0
    seed: int = 0
    crop: Crop = "auto"
    face: int | None = None
    origins: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # Where each value came from, see `resolve`.

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("copies", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if not (self.noise_std >= 0 and self.learning_rate > 0):
            raise InputError(f"noise_std must be at least 0 and learning_rate above 0, not {self.noise_std} and {self.learning_rate}.")


SCRATCH: Mapping[str, Any] = {"steps": 300}  # What differs where there is no hypernetwork to start from.


@dataclass
class GenerateChoices:
    """How pictures are made."""

    negative: str | None = None  # Negative prompt. Default: none.
    steps: int | None = None
    """Denoising steps. Default: the hypernetwork's own, or the family's (25; SD 3 and Flux dev 28, Flux schnell 4)."""
    guidance: float | None = None  # Prompt guidance scale; 1 is none. Default: the hypernetwork's own, or the family's (5; SD 3 7, Flux 1).
    embedded_guidance: float | None = None
    """Flux dev: the guidance scale that it takes as a condition, without a second branch. Default: 3.5."""
    identity_guidance: float | Literal["off"] | None = None
    """Identity guidance scale: the base without the personal LoRA as the unconditional branch. "off": plain guidance, with the
    LoRA in both branches. Default: the hypernetwork's own, or off."""
    identity_until: float | None = None
    """The fraction of the denoising steps, 0 to 1, after which the identity scale is 1 at most: the person is decided early, and
    later it only costs what the prompt asked for. Default: the hypernetwork's own, or 1."""
    context_guidance: float | None = None
    """Prompt guidance scale of the first steps, by the base without the person: a person's LoRA can blur what a prompt asks for (the color of
    a hat), and that is decided early. Default: the hypernetwork's own, or 3."""
    context_until: float | None = None
    """The fraction of the denoising steps, 0 to 1, that context guidance takes; plain guidance follows. 0 turns it off, and identity guidance
    takes its place. Default: the hypernetwork's own, or 0."""
    strength: float | None = None  # Weight of the personal LoRA. Default: 1.
    scheduler: str | None = None
    """A scheduler of diffusers by class name, such as EulerDiscreteScheduler; any other word lists them. Default: the base's own."""
    width: int | None = None  # Width in pixels. Default: the base's own.
    height: int | None = None  # Height in pixels. Default: the base's own.
    seed: int | None = None  # The first picture's seed; the next ones count up. Default: 0.
    count: int | None = None  # Pictures a prompt. Default: 1.
    batch: int | None = None  # Pictures that are denoised side by side. Default: 8.


@dataclass
class GenerateConfig:
    """What drawing runs with; `GenerateChoices` explains each. Scheduler, width and height: None is the base's own."""

    negative: str = ""
    steps: int = 25
    guidance: float = 5.0
    embedded_guidance: float = 3.5
    identity_guidance: float | Literal["off"] = "off"
    identity_until: float = 1.0
    context_guidance: float = 3.0
    context_until: float = 0.0
    strength: float = 1.0
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int = 0
    count: int = 1
    batch: int = 8
    origins: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # Where each value came from, see `resolve`.

    def __post_init__(self) -> None:
        for name in ("steps", "count", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name, value in (("identity_until", self.identity_until), ("context_until", self.context_until)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} is a fraction of the steps, 0 to 1, not {value}.")

    @property
    def identity(self) -> float | None:
        """The identity guidance scale, None for plain guidance."""
        return None if self.identity_guidance == "off" else float(self.identity_guidance)


def resolve(kind: type[T], *layers: tuple[str, object]) -> T:
    """Settings of `kind` out of layers, the first that has a value winning; what none has is the kind's own default.

    Args:
        layers: (name, values) with values a mapping or a dataclass of choices; None is "not said". The names are what
            `origins` says of each field afterwards; "default" where no layer had it.

    Raises InputError for a field that `kind` doesn't have, and for values that don't fit it.
    """
    settings, origins = kind(), {f.name: "default" for f in dataclasses.fields(kind) if f.name != "origins"}  # type: ignore[arg-type]
    for name, values in reversed(layers):
        said = values if isinstance(values, Mapping) else vars(values)
        said = {key.replace("-", "_"): value for key, value in said.items() if value is not None and key != "origins"}
        settings = updated(settings, said, name)
        origins |= dict.fromkeys(said, name)
    return dataclasses.replace(settings, origins=origins)  # type: ignore[type-var]


def explained(settings: PersonalizeConfig | GenerateConfig) -> list[str]:
    """One line for each setting: its value and where that came from."""
    return [f"{name} = {getattr(settings, name)!r} ({origin})" for name, origin in settings.origins.items()]


def read_config(path: str | Path) -> dict[str, Any]:
    """A YAML or JSON file as a dict. Raises InputError where it is missing or no mapping."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such config file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is neither YAML nor JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping of settings, not a {type(values).__name__}.")
    return {key: value for key, value in values.items() if key != RESOLVED}


def updated(default: T, values: Any, where: str) -> T:
    """`default` with `values` over it, nested dataclasses included. Raises InputError for an unknown or ill-typed field."""
    return parsed(type(default), values, where, vars(default))


def required(kind: Any) -> list[str]:
    """The fields of a dataclass that have no default."""
    return [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING is field.default_factory]


def parsed(kind: type[T], values: Any, where: str, defaults: Mapping[str, Any] | None = None) -> T:
    """A dataclass of `kind` out of a mapping. Raises InputError for an unknown, ill-typed or missing field."""
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a mapping of settings, not {_short(values)}.")
    hints, found = typing.get_type_hints(kind), dict(defaults or {})
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            # the settings of a command's `config` may stand beside it, too
            known = [*hints, *(vars(found["config"]) if dataclasses.is_dataclass(found.get("config")) else ())]
            near = "".join(f" Did you mean {one}?" for one in difflib.get_close_matches(name, known, 1))
            raise InputError(f"{where}: unknown setting {_short(key)}.{near} There are {', '.join(dict.fromkeys(known))}.")
        if dataclasses.is_dataclass(found.get(name)):
            found[name] = updated(found[name], value, f"{where}: {key}")
        else:
            found[name] = _coerced(value, hints[name], f"{where}: {key}")
    if lacking := [name for name in required(kind) if name not in found]:
        raise InputError(f"{where} lacks {lacking[0]}.")
    try:
        return kind(**found)
    except InputError as error:  # a dataclass checks its values itself, but doesn't know where they come from
        raise InputError(f"{where}: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _coerced(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as the field's type: 1e-3 is a string to YAML 1.1, lists become tuples, strings paths. Numbers are finite."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        for choice in choices:
            with suppress(InputError):
                return _coerced(value, choice, where)
    elif origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        raise InputError(f"{where} must be one of {', '.join(map(str, choices))}, not {_short(value)}.")
    elif origin in (tuple, list) and isinstance(value, (list, tuple)):
        return origin(_coerced(item, choices[0], where) for item in value) if choices else origin(value)
    elif origin is dict and isinstance(value, dict):
        return {_coerced(key, choices[0], where): _coerced(item, choices[1], f"{where}: {key}") for key, item in value.items()}
    elif dataclasses.is_dataclass(hint):
        return parsed(hint, value, where)  # type: ignore[arg-type]
    elif hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    elif hint is float and isinstance(value, (Real, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            if math.isfinite(float(value)):
                return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is Any or (hint is not int and isinstance(hint, type) and isinstance(value, hint)):
        return value
    raise InputError(f"{where} must be {getattr(hint, '__name__', hint)}, not {_short(value)}.")
