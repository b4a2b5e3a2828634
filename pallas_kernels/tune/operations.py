"""The operations that can be tuned: each `tuning` or `tuning_...` module in a folder of `pallas_kernels.kernels`."""

import difflib
import importlib
import pkgutil
import types
from collections.abc import Iterable
from typing import Any, Protocol

import jax

import pallas_kernels.kernels
from pallas_kernels.compiler import aot
from pallas_kernels.errors import ArgumentError


class Tuning(Protocol):
    """What a tuning module holds.

    It may also hold `cycles(report, shape, config) -> float`, the cycles on one core of what `build` gave as
    `aot.compile_for` reports it, where the schedule alone does not tell how often a branch runs;
    `arguments(family, shape, config) -> list[jax.Array]`, where random numbers and zeros do not make a fair timing; and
    `FAMILIES`, where its kernels are not for every one.
    """

    OPERATION: str  # the name of its table

    def shapes(self) -> dict[str, Any]:
        """Shapes worth tuning, by the name that `--shape` takes."""

    def candidates(self, family: str, shape: Any) -> list[Any]:
        """Configs to compare: frozen dataclasses."""

    def build(self, family: str, shape: Any, config: Any) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
        """The function to time and its arguments."""

    def shape_class(self, shape: Any) -> str:
        """The key of the table."""


def find(name: str, package: types.ModuleType = pallas_kernels.kernels) -> Tuning:
    """The tuning module of an operation.

    Raises:
      ArgumentError: there is none of that name.
    """
    found = {module.OPERATION: module for module in modules(package)}
    check("tune", "operation", name, found)
    return found[name]


def check(function: str, argument: str, name: str, known: Iterable[str]) -> None:
    """Raises an ArgumentError with the nearest name if `name` is not among the known ones."""
    known = list(known)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        remedy = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(known) or 'none'}"
        raise ArgumentError(function, argument, f"is {name!r}, which is unknown", remedy)


def device_of(family: str) -> str:
    """The device that `aot.compile_for` compiles for, of a family of `target.Target.family`."""
    return next(name for name, device in aot.DEVICES.items() if device.target.family == family)


def families(module: Any = None) -> list[str]:
    """The families of devices that tables, or that of one operation, have entries for."""
    return list(getattr(module, "FAMILIES", [device.target.family for device in aot.DEVICES.values()]))


def modules(package: types.ModuleType = pallas_kernels.kernels) -> list[Any]:
    """All tuning modules; without those of Hopper where absl-py is missing, which Mosaic GPU needs."""
    found = []
    for entry in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        inner = pkgutil.iter_modules(_path(entry.name)) if entry.ispkg else ()
        for name in (module.name for module in inner if module.name.split("_")[0] == "tuning"):
            try:
                found.append(load(f"{entry.name}.{name}"))
            except ModuleNotFoundError as error:
                if error.name != "absl":
                    raise
    return found


def load(module: str) -> Any:
    """The module of that name, which is one that `find` came upon."""
    return importlib.import_module(module)


def _path(package: str) -> list[str]:
    return list(load(package).__path__)
