"""The settings of fine-tuning and generation, how each gets its value, and how files of settings are read and checked.

Settings as a user gives them (`PersonalizeChoices`, `GenerateChoices`: None means "not given") and settings that a stage runs with
(`PersonalizeConfig`, `GenerateConfig`: None only where it has a meaning of its own) are two types. `resolve` makes the second
from the first. The settings of the trainings, which have no such layers, are in `training_settings.py`.

Every command saves its settings as JSON beside its output, and reads them from such a file, or from YAML. A hypernetwork's
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

from .errors import InputError, at_least

RESOLVED = "resolved"  # Key of the resolved values in saved settings: for people to read, ignored when the file is read.
T = TypeVar("T")
Crop = Literal["auto", "center", "face"]  # What a photo is cropped to.
Layout = Literal["diffusers", "kohya"]  # How a LoRA file names its layers.


@dataclass
class PersonalizeChoices:
    """Rank-relaxed fast fine-tuning."""

    steps: int | None = None  # Fine-tuning steps. 0 keeps the prediction. Default: the hypernetwork's own (25), or 300 from scratch.
    rank: int | None = None  # Rank of the residual that is trained beside the prediction. Default: the hypernetwork's own, or 4.
    targets: tuple[str, ...] | None = None
    """Glob patterns of the layers to fine-tune, such as "*up_blocks.1*", among those that the hypernetwork predicts ("*": all of them), or,
    without one, among the base's linear layers. Default: the hypernetwork's own patterns, or all; without one, the base's own."""
    order: Literal["residual", "merged"] | None = None
    """residual: a residual is trained beside the frozen prediction (the paper). merged: both are merged and trained. Default: residual."""
    learning_rate: float | None = None
    """Peak learning rate: constant, then falling to zero over the last fifth of the steps. Default: the hypernetwork's own, or 1e-3."""
    copies: int | None = None  # Noised copies of the photo in every step. Default: the hypernetwork's own, or 4.
    noise_mean: float | None = None
    """Mean of logit(u), u being the noise levels in 0..1: the identity is learned at high levels, details at levels near 0.
    Default: the hypernetwork's own, or 1.5."""
    noise_std: float | None = None  # Standard deviation of logit(u). Default: the hypernetwork's own, or 1.
    prior_pictures: int | None = None  # Prior preservation: how many class pictures the base generates first. Default: 0, none.
    prior_weight: float | None = None  # Weight of the prior loss. Default: 1.
    seed: int | None = None  # Seed of the noise and of the residual's initialization. Default: 0.
    crop: Crop | None = None
    """What a photo is cropped to. auto: the face if one is found, else the center square; the choice is printed. face: the face, or an
    error. center: the center square. Finding faces needs the extra `faces`. Default: auto."""
    face: int | None = None  # Which of several faces in a photo, counted from 1, the largest. Default: the largest.


@dataclass
class PersonalizeConfig:
    """The settings that fine-tuning runs with; `PersonalizeChoices` explains each."""

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
        at_least(self, rank=1, copies=1, steps=0, prior_pictures=0)
        if not (self.noise_std >= 0 and self.learning_rate > 0):
            raise InputError(f"noise_std must be at least 0 and learning_rate above 0, not {self.noise_std} and {self.learning_rate}.")


SCRATCH: Mapping[str, Any] = {"steps": 300}  # Defaults that differ where there is no hypernetwork.


@dataclass
class GenerateChoices:
    """Generation of pictures."""

    negative: str | None = None  # Negative prompt. Default: none.
    steps: int | None = None
    """Denoising steps. Default: the hypernetwork's own, or the family's (25; SD 3 and Flux dev 28, Flux schnell 4)."""
    guidance: float | None = None  # Prompt guidance scale; 1: none. Default: the hypernetwork's own, or the family's (5; SD 3 7, Flux 1).
    embedded_guidance: float | None = None
    """Flux dev: the guidance scale that the denoiser takes as an input, instead of an unconditional branch. Default: 3.5."""
    identity_guidance: float | Literal["off"] | None = None
    """Identity guidance scale: the base without the personal LoRA is the unconditional branch. "off": plain guidance, with the
    LoRA in both branches. Default: the hypernetwork's own, or off."""
    identity_until: float | None = None
    """The fraction of the denoising steps, 0 to 1, after which the identity scale is 1 at most: early steps decide the identity, and
    in later ones a high scale only weakens what the prompt asks for. Default: the hypernetwork's own, or 1."""
    context_guidance: float | None = None
    """Scale of context guidance: in the first steps the base without the personal LoRA gives the direction of the prompt, since the LoRA
    can blur what a prompt asks for (the color of a hat), which is decided early. Default: the hypernetwork's own, or 3."""
    context_until: float | None = None
    """The fraction of the denoising steps, 0 to 1, that use context guidance, before plain guidance; 0 turns it off. It is unused with
    identity guidance. Default: the hypernetwork's own, or 0."""
    strength: float | None = None  # Weight of the personal LoRA. Default: 1.
    scheduler: str | None = None
    """Class name of a scheduler of diffusers, such as EulerDiscreteScheduler; an unknown name lists them. Default: the base's own."""
    width: int | None = None  # Width in pixels. Default: the base's own.
    height: int | None = None  # Height in pixels. Default: the base's own.
    seed: int | None = None  # The first picture's seed; the next ones count up. Default: 0.
    count: int | None = None  # Pictures for each prompt. Default: 1.
    batch: int | None = None  # Pictures that are denoised in one batch. Default: 8.


@dataclass
class GenerateConfig:
    """The settings that generation runs with; `GenerateChoices` explains each. Scheduler, width and height: None is the base's own."""

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
        at_least(self, steps=1, count=1, batch=1)
        for name, value in (("identity_until", self.identity_until), ("context_until", self.context_until)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} is a fraction of the steps, 0 to 1, not {value}.")

    @property
    def identity(self) -> float | None:
        """The identity guidance scale, None for plain guidance."""
        return None if self.identity_guidance == "off" else float(self.identity_guidance)


def resolve(kind: type[T], *layers: tuple[str, object]) -> T:
    """Merges layers into settings of `kind`: the first layer that has a value for a field wins; without any, the field's default holds.

    Args:
        layers: (name, values), the values a mapping or a dataclass, in which None means "not given". The result's `origins` has for
            each field the name of the layer that its value came from, or "default".

    Raises InputError for a field that `kind` doesn't have, and for values that don't fit it.
    """
    settings, origins = kind(), {f.name: "default" for f in dataclasses.fields(kind) if f.name != "origins"}  # type: ignore[arg-type]
    for name, values in reversed(layers):
        given = values if isinstance(values, Mapping) else vars(values)
        given = {key.replace("-", "_"): value for key, value in given.items() if value is not None and key != "origins"}
        settings = updated(settings, given, name)
        origins |= dict.fromkeys(given, name)
    return dataclasses.replace(settings, origins=origins)  # type: ignore[type-var]


def explained(settings: PersonalizeConfig | GenerateConfig) -> list[str]:
    """One line for each setting: its value and where that came from."""
    return [f"{name} = {getattr(settings, name)!r} ({origin})" for name, origin in settings.origins.items()]


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads a YAML or JSON file as a dict, without the key RESOLVED. Raises InputError where it is missing, malformed or no mapping."""
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
    """A copy of `default` in which `values` replace its own, nested dataclasses included. Raises InputError as `parsed`."""
    return parsed(type(default), values, where, vars(default))


def required(kind: Any) -> list[str]:
    """The fields of a dataclass that have no default."""
    return [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING is field.default_factory]


def parsed(kind: type[T], values: Any, where: str, defaults: Mapping[str, Any] | None = None) -> T:
    """Makes a dataclass of `kind` from a mapping. Raises InputError, which names `where`, for an unknown, ill-typed or missing field."""
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a mapping of settings, not {_short(values)}.")
    hints, found = typing.get_type_hints(kind), dict(defaults or {})
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            # the fields of a command's nested `config` may be given at the top level, too
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
    """A YAML value as the type `hint`: YAML 1.1 reads 1e-3 as a string, and off and no as False; lists become tuples, strings paths.

    Raises InputError otherwise.
    """
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        for choice in choices:
            with suppress(InputError):
                return _coerced(value, choice, where)
    elif origin is typing.Literal:
        if value is False:
            value = next((choice for choice in choices if choice in ("off", "no")), value)
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
    raise InputError(f"{where} must be {_named(hint)}, not {_short(value)}.")


def _named(hint: Any) -> str:
    """A type as an error names it: "float or off" for `float | Literal["off"]`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_named(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))
