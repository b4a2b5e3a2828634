"""The training loop: start or continue a run in its directory until its last stage ends."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from davinci_jax.data.batch import Batch
from davinci_jax.errors import CheckpointError, TrainingError
from davinci_jax.experiment import Experiment
from davinci_jax.sharding import make_mesh
from davinci_jax.training.checkpoint import Checkpoints
from davinci_jax.training.inputs import Inputs, check_unchanged, open_inputs, shard_fingerprints
from davinci_jax.training.interrupt import StopRequest
from davinci_jax.training.layout import BatchLayout, batch_layout
from davinci_jax.training.monitor import Monitor
from davinci_jax.training.run_directory import open_run_directory, record_curriculum
from davinci_jax.training.state import TrainState, abstract_state, init_state, make_optimizer
from davinci_jax.training.step import make_step
from davinci_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: the run directory, the steps done, and the signal that stopped it, if any."""

    directory: pathlib.Path
    step: int
    stopped_by: str | None


def train(experiment: Experiment) -> Outcome:
    """Starts the run, or continues it from its newest whole checkpoint; returns when it ends or is asked to stop.

    Raises:
      UserError: anything that the user can mend; the run directory is left so that the same command continues it.
    """
    mesh = make_mesh(experiment.mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        layout = batch_layout(experiment, mesh)
        inputs = open_inputs(experiment, layout)
        directory = stack.enter_context(open_run_directory(experiment))
        record_curriculum(directory, experiment, inputs.timeline)
        checkpoints = Checkpoints(directory / "checkpoints", experiment.checkpoint)
        try:
            with Monitor(experiment, inputs.timeline, directory) as monitor, StopRequest() as stop:
                outcome = _Run(experiment, layout, inputs, checkpoints, monitor, stop, directory).go()
        except BaseException:
            with contextlib.suppress(CheckpointError):  # a save that failed too must not hide what happened first
                checkpoints.close()
            raise
        finally:
            inputs.close()
        checkpoints.close()
        return outcome


class _Run:
    """One call of `train`, with everything open."""

    def __init__(
        self, experiment: Experiment, layout: BatchLayout, inputs: Inputs, checkpoints: Checkpoints,
        monitor: Monitor, stop: StopRequest, directory: pathlib.Path,
    ):  # fmt: skip
        self.experiment, self.layout, self.inputs = experiment, layout, inputs
        self.checkpoints, self.monitor, self.stop, self.directory = checkpoints, monitor, stop, directory
        self.optimizer = make_optimizer(experiment, inputs.timeline)
        self.watchdog = Watchdog(experiment.run.watchdog_seconds)
        self.last_saved = -1
        self._unread: tuple[int, Any] | None = None

    def go(self) -> Outcome:
        """Runs steps until the end of the table or a stop; always leaves a checkpoint of where it stopped."""
        try:
            return self._go()
        finally:
            self.watchdog.pause()

    def _go(self) -> Outcome:
        state = self._first_state()
        first, last = int(state.step), self.inputs.timeline.num_steps
        if first < last:
            state = self._steps(state, first)
        done = int(state.step)
        if done > self.last_saved:
            self._save(state)
        self.checkpoints.wait()
        stopped_by = self.stop.signal if done < last else None
        self.monitor.finish(done, stopped_by)
        return Outcome(self.directory, done, stopped_by)

    def _first_state(self) -> TrainState:
        config, seed = self.experiment.model, self.experiment.run.seed
        abstract = abstract_state(config, self.optimizer, seed)
        restored = self.checkpoints.restore(abstract)
        for step, why in self.checkpoints.damaged:
            self.monitor.damaged_checkpoint(step, why)
        for step in self.checkpoints.unfinished:
            self.monitor.unfinished_checkpoint(step)
        if restored is None:
            state, first = init_state(config, self.optimizer, seed), 0
        else:
            state, meta = restored
            check_unchanged(self.inputs.rows, self.experiment, meta["shards"])
            first = self.last_saved = int(meta["step"])
        self.monitor.start(first, self.layout)
        return state

    def _steps(self, state: TrainState, first: int) -> TrainState:
        step_function = None
        waited = time.perf_counter()
        for step, batch in self.inputs.loader.steps(first):
            self.monitor.data_wait(time.perf_counter() - waited)
            arguments = (self.layout.put(batch), jnp.asarray(batch.tokens.shape[0], jnp.int32))
            if step_function is None:
                step_function = self._compile(state, *arguments)
            state, metrics = step_function(state, *arguments)
            self._read_metrics()
            self._unread = (step, metrics)
            self._after(step + 1, state)
            self.watchdog.beat()
            if self.stop.now(step + 1):
                break
            waited = time.perf_counter()
        self._read_metrics()
        self.monitor.flush()
        return state

    def _compile(self, state: TrainState, batch: Batch, num_micro: jax.Array) -> Any:
        """Compiles ahead of the first call: one executable serves the whole run, and the time is told apart."""
        started = time.perf_counter()
        step = make_step(self.experiment.model, self.optimizer, len(self.experiment.data.sources), state)
        compiled = step.lower(state, batch, num_micro).compile()
        self.monitor.compiled(int(state.step), time.perf_counter() - started)
        return compiled

    def _after(self, done: int, state: TrainState) -> None:
        """What is due after `done` steps, in this order: who finds the checkpoint of a step finds its figures too."""
        stage_ends = any(done == self.inputs.timeline.steps_of(n).stop for n in range(self.inputs.timeline.num_stages))
        if done % self.experiment.run.log_every_steps == 0 or stage_ends:
            self._read_metrics()
            self.monitor.flush()
        every = self.experiment.evaluation.every_steps
        if every is not None and (stage_ends or (every and done % every == 0)):
            self._evaluate(state)
        if done % self.experiment.checkpoint.every_steps == 0:
            self._save(state)
        self.checkpoints.poll()

    def _read_metrics(self) -> None:
        """Fetches the metrics of the step before, one step late, so that the devices never wait for the host."""
        if self._unread is None:
            return
        (step, metrics), self._unread = self._unread, None
        metrics = jax.tree.map(np.asarray, metrics)
        for name in ("loss", "grad_norm", "param_norm"):
            if not math.isfinite(metrics[name]):
                self._stop_on_non_finite(step, name, float(metrics[name]))
        self.monitor.step(step, metrics)

    def _stop_on_non_finite(self, step: int, name: str, value: float) -> None:
        info = self.inputs.timeline.at(step)
        stage = self.experiment.curriculum[info.stage].name
        with contextlib.suppress(CheckpointError):
            self.checkpoints.wait()
        whole = self.checkpoints.steps()
        self.monitor.flush()
        self.monitor.non_finite(step + 1, name)
        raise TrainingError(
            name,
            value,
            f"is not finite at step {step + 1} (stage {stage}, sequences {info.first_sequence} to "
            f"{info.first_sequence + info.batch_size - 1}, learning rate {info.learning_rate:.3g})",
            f"see its documents with `davinci trace {self.directory} --step {step + 1}`; "
            + (f"the checkpoint of step {whole[-1]} is whole" if whole else "no checkpoint was written yet"),
        )

    def _evaluate(self, state: TrainState) -> None:
        self._read_metrics()
        with self.monitor.paused():
            self.watchdog.pause()
            done = int(state.step)
            result = self.inputs.heldout.evaluate(state.model)
            if result is not None:
                self.monitor.evaluation(done, result)

    def _save(self, state: TrainState) -> None:
        self._read_metrics()  # a state that is not finite is never saved
        with self.monitor.paused():
            self.watchdog.pause()
            meta = {"shards": shard_fingerprints(self.inputs.rows, self.experiment)}
            self.last_saved = self.checkpoints.save(state, meta)
            self.monitor.checkpoint(self.last_saved)
