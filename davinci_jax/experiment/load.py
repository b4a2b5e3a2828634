"""Experiments from files: Python recipes, resolved JSON, run directories."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import traceback

import davinci_jax.experiment as experiment_package
from davinci_jax.errors import ConfigError, UserError, nearest
from davinci_jax.experiment.curation import CurationConfig
from davinci_jax.experiment.experiment import Experiment
from davinci_jax.experiment.serialize import from_json, resolve

_KINDS = "an Experiment or a CurationConfig"


def load_config(path: str | pathlib.Path) -> Experiment:
    """Returns the experiment of a Python recipe, a resolved JSON file or a run directory.

    Args:
      path: a `.py` file with a function `config()`, a `.json` file, or a run directory.

    Raises:
      ConfigError: there is no such file, or it describes no experiment.
    """
    config = load_any(path)
    if isinstance(config, CurationConfig):
        raise ConfigError(
            "CONFIG", str(path), "describes curation, no experiment", "give it to `davinci curate` or `davinci cards`"
        )
    return config


def load_any(path: str | pathlib.Path) -> Experiment | CurationConfig:
    """Returns what `load_config` does, or the curation config that a Python recipe returns."""
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / "experiment.json"
        if not file.is_file():
            raise ConfigError(
                "CONFIG", str(path), "holds no experiment.json", "name the directory of a run, or a recipe"
            )
    if not file.is_file():
        raise ConfigError(
            "CONFIG", str(path), "does not exist", "name a recipe such as configs/quickstart.py, or a run directory"
        )
    if file.suffix == ".json":
        return from_json(_read(file), str(file))
    if file.suffix != ".py":
        raise ConfigError(
            "CONFIG", str(path), "is neither a Python recipe nor JSON", "name a file that ends in .py or .json"
        )
    return resolve(_run_recipe(file))


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "CONFIG", str(file), f"cannot be read ({error})", "give the experiment.json of a run"
        ) from error


def _run_recipe(file: pathlib.Path) -> Experiment | CurationConfig:
    spec = importlib.util.spec_from_file_location(f"davinci_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "config", None)):
            raise ConfigError("CONFIG", str(file), "has no function config()", f"let config() return {_KINDS}")
        config = module.config()
    except UserError:
        raise
    except Exception as error:
        raise ConfigError("CONFIG", _where(file, error), *_explain(error)) from error
    if not isinstance(config, (Experiment, CurationConfig)):
        problem = f"config() returned a value of type {type(config).__name__}"
        raise ConfigError("CONFIG", str(file), problem, f"return {_KINDS}")
    return config


def _where(file: pathlib.Path, error: Exception) -> str:
    """Returns the file, with the last line of it that the error passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    return f"{file}:{lines[-1]}" if lines else str(file)


def _explain(error: Exception) -> tuple[str, str]:
    """Returns the problem and the remedy; a mistyped field of a dataclass gets the nearest name."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kind = getattr(experiment_package, match[1], None) if match else None
    if kind is None:
        return f"cannot be run ({type(error).__name__}: {error})", "mend the recipe"
    return f"{match[1]} has no field {match[2]!r}", nearest(match[2], [f.name for f in dataclasses.fields(kind)])
