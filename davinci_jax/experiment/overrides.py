"""Command-line overrides: `section.field=value`, typed by the dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from davinci_jax.errors import ConfigError, nearest
from davinci_jax.experiment.serialize import Config, Text, parse, to_dict

# Of a step, an input and Slurm: what may be in them is known to who builds these, and checked there.
_FREE = ("parameters", "options")


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Returns an experiment or a curation config with `a.b=value` assignments applied, then validated as a whole.

    Items of a tuple are named by their `name` or their position, and sources all at once by their domain:
    `curriculum.2-2.tokens=1e9`, `data.sources.0.weight=0.5`, `data.sources.QA.loss=answers`; steps of a recipe by
    their operation, all that have it, with any of its parameters. A value is read as its field's type; lists and
    objects are JSON; `none` unsets an optional field.

    Raises:
      ConfigError: an assignment without `=`, an unknown name (the nearest one is offered) or a value of the
        wrong type.
    """
    tree = to_dict(config)
    for text in overrides:
        name, equals, value = text.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError("override", text, "has no '='", "write section.field=value")
        _assign(tree, name.split("."), Text(value), name)
    return parse(type(config), tree, "")


def _assign(tree: Any, path: list[str], value: Text, name: str, part_of: str = "") -> None:
    free = len(path) == 1 and part_of in _FREE and isinstance(tree, dict)
    for key in [path[0]] if free else _keys(tree, path[0], name):
        if len(path) == 1:
            tree[key] = value
        else:
            # An earlier override may have replaced this part as a whole.
            tree[key] = tree[key].decode() if isinstance(tree[key], Text) else tree[key]
            _assign(tree[key], path[1:], value, name, path[0])


def _keys(tree: Any, part: str, name: str) -> list[str] | list[int]:
    """Returns the keys or positions that a part of a dotted name stands for in a dict or a list."""
    if isinstance(tree, dict):
        found, known = [part] if part in tree else [], list(tree)
    elif isinstance(tree, list):
        items = [item if isinstance(item, dict) else {} for item in tree]
        found = [n for n, item in enumerate(items) if item.get("name") == part]
        found = found or [n for n, item in enumerate(items) if part in (item.get("domain"), item.get("operation"))]
        found = found or [n for n in range(len(tree)) if str(n) == part]
        known = [str(item.get("name") or item.get("operation") or n) for n, item in enumerate(items)]
    else:
        raise ConfigError(
            name, None, f"has no part {part!r}: what is before it has no fields", "name a field that is set"
        )
    if not found:
        raise ConfigError(name, None, f"has an unknown part {part!r}", nearest(part, known))
    return found
