"""Command-line overrides: `section.field=value`, typed by the dataclass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from davinci_jax.errors import ConfigError, nearest
from davinci_jax.experiment.experiment import Experiment
from davinci_jax.experiment.serialize import parse, to_dict


def apply_overrides(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Returns the experiment with `a.b=value` assignments applied, then validated as a whole.

    Items of a tuple are named by their position or by their `name`: `curriculum.2-2.tokens=1e9`,
    `data.sources.0.weight=0.5`. Values are JSON where they parse as JSON, else text; `none` unsets.

    Raises:
      ConfigError: an assignment without `=`, an unknown name (the nearest one is offered) or a value of the
        wrong type.
    """
    tree = to_dict(experiment)
    for text in overrides:
        name, equals, value = text.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError("override", text, "has no '='", "write section.field=value")
        _assign(tree, name.split("."), _value(value), name)
    return parse(Experiment, tree, "")


def _value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except ValueError:
        return text


def _assign(tree: Any, keys: list[str], value: Any, name: str) -> None:
    for key in keys[:-1]:
        tree = tree[_key(tree, key, name)]
    tree[_key(tree, keys[-1], name)] = value


def _key(tree: Any, key: str, name: str) -> Any:
    """Returns the key or position of `key` in a dict or a list of named items."""
    if isinstance(tree, dict) and key in tree:
        return key
    if isinstance(tree, list):
        known = [
            str(item["name"]) if isinstance(item, dict) and "name" in item else str(n) for n, item in enumerate(tree)
        ]
        if key in known:
            return known.index(key)
        if key.isdigit() and int(key) < len(tree):
            return int(key)
    else:
        known = list(tree) if isinstance(tree, dict) else []
    if not known:
        raise ConfigError(
            name, None, f"goes below {key!r}, where there are no fields", "name a field, not a part of its value"
        )
    raise ConfigError(name, None, f"has an unknown part {key!r}", nearest(key, known))
