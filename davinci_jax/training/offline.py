"""What is done with a run's checkpoints beside training: evaluate, export, and begin from other weights."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from davinci_jax.data.tokenizer import SentencePieceTokenizer
from davinci_jax.errors import CheckpointError, DataError
from davinci_jax.experiment import Experiment, to_dict
from davinci_jax.models import huggingface
from davinci_jax.sharding import make_mesh
from davinci_jax.training.checkpoint import Checkpoints
from davinci_jax.training.inputs import open_heldout, open_inputs, open_tokenizer, shard_fingerprints, tokenizer_path
from davinci_jax.training.layout import batch_layout
from davinci_jax.training.load import load_model
from davinci_jax.training.run_directory import open_run_directory, write_evaluation
from davinci_jax.training.state import TrainState, make_optimizer


def evaluate_run(experiment: Experiment, step: int | None) -> tuple[dict[str, Any], pathlib.Path]:
    """Evaluates a checkpoint on the held-out documents; returns the result and the file it was written to."""
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        heldout = open_heldout(experiment, mesh)
        model, step = load_model(experiment, step)
        result = heldout.evaluate(model)
    if result is None:
        raise DataError(
            "data.heldout", experiment.data.heldout, "keeps no row to evaluate on", "raise it and shard again"
        )
    return result, write_evaluation(pathlib.Path(experiment.run.path), step, result)


def export_run(experiment: Experiment, folder: pathlib.Path, step: int | None, dtype: str) -> None:
    """Writes a checkpoint and its tokenizer as a Hugging Face folder.

    A SentencePiece model is left out, and said so: transformers reads other ids from it.
    """
    tokenizer = tokenizer_path(experiment)
    if tokenizer.suffix != ".json":
        print(f"{tokenizer} is left out: transformers needs a tokenizer.json")
    with jax.set_mesh(make_mesh(experiment.mesh)):
        model, _ = load_model(experiment, step)
        file = tokenizer if tokenizer.suffix == ".json" else None
        huggingface.save(model, experiment.model, folder, file, dtype=dtype)


def import_run(experiment: Experiment, folder: pathlib.Path) -> pathlib.Path:
    """Makes step 0 of a run from the weights of a Hugging Face folder; returns the run directory.

    Raises:
      ConfigError: the folder holds an architecture that the decoder does not have.
      CheckpointError: it differs from the config's model or tokenizer, or the run has checkpoints already.
    """
    _check_same_model(experiment, huggingface.read_config(folder), folder)
    _check_same_tokenizer(experiment, folder)
    mesh = make_mesh(experiment.mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        inputs = stack.enter_context(contextlib.closing(open_inputs(experiment, batch_layout(experiment, mesh))))
        model = huggingface.load_weights(experiment.model, folder)  # before anything is made: it may be damaged
        directory = stack.enter_context(open_run_directory(experiment))
        checkpoints = Checkpoints(directory / "checkpoints", experiment.checkpoint)
        stack.enter_context(contextlib.closing(checkpoints))
        if checkpoints.steps():
            raise CheckpointError(
                str(directory),
                None,
                f"has checkpoints of steps {checkpoints.steps()} already",
                "give the run another run.directory",
            )
        optimizer = make_optimizer(experiment, inputs.timeline)
        state = TrainState(jnp.zeros((), jnp.int32), model, jax.jit(optimizer.init)(model))
        checkpoints.save(state, {"shards": shard_fingerprints(inputs.rows, experiment)})
    return directory


def _check_same_tokenizer(experiment: Experiment, folder: pathlib.Path) -> None:
    """Raises if the folder has another tokenizer than the run, of the same format: its weights would be fed other ids.

    Where the folder has none of that format, a line says that nothing was compared.
    """
    mine = open_tokenizer(experiment)
    formats = ("tokenizer.json", "tokenizer.model")
    file = folder / formats[isinstance(mine, SentencePieceTokenizer)]
    if not file.is_file():
        found = " ".join(name for name in formats if (folder / name).is_file()) or "no tokenizer"
        print(
            f"{tokenizer_path(experiment)} could not be compared with the tokenizer that the weights have learnt: "
            f"{folder} holds {found}; see to it that both give the same ids"
        )
        return
    theirs = file.read_bytes()
    if theirs != mine.content and (file.suffix != ".json" or json.loads(theirs) != json.loads(mine.content)):
        raise CheckpointError(
            str(file),
            None,
            f"is another tokenizer than {tokenizer_path(experiment)}",
            "copy it there and shard again, so that ids mean what the weights have learnt",
        )


def _check_same_model(experiment: Experiment, found: Any, folder: pathlib.Path) -> None:
    """Raises with the fields in which the folder's architecture differs from the config's."""
    runtime = ("init_std", "compute_dtype", "remat", "loss_chunk", "z_loss", "max_positions")
    there, here = to_dict(found), to_dict(experiment.model)
    differing = [name for name in here if name not in runtime and here[name] != there[name]]
    if differing:
        shown = "; ".join(f"model.{name}: {there[name]} there, {here[name]} in the config" for name in differing)
        raise CheckpointError(str(folder), None, f"holds another model ({shown})", "give the config these values")
