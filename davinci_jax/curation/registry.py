"""Names of operations: what a recipe writes, and where the operation lies.

A new operation is one line in `OPERATIONS`, and a function below where its file is new: modules are imported
when a recipe names them, since some need a library of the extra `curation`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

from davinci_jax.curation.corpus import CorpusOperation
from davinci_jax.curation.pipeline import Operation
from davinci_jax.errors import ConfigError, nearest
from davinci_jax.experiment.curation import Step
from davinci_jax.experiment.serialize import parse


def _extract() -> ModuleType:
    from davinci_jax.curation import extract

    return extract


def _rules() -> ModuleType:
    from davinci_jax.curation import rules

    return rules


# Name in a recipe -> (module, class).
OPERATIONS: dict[str, tuple[Callable[[], ModuleType], str]] = {
    "decode-utf8": (_extract, "DecodeUtf8"),
    "docstring-pages": (_extract, "DocstringPages"),
    "doctest-pairs": (_extract, "DoctestPairs"),
    "drop-garbled": (_rules, "DropGarbled"),
    "drop-paths": (_rules, "DropPaths"),
    "drop-short": (_rules, "DropShort"),
    "drop-unparsable": (_rules, "DropUnparsable"),
}


def operation_class(name: str, field: str = "recipe") -> type:
    """Returns the dataclass of an operation; raises `ConfigError` that offers the nearest name.

    Args:
      name: as a recipe writes it.
      field: what the error calls the place of the name.
    """
    if name not in OPERATIONS:
        raise ConfigError(field, name, "is no operation", nearest(name, OPERATIONS))
    module, kind = OPERATIONS[name]
    return getattr(module(), kind)


def build(step: Step, field: str = "recipe") -> Operation | CorpusOperation:
    """Returns the operation that a step of a recipe names, with its parameters in their declared types.

    Raises:
      ConfigError: an unknown operation, an unknown parameter or one of the wrong type, or a missing one.
    """
    kind = operation_class(step.operation, field)
    return parse(kind, dict(step.parameters), f"{field}.{step.operation}")


def describe(name: str) -> list[str]:
    """Returns a line "name: type = default" for each parameter of an operation."""
    lines = []
    for item in dataclasses.fields(operation_class(name)):
        default = "" if item.default is dataclasses.MISSING else f" = {item.default!r}"
        lines.append(f"{item.name}: {item.type}{default}")
    return lines
