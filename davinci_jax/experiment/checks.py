"""Checks shared by the config dataclasses; every failure is one `ConfigError`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from davinci_jax.errors import ConfigError, nearest


def positive(section: str, **values: float | None) -> None:
    """Raises unless each value is finite and above zero; `None` means unset and passes."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{section}.{name}", value, "must be above 0 and finite", "give a positive number")


def within(section: str, low: float, high: float, **values: float | None) -> None:
    """Raises unless each value is finite and lies in [low, high]; `None` means unset and passes."""
    for name, value in values.items():
        if value is not None and not (low <= value <= high and value < math.inf):
            raise ConfigError(
                f"{section}.{name}", value, f"is outside [{low:g}, {high:g}]", f"give a number from {low:g} to {high:g}"
            )


def one_of(section: str, known: Iterable[str], **values: str) -> None:
    """Raises unless each value is one of the known names."""
    known = tuple(known)
    for name, value in values.items():
        if value not in known:
            raise ConfigError(
                f"{section}.{name}", value, f"is not one of {', '.join(known)}", nearest(str(value), known)
            )
