"""Dataclasses out of YAML and JSON: the schema that every file of settings is checked by.

Every command saves its own settings beside what it made, as JSON, and takes them from such a file. A hypernetwork's config.json is
read by the same functions.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import InputError

RESOLVED = "resolved"  # What saved settings hold for people alone: nothing is read from it.
T = TypeVar("T")


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
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            if math.isfinite(float(value)):
                return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is Any or (isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise InputError(f"{where} must be {getattr(hint, '__name__', hint)}, not {_short(value)}.")
