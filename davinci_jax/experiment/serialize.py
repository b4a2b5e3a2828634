"""Experiments as JSON.

JSON that comes from a run directory is data only: it is read into the dataclasses field by field, an unknown
key is an error and nothing is imported or evaluated.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import json
import types
import typing
from typing import Any, TypeVar

from davinci_jax.errors import ConfigError, nearest
from davinci_jax.experiment.experiment import Experiment

Config = TypeVar("Config")
_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class Text(str):
    """A value as typed on the command line; the field that it is for decides what it means."""

    def decode(self) -> Any:
        """Returns the value as JSON or as a Python literal where it is one, else itself."""
        named = {"none": None, "null": None, "true": True, "false": False}
        if self.lower() in named:
            return named[self.lower()]
        for read in (json.loads, ast.literal_eval):
            try:
                return read(self)
            except (ValueError, SyntaxError):
                continue
        return str(self)


def to_dict(value: Any) -> Any:
    """Returns a dataclass as plain dicts, lists and numbers, ready for JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, collections.abc.Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    return value


def to_json(config: Config) -> str:
    """Returns an experiment or a curation config as indented JSON, every field resolved."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str, origin: str = "experiment.json") -> Experiment:
    """Returns the experiment written by `to_json`; raises `ConfigError` on anything else."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ConfigError(origin, None, f"is not JSON ({error})", "give the experiment.json of a run") from error
    return parse(Experiment, tree, "")


def resolve(config: Config) -> Config:
    """Returns an experiment or a curation config with every field in its declared type: what its JSON gives.

    Raises:
      ConfigError: a field that Python let pass with a value of another type.
    """
    return parse(type(config), to_dict(config), "")


def parse(kind: Any, value: Any, field: str) -> Any:
    """Returns a plain value as the annotated type; raises `ConfigError` that names the field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value.decode() if isinstance(value, Text) else value
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, Text) and value.decode() is None):
            return None
        return parse(next(arg for arg in args if arg is not type(None)), value, field)
    if isinstance(value, Text):
        value = str(value) if kind is str else value.decode()
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, field)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_parse_item(args[0], item, field, n) for n, item in enumerate(value))
    if origin is collections.abc.Mapping and isinstance(value, dict):
        return {str(key): parse(args[1], item, f"{field}.{key}") for key, item in value.items()}
    return _parse_scalar(kind, value, field)


def _parse_item(kind: Any, item: Any, field: str, position: int) -> Any:
    """Parses an item of a list; what is wrong with it is told with its name, or else its position."""
    name = item.get("name") if isinstance(item, dict) else None
    place = f"{field}.{name if isinstance(name, str) and name else position}"
    try:
        return parse(kind, item, place)
    except ConfigError as error:
        # A dataclass knows its own field only: curriculum.batch, not of which stage.
        if not error.field.startswith(f"{field}.") or error.field.startswith(place):
            raise
        where = place + error.field.removeprefix(field)
        raise ConfigError(where, error.value, error.problem, error.remedy) from error


def _parse_dataclass(kind: Any, value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(field or "experiment", value, f"is no {kind.__name__}", "give its fields as a JSON object")
    hints = typing.get_type_hints(kind)
    prefix = f"{field}." if field else ""
    for key in value:
        if key not in hints:
            raise ConfigError(f"{prefix}{key}", None, "is an unknown field", nearest(str(key), hints))
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in value:
            raise ConfigError(f"{prefix}{item.name}", None, "is missing", f"{kind.__name__} needs it")
    return kind(**{key: parse(hints[key], item, f"{prefix}{key}") for key, item in value.items()})


def _parse_scalar(kind: Any, value: Any, field: str) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is kind:
        return value
    expected = _SCALARS.get(kind, "a list" if typing.get_origin(kind) is tuple else "an object")
    problem = "cannot be unset" if value is None else f"is not {expected}"
    raise ConfigError(field, value, problem, f"give {expected}")
