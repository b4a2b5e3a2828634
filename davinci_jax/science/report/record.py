"""A run directory read for its report."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import numpy as np

from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import Experiment, load_config
from davinci_jax.science.report import series
from davinci_jax.training.metrics import Metrics, read_metrics

# A run that wrote nothing for this long has ended without saying so.
_SILENCE_SECONDS = 900.0
# Events that a process ends with before the last step.
_STOPS = ("sigterm", "sigint", "non_finite")


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run directory holds.

    Attributes:
      directory: where it lies.
      experiment: the resolved experiment.
      timeline: its compiled stages.
      metrics: train and evaluation lines and events; evaluations written later than the run are among them.
      samples: continuations as {"prompt", "text"}, and the step of the checkpoint that wrote them.
      problems: what could not be read, one sentence each.
      now: unix time of reading.
    """

    directory: pathlib.Path
    experiment: Experiment
    timeline: Timeline
    metrics: Metrics
    samples: list[dict[str, str]]
    samples_step: int | None
    problems: list[str]
    now: float

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Tokens consumed at each train line, float64 [lines]."""
        return series.column(self.metrics.train, "tokens")

    @functools.cached_property
    def stages(self) -> np.ndarray:
        """Position of the stage of each train line in the curriculum, int [lines]; -1 for an unknown stage."""
        names = [stage.name for stage in self.experiment.curriculum]
        found = [line.get("stage") for line in self.metrics.train]
        return np.array([names.index(name) if name in names else -1 for name in found], int)

    @property
    def step(self) -> int:
        """Steps done, as far as the file tells."""
        told = [line["step"] for line in (*self.metrics.train[-1:], *self.metrics.evaluations[-1:])]
        told += [event.get("step") for event in self.metrics.events[-1:] if event.get("event") in ("finish", *_STOPS)]
        return min(max((step for step in told if isinstance(step, int)), default=0), self.timeline.num_steps)

    @property
    def consumed(self) -> int:
        """Tokens consumed."""
        return self.timeline.tokens_before(self.step)

    @property
    def status(self) -> str:
        """ "finished", "stopped" (it said so, or fell silent), "running", or "not started"."""
        names = [event.get("event") for event in self.metrics.events]
        last = next((name for name in reversed(names) if name in ("start", "resume", "finish", *_STOPS)), None)
        if last == "finish":
            return "finished"
        if last in _STOPS:
            return "stopped"
        lines = [*self.metrics.train[-1:], *self.metrics.evaluations[-1:], *self.metrics.events[-1:]]
        times = [line["time"] for line in lines if isinstance(line.get("time"), (int, float))]
        if not times:
            return "not started"
        return "running" if self.now - max(times) < _SILENCE_SECONDS else "stopped"


def read_run(run_dir: str | pathlib.Path) -> Record:
    """Reads a run directory; only experiment.json must be there.

    Raises:
      ConfigError: there is no experiment.json, or it describes no experiment.
    """
    directory = pathlib.Path(run_dir)
    file = directory / "experiment.json"
    if not file.is_file():
        raise ConfigError("RUN", str(directory), "holds no experiment.json", "name a run directory")
    experiment = load_config(file)
    problems: list[str] = []
    metrics = read_metrics(directory)
    if metrics.damaged:
        problems.append(f"{metrics.damaged} lines of metrics.jsonl could not be read and are left out.")
    evaluations = _with_later(metrics.evaluations, directory, problems)
    train = [line for line in _numbers(metrics.train) if "tokens" in line]
    metrics = dataclasses.replace(metrics, train=train, evaluations=_numbers(evaluations))
    samples, step = _samples(directory / "samples.json", problems)
    return Record(
        directory=directory,
        experiment=experiment,
        timeline=Timeline.compile(experiment.curriculum, experiment.data.sequence_length),
        metrics=metrics,
        samples=samples,
        samples_step=step,
        problems=problems,
        now=time.time(),
    )


def _numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines with their numbers and the name of their stage, and nothing that could surprise a chart."""
    kinds = {"stage": str, "experts/layers": dict}
    return [
        {key: value for key, value in line.items() if isinstance(value, kinds.get(key, (int, float)))} for line in lines
    ]


def _with_later(lines: list[dict], directory: pathlib.Path, problems: list[str]) -> list[dict]:
    """Returns the evaluation lines, completed by evaluations/<step>.json of steps that the loop did not evaluate."""
    found = {line["step"]: line for line in lines}
    for file in sorted((directory / "evaluations").glob("*.json")):
        value = _json(file, problems)
        if isinstance(value, dict) and file.stem.isdigit():
            found.setdefault(int(file.stem), {**value, "step": int(file.stem)})
    return [found[step] for step in sorted(found)]


def _samples(file: pathlib.Path, problems: list[str]) -> tuple[list[dict[str, str]], int | None]:
    value = _json(file, problems) if file.is_file() else None
    listed = value.get("samples") if isinstance(value, dict) else None
    if value is not None and not isinstance(listed, list):
        problems.append(f"{file.name} holds no samples.")
    samples = [
        {"prompt": str(sample.get("prompt", "")), "text": str(sample.get("text", ""))}
        for sample in (listed if isinstance(listed, list) else [])
        if isinstance(sample, dict)
    ]
    step = value.get("step") if isinstance(value, dict) else None
    return samples, step if isinstance(step, int) else None


def _json(file: pathlib.Path, problems: list[str]) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        problems.append(f"{file.name} could not be read and is left out.")
        return None
