"""Configs as files: a dataclass from YAML or JSON. Every command saves its own beside what it made, as JSON."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import InputError

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
    return values


def updated(default: T, values: dict[str, Any], where: str) -> T:
    """`default` with `values` over it, nested dataclasses included. Raises InputError for an unknown or ill-typed field."""
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        raise TypeError(default)
    hints = typing.get_type_hints(type(default))
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise InputError(f"{where}: unknown setting {key!r}; there are {', '.join(fields)}.")
        if dataclasses.is_dataclass(fields[name]):
            if not isinstance(value, dict):
                raise InputError(f"{where}: {key} must be a mapping of settings, not {value!r}.")
            fields[name] = updated(fields[name], value, f"{where}: {key}")
        else:
            fields[name] = _coerced(value, hints[name], f"{where}: {key}")
    result: T = type(default)(**fields)
    return result


def _coerced(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as the field's type: 1e-3 is a string to YAML 1.1, lists become tuples, strings paths."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        for choice in choices:
            try:
                return _coerced(value, choice, where)
            except InputError:
                continue
    elif origin is typing.Literal:
        if value in choices:
            return value
        raise InputError(f"{where} must be one of {', '.join(map(str, choices))}, not {value!r}.")
    elif origin in (tuple, list):
        if isinstance(value, (list, tuple)):
            return origin(_coerced(item, choices[0], where) for item in value) if choices else origin(value)
    elif origin is typing.Annotated:
        return _coerced(value, choices[0], where)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is Any or (isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise InputError(f"{where} must be {getattr(hint, '__name__', hint)}, not {value!r}.")
