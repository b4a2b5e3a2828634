"""The run directory: opened for a new run or for the one that lies there."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.errors import CheckpointError, ConfigError
from davinci_jax.experiment import Experiment, fingerprint, identity, load_config, to_dict, to_json
from davinci_jax.files import write_atomically
from davinci_jax.training.distributed import on_first_host


@contextlib.contextmanager
def open_run_directory(experiment: Experiment) -> Iterator[pathlib.Path]:
    """Gives the run directory, made if it is not there, with the resolved experiment in it; locked until it is left.

    The lock is taken before anything is written, so a start that is refused leaves a run that goes on as it is. Only
    the first host holds it.

    Raises:
      CheckpointError: the directory belongs to an experiment that computes something else, with what differs, or
        another process is training there.
      ConfigError: the directory cannot be made.
    """
    directory = pathlib.Path(experiment.run.path)
    with contextlib.ExitStack() as stack:
        on_first_host(lambda: _open(directory, experiment, stack))
        yield directory


def _open(directory: pathlib.Path, experiment: Experiment, stack: contextlib.ExitStack) -> None:
    file = directory / "experiment.json"
    if file.is_file():
        check_same(load_config(str(file)), experiment, directory)
    elif directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise CheckpointError(
            str(directory),
            None,
            "is not empty and holds no experiment.json",
            "choose another run.directory or empty it",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise ConfigError("run.directory", str(directory), "cannot be made", "name another folder") from error
    _lock(directory, stack)
    write_atomically(file, to_json(_from_anywhere(experiment)))


def _lock(directory: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Keeps other processes from training in the run directory until the stack is left."""
    file = stack.enter_context((directory / ".lock").open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            str(directory), None, "is being trained by another process", "wait for it or stop it"
        ) from error


def _from_anywhere(experiment: Experiment) -> Experiment:
    """Returns the experiment with `data.root` absolute: verbs read it from the run directory, started in any folder."""
    data = dataclasses.replace(experiment.data, root=os.path.abspath(experiment.data.root))
    return dataclasses.replace(experiment, data=data)


def check_same(old: Experiment, new: Experiment, directory: pathlib.Path) -> None:
    """Raises `CheckpointError` with the list of differing fields unless both experiments compute the same."""
    if fingerprint(old) != fingerprint(new):
        remedy = "use its experiment.json to continue it, or give this one another run.directory"
        _compare(identity(old), identity(new), directory, remedy)


def check_same_model(experiment: Experiment) -> None:
    """Raises `CheckpointError` unless the model is the one that the run in the directory trains, if there is a run.

    A field such as `rope_base` changes no shape: the checkpoint would load, and compute something else.
    """
    file = pathlib.Path(experiment.run.path) / "experiment.json"
    if file.is_file():
        there, here = (
            {name: value for name, value in identity(one).items() if name.startswith("model.")}
            for one in (load_config(str(file)), experiment)
        )
        remedy = "leave the model as its experiment.json has it, or name the directory of another run"
        _compare(there, here, file.parent, remedy)


def _compare(before: dict[str, Any], after: dict[str, Any], directory: pathlib.Path, remedy: str) -> None:
    """Raises with the list of differing fields, if there are any."""
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name, "-") != after.get(name, "-")]
    if not names:
        return
    shown = "; ".join(
        f"{name}: {before.get(name, 'unset')} there, {after.get(name, 'unset')} here" for name in names[:8]
    )
    more = f" and {len(names) - 8} more fields" if len(names) > 8 else ""
    raise CheckpointError(str(directory), None, f"holds a run of another experiment ({shown}{more})", remedy)


def record_curriculum(directory: pathlib.Path, experiment: Experiment, timeline: Timeline) -> None:
    """Writes the decisions that the run starts with to curriculum.jsonl, once."""
    file = directory / "curriculum.jsonl"
    if file.is_file() or jax.process_index():
        return
    lines = [
        {"decision": "planned", "first_step": timeline.steps_of(n).start, "stage": to_dict(stage)}
        for n, stage in enumerate(experiment.curriculum)
    ]
    write_atomically(file, "".join(json.dumps(line) + "\n" for line in lines))


def write_evaluation(directory: pathlib.Path, step: int, result: dict[str, Any]) -> pathlib.Path:
    """Writes the held-out figures of a step to evaluations/<step>.json and returns the file."""
    file = directory / "evaluations" / f"{step}.json"
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps({"step": step, **result}, indent=2) + "\n")
    return file
