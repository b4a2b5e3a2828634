"""Progress of a run: a live panel on a terminal, one tidy line an interval elsewhere."""

from __future__ import annotations

import collections
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from davinci_jax.experiment import Experiment
from davinci_jax.training import units

_PANEL_WIDTH = 100
_RECENT_REPORTS = 20
_LABEL, _VALUE, _ACCENT = "dim", "bold", "cyan"


class Length(Protocol):
    """What the display must know of a timeline; `curriculum.timeline.Timeline` has it."""

    num_steps: int
    num_tokens: int

    def tokens_before(self, step: int) -> int:
        """Returns the tokens that the first `step` steps consume."""


class Pace:
    """Time left, from the tokens that are left: the batch ramps, so steps are no measure.

    The rate is that of the last reports by the clock, evaluations and checkpoints included.
    """

    def __init__(self, num_tokens: int, clock: Callable[[], float]):
        self._num_tokens, self._clock = num_tokens, clock
        self._reports: collections.deque[tuple[float, int]] = collections.deque(maxlen=_RECENT_REPORTS)
        self._nominal = 0.0

    def report(self, tokens: int, tokens_per_second: float) -> None:
        """Takes the tokens consumed so far, and the measured rate in case this is the first report."""
        self._reports.append((self._clock(), tokens))
        self._nominal = tokens_per_second

    def seconds_left(self) -> float | None:
        """Returns the estimate, or `None` before the first report."""
        if not self._reports:
            return None
        (first, before), (last, now) = self._reports[0], self._reports[-1]
        rate = (now - before) / (last - first) if last > first and now > before else self._nominal
        if not rate > 0:
            return None
        return max(0.0, (self._num_tokens - now) / rate - (self._clock() - last))


def _standard_output() -> Console:
    """Returns a console that never fails: a terminal without Unicode shows question marks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)


class Display:
    """Shows a run; a context manager. On several hosts, only the first has one.

    Args:
      experiment: the run.
      timeline: its length in steps and tokens.
      console: where to show it; `None` means standard output.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        experiment: Experiment,
        timeline: Length,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = console or _standard_output()
        self._experiment, self._timeline, self._clock = experiment, timeline, clock
        self._pace = Pace(timeline.num_tokens, clock)
        self._panel = _Panel(experiment, timeline, self._pace, clock)
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(self._panel, console=self._console, refresh_per_second=2) if live else None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop()

    def start(self, info: Mapping[str, Any]) -> None:
        """Shows the first lines, then the panel.

        Args:
          info: "run_directory", "devices" and "micro_batch" (text), "mesh" (axis -> size), "params" (count),
            "flops_per_token", and "step", the step that the run goes on from. What is left out is not shown.
        """
        for label, text in _introduction(self._experiment, self._timeline, info):
            self._print(Text.assemble((f"{label:<12}", _LABEL), text))
        step = info.get("step", 0)
        self._panel.metrics = {"step": step, "tokens": self._timeline.tokens_before(step)}
        if self._live is not None:
            self._live.start()

    def train(self, metrics: Mapping[str, Any]) -> None:
        """Shows a train line of metrics.jsonl."""
        self._pace.report(metrics["tokens"], metrics.get("tokens_per_second") or 0.0)
        self._panel.metrics = metrics
        if self._live is None:
            self._print(Text(_train_line(metrics, self._timeline, self._pace.seconds_left())))

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Shows an evaluation line of metrics.jsonl."""
        self._panel.evaluation = metrics
        if self._live is None:
            self._print(Text(_evaluation_line(metrics)))

    def checkpoint(self, step: int) -> None:
        """Shows that the state after `step` steps is saved."""
        self._panel.checkpoint = (step, self._clock())
        if self._live is None:
            self._print(Text(f"checkpoint  step {step:,}"))

    def event(self, text: str) -> None:
        """Shows one line of news; it stays above the panel."""
        self._print(Text.assemble((time.strftime("%H:%M:%S  "), _LABEL), text))

    def finish(self, status: str, results: Mapping[str, Any] | None = None) -> None:
        """Ends the panel and shows how the run ended ("finished", "stopped at step 120") and where its results lie."""
        self._stop()
        self._print(Text(status, style=_VALUE))
        for label, place in (results or {}).items():
            self._print(Text.assemble((f"{label:<12}", _LABEL), str(place)))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


def _introduction(experiment: Experiment, timeline: Length, info: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Returns (label, text) of the lines that open a run."""
    length = experiment.data.sequence_length
    sizes = [piece.size * length for stage in experiment.curriculum for piece in stage.batch]
    tokens = units.count(min(sizes)) + (f" to {units.count(max(sizes))}" if len(set(sizes)) > 1 else "")
    stages = f"{len(experiment.curriculum)} stage{'s' * (len(experiment.curriculum) > 1)}"
    lines = [("run", f"{experiment.run.name}  →  {info.get('run_directory', experiment.run.path)}")]
    if "devices" in info:
        mesh = " x ".join(f"{axis} {size}" for axis, size in info.get("mesh", {}).items())
        lines.append(("devices", info["devices"] + (f", mesh {mesh}" if mesh else "")))
    if "params" in info:
        flops = f", {units.flops(info['flops_per_token'])} per token" if info.get("flops_per_token") else ""
        lines.append(("model", f"{units.count(info['params'])} parameters{flops}"))
    lines.append(("tokens", f"{units.count(timeline.num_tokens)} in {stages}, {tokens} per step"))
    micro = f", micro-batches of {info['micro_batch']}" if "micro_batch" in info else ""
    lines.append(("steps", f"{timeline.num_steps:,}{micro}"))
    if done := info.get("step"):
        share = timeline.tokens_before(done) / timeline.num_tokens
        lines.append(("resumed", f"after step {done:,}, {units.percent(share)} of the tokens"))
    return lines


def _wait(metrics: Mapping[str, Any]) -> str | None:
    """Returns the share of a step spent waiting for data."""
    step, wait = metrics.get("step_seconds"), metrics.get("data_wait_seconds")
    return units.percent(wait / step) if step and wait is not None else None


def _train_line(metrics: Mapping[str, Any], timeline: Length, left: float | None) -> str:
    width = len(f"{timeline.num_steps:,}")
    batch = metrics.get("batch_size", "-")
    parts = [
        f"step {metrics['step']:>{width},}/{timeline.num_steps:,}",
        f"{units.percent(metrics['tokens'] / timeline.num_tokens):>6}",
        f"stage {metrics.get('stage', '-')}",
        f"loss {units.number(metrics.get('loss'))}",
        f"lr {metrics.get('learning_rate', float('nan')):.2e}",
        f"batch {batch:>4}",
        f"{units.count(metrics.get('tokens_per_second') or 0):>5} tok/s",
    ]
    if metrics.get("mfu") is not None:
        parts.append(f"mfu {units.percent(metrics['mfu'])}")
    if (wait := _wait(metrics)) is not None:
        parts.append(f"wait {wait}")
    if left is not None:
        parts.append(f"left {units.duration(left)}")
    return "  ".join(parts)


def _domains(metrics: Mapping[str, Any]) -> list[str]:
    return [key.removeprefix("loss/") for key in metrics if key.startswith("loss/")]


def _evaluation_line(metrics: Mapping[str, Any]) -> str:
    parts = [f"held-out  step {metrics['step']:,}  loss {units.number(metrics.get('loss'))}"]
    parts.append(f"bits/byte {units.number(metrics.get('bits_per_byte'))}")
    for domain in _domains(metrics):
        parts.append(f"{domain} {units.number(metrics[f'loss/{domain}'])}")
    return "  ".join(parts)


class _Panel:
    """The live panel; rich renders it anew at every refresh, so the time left counts down between reports."""

    def __init__(self, experiment: Experiment, timeline: Length, pace: Pace, clock: Callable[[], float]):
        self._experiment, self._timeline, self._pace, self._clock = experiment, timeline, pace, clock
        self._began = clock()
        self.metrics: Mapping[str, Any] = {"step": 0, "tokens": 0}
        self.evaluation: Mapping[str, Any] | None = None
        self.checkpoint: tuple[int, float] | None = None

    def __rich_console__(self, console: Console, options: Any) -> Any:
        width = min(options.max_width, _PANEL_WIDTH)
        inner = width - 4
        parts = [*self._progress(inner), Text(), self._numbers(inner)]
        if self.evaluation is not None:
            parts += [Text(), self._evaluation(inner)]
        parts += [Text(), self._footer()]
        names = [stage.name for stage in self._experiment.curriculum]
        stage = self.metrics.get("stage")
        where = f"stage {stage} · {names.index(stage) + 1} of {len(names)}" if stage in names else "first step"
        title = Text(self._experiment.run.name, style=_VALUE)
        yield Panel(
            Group(*parts), title=title, title_align="left", subtitle=Text(where), subtitle_align="right",
            width=width, border_style=_LABEL,
        )  # fmt: skip

    def _progress(self, width: int) -> list[RenderableType]:
        """Returns the bar, cut at the stage borders, with the names of the stages below it."""
        total = sum(stage.tokens for stage in self._experiment.curriculum)
        share = min(1.0, self.metrics["tokens"] / self._timeline.num_tokens)
        width -= 7  # the percentage
        done = share * width
        bar, names, begin = Text(), Text(), 0.0
        for n, stage in enumerate(self._experiment.curriculum):
            end = begin + stage.tokens / total * width
            cells = range(round(begin), round(end))
            last = n == len(self._experiment.curriculum) - 1
            for cell in cells:
                gap = not last and cell == cells[-1] and len(cells) > 1
                bar.append(" " if gap else "━", style=_ACCENT if cell < done else "bright_black")
            current = stage.name == self.metrics.get("stage")
            name = stage.name[: max(0, len(cells) - 1)]
            names.append(f"{name:<{len(cells)}}", style=_ACCENT if current else _LABEL)
            begin = end
        bar.append(f"{units.percent(share):>7}", style=_VALUE)
        return [bar, names]

    def _numbers(self, width: int) -> Table:
        columns = 3 if width >= 68 else 2
        metrics, timeline = self.metrics, self._timeline
        left = self._pace.seconds_left()
        mfu, memory = metrics.get("mfu"), metrics.get("memory_bytes") or metrics.get("host_memory_bytes")
        cells = [
            ("step", f"{metrics['step']:,} / {timeline.num_steps:,}"),
            ("loss", units.number(metrics.get("loss"))),
            ("tokens/s", units.count(metrics["tokens_per_second"]) if metrics.get("tokens_per_second") else "-"),
            ("tokens", f"{units.count(metrics['tokens'])} / {units.count(timeline.num_tokens)}"),
            ("rate", f"{metrics['learning_rate']:.2e}" if "learning_rate" in metrics else "-"),
            ("MFU", units.percent(mfu) if mfu is not None else "-"),
            ("elapsed", units.duration(self._clock() - self._began)),
            ("batch", f"{metrics['batch_size']:,}" if "batch_size" in metrics else "-"),
            ("data wait", _wait(metrics) or "-"),
            ("left", units.duration(left) if left is not None else "compiling" if not metrics.get("loss") else "-"),
            ("grad", units.number(metrics.get("grad_norm"), 3)),
            ("memory", units.memory(memory) if memory else "-"),
        ]
        if mfu is None:
            cells[5] = ("step time", f"{metrics['step_seconds']:.3g} s" if metrics.get("step_seconds") else "-")
        table = Table.grid(padding=(0, 1), expand=True)
        for _ in range(columns):
            table.add_column(style=_LABEL, no_wrap=True)
            table.add_column(style=_VALUE, no_wrap=True, ratio=1)
        for row in range(0, len(cells), columns):
            table.add_row(*(text for cell in cells[row : row + columns] for text in cell))
        return table

    def _evaluation(self, width: int) -> Table:
        """Returns held-out figures, one column a domain, as many as fit."""
        metrics = self.evaluation
        domains = _domains(metrics)
        title = f"held out, step {metrics['step']:,}"
        cell = 1 + max([6, *map(len, domains)])
        domains = domains[: max(0, (width - len(title) - 1) // cell - 1)]
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(style=_LABEL, no_wrap=True)
        for _ in range(len(domains) + 1):
            table.add_column(justify="right", no_wrap=True, ratio=1)
        table.add_row(title, *(Text(name, _LABEL) for name in domains), Text("all", _LABEL))
        for label, key in (("loss", "loss"), ("bits per byte", "bits_per_byte")):
            values = [metrics.get(f"{key}/{domain}") for domain in domains] + [metrics.get(key)]
            table.add_row(label, *(units.number(value, 3) for value in values))
        return table

    def _footer(self) -> Text:
        if self.checkpoint is None:
            return Text("no checkpoint yet", style=_LABEL)
        step, at = self.checkpoint
        return Text(f"checkpoint at step {step:,}, {units.duration(self._clock() - at)} ago", style=_LABEL)
