"""The model of a checkpoint, for reading: nothing in the run directory is changed, so a run may be going on."""

from __future__ import annotations

import functools
import logging
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from davinci_jax.errors import CheckpointError
from davinci_jax.experiment import Experiment, ModelConfig
from davinci_jax.models.decoder import Decoder, build
from davinci_jax.training.fingerprint import fingerprint
from davinci_jax.training.run_directory import check_same_model
from davinci_jax.training.seal import find_damage, read_meta, sealed_steps
from davinci_jax.training.trees import abstract, nested, unnested


def load_model(experiment: Experiment, step: int | None = None) -> tuple[Decoder, int]:
    """Returns the model of a whole checkpoint, divided over the current mesh, and its step.

    Args:
      experiment: the run.
      step: the checkpoint; `None` takes the newest whole one.

    Raises:
      CheckpointError: there is none, the one asked for is damaged, or the run trains another model.
    """
    check_same_model(experiment)
    folder = pathlib.Path(experiment.run.path).absolute() / "checkpoints"
    steps = sealed_steps(folder)
    if not steps or (step is not None and step not in steps):
        if not steps:
            raise CheckpointError(str(folder), None, "holds no whole checkpoint", "train first, or name another run")
        known = ", ".join(map(str, steps))
        raise CheckpointError("--step", step, f"{folder} has no whole checkpoint of it", f"give one of {known}")
    problems = []
    for candidate in [step] if step is not None else reversed(steps):
        problem = find_damage(folder / str(candidate))
        if problem is None:
            model, problem = _load(folder / str(candidate), experiment.model)
        if problem is None:
            return model, candidate
        problems.append(f"step {candidate}: {problem}")
        logging.getLogger(__name__).warning("checkpoint of %s", problems[-1])
    raise CheckpointError(str(folder), step, f"is damaged ({'; '.join(problems)})", "use another step or a copy")


def sealed_meta(experiment: Experiment) -> dict[str, Any] | None:
    """Returns what lies beside the arrays of the newest finished checkpoint, or `None` if there is none."""
    folder = pathlib.Path(experiment.run.path) / "checkpoints"
    steps = sealed_steps(folder)
    return read_meta(folder / str(steps[-1])) if steps else None


def _load(folder: pathlib.Path, config: ModelConfig) -> tuple[Decoder, str | None]:
    """Returns the model and what is wrong with it, if anything."""
    wanted = abstract(functools.partial(build, config, jax.random.key(0)))
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    logging.getLogger("absl").setLevel(logging.ERROR)
    with context:
        model = unnested(wanted, ocp.load(folder, {"model": nested(wanted)}, checkpointable_name="state")["model"])
    saved = read_meta(folder)["fingerprint"]
    wrong = [name for name, value in fingerprint(model).items() if saved.get(f".model{name}") != value]
    return model, f"array {wrong[0]} is not what was saved" if wrong else None
