"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and copies for TensorBoard and other trackers.

The file is appended to and never rewritten, so a killed run loses at most the line it was writing. The keys and
their units are in docs/run_directory.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from davinci_jax.errors import TrainingError

FILE = "metrics.jsonl"

# Events that set the step from which the run goes on: what was logged beyond it has been undone.
_BEGINNINGS = ("start", "resume")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Tracker(Protocol):
    """A place that metrics are copied to, such as a dashboard service."""

    def log(self, kind: str, metrics: Mapping[str, float], step: int) -> None:
        """Takes the numbers of one line; `kind` is "train" or "evaluation"."""

    def close(self) -> None:
        """Ends the copy; called once."""


# Takes the run directory and the step from which the run goes on.
TrackerFactory = Callable[[pathlib.Path, int], Tracker]
_factories: list[TrackerFactory] = []


def register_tracker(factory: TrackerFactory) -> None:
    """Makes every later `MetricsWriter` copy its numbers to `factory(run_dir, first_step)`.

    Example, in a recipe, for a service that the project does not depend on::

      class Wandb:
          def __init__(self, run_dir, first_step):
              self.run = wandb.init(dir=run_dir, id=run_dir.name, resume="allow")
          def log(self, kind, metrics, step):
              self.run.log({f"{kind}/{key}": value for key, value in metrics.items()}, step=step)
          def close(self):
              self.run.finish()

      register_tracker(Wandb)
    """
    _factories.append(factory)


class TensorBoard:
    """Event files below `run_dir/tensorboard`, one per start of the run."""

    def __init__(self, run_dir: pathlib.Path, first_step: int):
        import tensorboardX  # a run without TensorBoard need not pay for its import

        # TensorBoard then hides what an earlier process logged beyond the step that the run goes on from, 0 included.
        self._writer = tensorboardX.SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def log(self, kind: str, metrics: Mapping[str, float], step: int) -> None:
        """Writes one scalar per key, under the tag `kind/key`."""
        for key, value in metrics.items():
            self._writer.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class MetricsWriter:
    """Appends to `run_dir/metrics.jsonl`; a context manager. On several hosts, only the first has one.

    Args:
      run_dir: the run directory; made if missing. A line that a kill left torn is repaired on opening.
      tensorboard: also write TensorBoard events.

    Raises:
      TrainingError: the file cannot be written, from the constructor or any method.
    """

    def __init__(self, run_dir: str | pathlib.Path, tensorboard: bool):
        self._run_dir = pathlib.Path(run_dir)
        self._factories = ([TensorBoard] if tensorboard else []) + _factories
        self._trackers: list[Tracker] | None = None
        self._first_step = 0
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            repair(self._run_dir / FILE)
            # Unbuffered, so that a line is one write and a kill cannot hold lines back.
            self._file = open(self._run_dir / FILE, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._cannot_write(error) from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def train(self, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of one interval of steps; needs the key "step", the number of steps done."""
        self._numbers("train", metrics)

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Writes the results of one held-out evaluation; needs the key "step"."""
        self._numbers("evaluation", metrics)

    def event(self, name: str, **details: Any) -> None:
        """Writes that something happened; "start" and "resume" must say the `step` that the run goes on from."""
        if name in _BEGINNINGS:
            self._first_step = int(details["step"])
        self._write({"kind": "event", "event": name, **details})

    def close(self) -> None:
        """Closes the file and the trackers; a second call does nothing."""
        trackers, self._trackers = self._trackers or [], []
        for tracker in trackers:
            self._guarded(tracker.close, tracker)
        self._file.close()

    def _numbers(self, kind: str, metrics: Mapping[str, Any]) -> None:
        self._write({"kind": kind, **metrics})
        if self._trackers is None:
            # Opened with the first numbers, when the step that the run goes on from is known.
            opened = [self._guarded(make, make, self._run_dir, self._first_step) for make in self._factories]
            self._trackers = [tracker for tracker in opened if tracker is not None]
        numbers = _scalars(metrics)
        step = int(numbers.pop("step"))
        numbers.pop("time", None)
        for tracker in list(self._trackers):
            self._guarded(tracker.log, tracker, kind, numbers, step)

    def _write(self, line: dict[str, Any]) -> None:
        line = _plain({**line, "time": line.get("time", time.time())})
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise self._cannot_write(error) from error

    def _guarded(self, call: Callable, owner: object, *args: Any) -> Any:
        """Calls a tracker; one that fails is dropped, with an event, because a run outlives its dashboards."""
        try:
            return call(*args)
        except Exception as error:
            self._trackers = [tracker for tracker in self._trackers or [] if tracker is not owner]
            name = getattr(owner, "__name__", type(owner).__name__)
            self._write(
                {
                    "kind": "event",
                    "event": "tracker_dropped",
                    "tracker": name,
                    "error": f"{type(error).__name__}: {error}",
                }
            )
            return None

    def _cannot_write(self, error: OSError) -> TrainingError:
        return TrainingError(
            str(self._run_dir / FILE),
            None,
            f"cannot be written ({error.strerror or error})",
            "make room or mend the permissions, then start the same command again",
        )


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers among the values; array scalars count, text, `None` and booleans do not."""
    values = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _plain(value: Any) -> Any:
    """Returns a value as JSON can hold it: array scalars as numbers, NaN and infinities as their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays of any rank
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def repair(path: pathlib.Path) -> None:
    """Mends the end of a JSON-lines file: completes a last line that lacks its newline, or cuts a torn one."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        data = file.read()
        tail = data[data.rfind(b"\n") + 1 :]
        if not tail:
            return
        if _parse(tail) is not None:
            file.write(b"\n")
        else:
            file.truncate(len(data) - len(tail))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # also UnicodeDecodeError
        return None
    return value if isinstance(value, dict) else None


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a metrics file says, without the lines of steps that were undone.

    Attributes:
      train: train lines by step; NaN and infinities are floats again.
      evaluations: evaluation lines by step.
      events: all events in the order in which they were written, those of undone steps too: they did happen.
      damaged: how many lines could not be read.
      wall_seconds: time from the start of each process of the run to its last line, in all; work that was undone
        counts.
    """

    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    damaged: int
    wall_seconds: float


def read_metrics(run_dir: str | pathlib.Path) -> Metrics:
    """Reads `run_dir/metrics.jsonl`, of a run that may still be writing; a missing file has no lines.

    The last line of a step wins. When a run resumed at step s, lines written before that with a step above s are
    dropped: those steps are run again, and their intervals need not end at the same steps.
    """
    path = pathlib.Path(run_dir) / FILE
    kept: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "evaluation": {}}
    events, damaged, clock = [], 0, _Clock()
    for raw in path.read_bytes().split(b"\n") if path.exists() else ():
        if not raw.strip():
            continue
        line = _parse(raw) or {}
        kind, step = line.get("kind"), line.get("step")
        begins = kind == "event" and line.get("event") in _BEGINNINGS
        clock.tick(line.get("time"), begins)
        if kind == "event":
            events.append(line)
            if begins and isinstance(step, int):
                kept = {name: {s: one for s, one in lines.items() if s <= step} for name, lines in kept.items()}
        elif kind in kept and isinstance(step, int):
            kept[kind][step] = {key: value if key == "stage" else _number(value) for key, value in line.items()}
        else:
            damaged += 1
    train, evaluations = ([lines[step] for step in sorted(lines)] for lines in kept.values())
    return Metrics(train, evaluations, events, damaged, clock.total)


class _Clock:
    """Adds up the time inside processes; the time between a kill and the next start does not count."""

    def __init__(self):
        self.total, self._last = 0.0, None

    def tick(self, at: Any, begins: bool) -> None:
        if not isinstance(at, (int, float)):
            return
        if self._last is not None and not begins:
            self.total += max(0.0, at - self._last)
        self._last = at


def _number(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def host_memory_bytes() -> int:
    """Returns the peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory_bytes() -> int | None:
    """Returns the peak memory in use on the fullest local device, in bytes; `None` where the backend keeps no count."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one]
    return max(peaks, default=None)
