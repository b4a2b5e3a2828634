"""Experiments as JSON, and configs as Python files.

JSON that comes from a run directory is data only: it is read into the dataclasses field by field, an unknown
key is an error and nothing is imported or evaluated.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import types
import typing
from typing import Any

from davinci_jax.errors import ConfigError, nearest
from davinci_jax.experiment.experiment import Experiment

# Fields that say where or how a run executes, not what it computes; a run may be continued with others.
_NOT_IDENTITY = {
    "run": ("name", "directory", "log_every_steps", "tensorboard", "peak_flops", "watchdog_seconds"),
    "data": ("root", "workers", "prefetch"),
    "checkpoint": ("every_steps", "keep_last", "keep_every"),
    "evaluation": ("every_steps", "tokens"),
}


def to_dict(value: Any) -> Any:
    """Returns a dataclass as plain dicts, lists and numbers, ready for JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, collections.abc.Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    return value


def to_json(experiment: Experiment) -> str:
    """Returns the resolved experiment as indented JSON."""
    return json.dumps(to_dict(experiment), indent=2) + "\n"


def identity(experiment: Experiment) -> dict[str, Any]:
    """Returns the fields that decide what the run computes, flattened to dotted names."""
    tree = to_dict(experiment)
    for section, names in _NOT_IDENTITY.items():
        for name in names:
            del tree[section][name]
    return flatten(tree)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns dotted name -> leaf of nested dicts and lists."""
    if isinstance(tree, (dict, list)) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: leaf for key, item in items for name, leaf in flatten(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree}


def fingerprint(experiment: Experiment) -> str:
    """Returns 16 hex digits that change when, and only when, what the run computes changes."""
    text = json.dumps(identity(experiment), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse(kind: Any, value: Any, field: str) -> Any:
    """Returns a plain JSON value as the annotated type; raises `ConfigError` that names the field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return parse(next(arg for arg in args if arg is not type(None)), value, field)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, field)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(parse(args[0], item, f"{field}.{n}") for n, item in enumerate(value))
    if origin is collections.abc.Mapping and isinstance(value, dict):
        return {str(key): parse(args[1], item, f"{field}.{key}") for key, item in value.items()}
    return _parse_scalar(kind, value, field)


def _parse_dataclass(kind: Any, value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(field or "experiment", value, f"is not a {kind.__name__}", "give its fields as a JSON object")
    hints = typing.get_type_hints(kind)
    prefix = f"{field}." if field else ""
    for key in value:
        if key not in hints:
            raise ConfigError(f"{prefix}{key}", None, "is an unknown field", nearest(key, hints))
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
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(field, value, f"is not {names.get(kind, 'a list or object of the right form')}", "mend its type")


def from_json(text: str, origin: str = "experiment.json") -> Experiment:
    """Returns the experiment written by `to_json`; raises `ConfigError` on anything else."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ConfigError(origin, None, f"is not JSON ({error})", "give the experiment.json of a run") from error
    return parse(Experiment, tree, "")


def load_config(path: str) -> Experiment:
    """Returns the experiment of a Python recipe, a resolved JSON file or a run directory.

    Args:
      path: a `.py` file with a function `config()`, a `.json` file, or a run directory.

    Raises:
      ConfigError: there is no such file, or it describes no experiment.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / "experiment.json"
    if not file.is_file():
        raise ConfigError(
            "CONFIG", path, "does not exist", "name a recipe such as configs/quickstart.py, or a run directory"
        )
    if file.suffix == ".json":
        return from_json(file.read_text(), str(file))
    if file.suffix != ".py":
        raise ConfigError(
            "CONFIG", path, "is neither a Python recipe nor JSON", "name a file that ends in .py or .json"
        )
    return _run_recipe(file)


def _run_recipe(file: pathlib.Path) -> Experiment:
    spec = importlib.util.spec_from_file_location(f"davinci_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            "CONFIG", str(file), f"cannot be run ({type(error).__name__}: {error})", "mend the recipe"
        ) from error
    if not callable(getattr(module, "config", None)):
        raise ConfigError("CONFIG", str(file), "has no function config()", "let config() return an Experiment")
    experiment = module.config()
    if not isinstance(experiment, Experiment):
        raise ConfigError(
            "CONFIG", str(file), f"config() returned a {type(experiment).__name__}", "return an Experiment"
        )
    return experiment
