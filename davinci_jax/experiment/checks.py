"""Checks shared by the config dataclasses; every failure is one `ConfigError`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from davinci_jax.errors import ConfigError, nearest


def number(section: str, **values: Any) -> None:
    """Raises unless each value is a number; `None` means unset and passes."""
    for name, value in values.items():
        if value is not None and not isinstance(value, numbers.Real):
            raise ConfigError(f"{section}.{name}", value, "is not a number", "give a number")


def text(section: str, **values: Any) -> None:
    """Raises unless each value is text."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise ConfigError(f"{section}.{name}", value, "is not text", "put it in quotes")


def mapping(section: str, **values: Any) -> None:
    """Raises unless each value is a mapping of names to values."""
    for name, value in values.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"{section}.{name}", value, "is not a mapping", "give {name: value}")


def list_of(kind: type, field: str, value: Any) -> None:
    """Raises unless the value of a field is a tuple or list, and all its items are of a kind."""
    if not isinstance(value, (tuple, list)):
        raise ConfigError(field, None, f"is {_article(value)}, not a list", f"give a list of {kind.__name__}")
    for item in value:
        if not isinstance(item, kind):
            raise ConfigError(field, None, f"lists {_article(item)}", f"list {kind.__name__} alone")


def _article(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def positive(section: str, **values: float | None) -> None:
    """Raises unless each value is a finite number above zero; `None` means unset and passes."""
    number(section, **values)
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{section}.{name}", value, "must be above 0 and finite", "give a positive number")


def within(section: str, low: float, high: float, **values: float | None) -> None:
    """Raises unless each value is a finite number in [low, high]; `None` means unset and passes."""
    number(section, **values)
    for name, value in values.items():
        if value is not None and not (low <= value <= high and value < math.inf):
            problem, remedy = f"is outside [{low:g}, {high:g}]", f"give a number from {low:g} to {high:g}"
            if high == math.inf:
                problem, remedy = f"must be at least {low:g} and finite", f"give {low:g} or more"
            raise ConfigError(f"{section}.{name}", value, problem, remedy)


def one_of(section: str, known: Iterable[str], **values: str) -> None:
    """Raises unless each value is one of the known names."""
    known = tuple(known)
    for name, value in values.items():
        if value not in known:
            raise ConfigError(
                f"{section}.{name}", value, f"is not one of {', '.join(known)}", nearest(str(value), known)
            )
