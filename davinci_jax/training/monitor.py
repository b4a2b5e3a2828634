"""What a run tells while it goes: metrics gathered over an interval, to the files and the display."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.experiment import Experiment
from davinci_jax.models.flops import flops_per_token, num_active_params, num_params, peak_flops
from davinci_jax.training import experts
from davinci_jax.training.display import Display
from davinci_jax.training.layout import BatchLayout
from davinci_jax.training.metrics import MetricsWriter, device_memory_bytes, host_memory_bytes
from davinci_jax.training.run_directory import write_evaluation


class Monitor:
    """Writes metrics and events and drives the display; a context manager. Only the first host tells anything."""

    def __init__(self, experiment: Experiment, timeline: Timeline, directory: pathlib.Path):
        self._experiment, self._timeline, self._directory = experiment, timeline, directory
        self._flops = flops_per_token(experiment.model, experiment.data.sequence_length)
        device = jax.devices()[0]
        self._peak = experiment.run.peak_flops or peak_flops(device.device_kind, experiment.model.compute_dtype)
        self._domains = experiment.data.domains
        self._of_domain = np.array([[s.domain == d for s in experiment.data.sources] for d in self._domains])
        self._stack = contextlib.ExitStack()
        self._silent = jax.process_index() != 0
        self._begin_interval()

    def __enter__(self) -> Monitor:
        if not self._silent:
            self._writer = self._stack.enter_context(MetricsWriter(self._directory, self._experiment.run.tensorboard))
            self._display = self._stack.enter_context(Display(self._experiment, self._timeline))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _begin_interval(self) -> None:
        sources = len(self._experiment.data.sources)
        self._sums = {name: np.zeros(sources) for name in ("nll", "targets", "rows")}
        self._steps, self._tokens, self._waited = 0, 0, 0.0
        self._experts: list[dict[str, np.ndarray]] = []
        self._last: tuple[int, dict] | None = None
        self._started = time.perf_counter()

    def start(self, first_step: int, layout: BatchLayout) -> None:
        """Tells what runs where, and from which step."""
        info = {
            "step": first_step,
            "total_steps": self._timeline.num_steps,
            "total_tokens": self._timeline.num_tokens,
            "run_directory": str(self._directory),
            "params": num_params(self._experiment.model),
            "active_params": num_active_params(self._experiment.model),
            "flops_per_token": self._flops,
            "mesh": {name: size for name, size in layout.mesh.shape.items() if size > 1},
            "devices": f"{layout.mesh.size} x {jax.devices()[0].device_kind}",
            "micro_batch": f"{layout.micro_rows} rows, at most {layout.max_micro} a step",
        }
        if not self._silent:
            self._writer.event("resume" if first_step else "start", **info)
            self._display.start(info)

    def compiled(self, done: int, seconds: float) -> None:
        """Tells how long the step took to compile; the clock of the first interval starts after it."""
        self._tell("compiled", done, f"step compiled in {seconds:.1f} s", seconds=seconds)
        self._begin_interval()

    def data_wait(self, seconds: float) -> None:
        """Adds time that the devices waited for the loader."""
        self._waited += seconds

    def step(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Adds the metrics of the step with index `step` (0-based)."""
        for name, sums in self._sums.items():
            sums += metrics[name]
        if self._experiment.model.moe is not None:
            self._experts.append({name: metrics[name] for name in experts.KEYS})
        self._steps += 1
        self._tokens += self._timeline.at(step).batch_size * self._experiment.data.sequence_length
        self._last = (step, metrics)

    def flush(self) -> None:
        """Writes the interval as one line of metrics and begins the next."""
        if self._last is None or self._silent:
            self._begin_interval()
            return
        line = self._line(*self._last)
        self._writer.train(line)
        self._display.train(line)
        self._begin_interval()

    def _line(self, step: int, metrics: dict[str, np.ndarray]) -> dict[str, Any]:
        seconds = time.perf_counter() - self._started
        info = self._timeline.at(step)
        speed = self._tokens / seconds
        nll, targets, rows = (self._of_domain @ self._sums[name] for name in ("nll", "targets", "rows"))
        seen = [n for n, count in enumerate(targets) if count]
        return {
            "step": step + 1,
            "stage": self._experiment.curriculum[info.stage].name,
            "tokens": self._timeline.tokens_before(step + 1),
            "batch_size": info.batch_size,
            "learning_rate": info.learning_rate,
            "loss": float(nll.sum() / max(targets.sum(), 1)),
            **{f"loss/{self._domains[n]}": float(nll[n] / targets[n]) for n in seen},
            **{f"share/{domain}": float(rows[n] / rows.sum()) for n, domain in enumerate(self._domains)},
            "grad_norm": float(metrics["grad_norm"]),
            "param_norm": float(metrics["param_norm"]),
            **(experts.figures(self._experts, self._tokens) if self._experts else {}),
            "tokens_per_second": speed,
            "mfu": speed * self._flops / (self._peak * jax.device_count()) if self._peak else None,
            "step_seconds": seconds / self._steps,
            "data_wait_seconds": self._waited / self._steps,
            "memory_bytes": device_memory_bytes(),
            "host_memory_bytes": host_memory_bytes(),
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the interval's speed."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def evaluation(self, done: int, result: dict[str, Any]) -> None:
        """Writes a held-out evaluation after `done` steps."""
        stage = self._experiment.curriculum[self._timeline.at(max(done - 1, 0)).stage].name
        line = {"step": done, "tokens": self._timeline.tokens_before(done), "stage": stage, **result}
        if not self._silent:
            write_evaluation(self._directory, done, result)
            self._writer.evaluation(line)
            self._display.evaluation(line)

    def checkpoint(self, done: int) -> None:
        """Tells that the state after `done` steps is being saved."""
        if not self._silent:
            self._writer.event("checkpoint", step=done)
            self._display.checkpoint(done)

    def damaged_checkpoint(self, step: int, why: str) -> None:
        """Tells that a checkpoint was damaged and set aside."""
        self._tell("damaged_checkpoint", step, f"checkpoint of step {step:,} is damaged and set aside: {why}", why=why)

    def unfinished_checkpoint(self, step: int) -> None:
        """Tells that the save of a step was cut off before its seal, and that what there is was set aside."""
        self._tell("unfinished_checkpoint", step, f"checkpoint of step {step:,} was never finished and is set aside")

    def non_finite(self, done: int, name: str) -> None:
        """Tells that a quantity of step `done` is not finite; the run ends."""
        self._tell("non_finite", done, f"{name} is not finite at step {done:,}", quantity=name)

    def finish(self, done: int, stopped_by: str | None) -> None:
        """Tells how the run ended and where its results lie."""
        if self._silent:
            return
        steps = f"{done:,} step{'' if done == 1 else 's'}"
        if stopped_by:
            self._writer.event(stopped_by.lower(), step=done)
            status = f"stopped by {stopped_by} after {steps}; the same command continues"
        else:
            self._writer.event("finish", step=done)
            status = f"finished after {steps}"
        self._display.finish(status, {"run": self._directory, "metrics": self._directory / "metrics.jsonl"})

    def _tell(self, event: str, step: int, text: str, **details: Any) -> None:
        if not self._silent:
            self._writer.event(event, step=step, **details)
            self._display.event(text)
