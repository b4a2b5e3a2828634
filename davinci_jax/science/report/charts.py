"""The charts of a report: what is drawn, in which colours and with which words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from davinci_jax.curriculum.shares import domain_shares
from davinci_jax.science.report import series
from davinci_jax.science.report.draw import INK, PALETTE, chart, count_tick
from davinci_jax.science.report.record import Record
from davinci_jax.training import units

_NEUTRAL = "#33618f"
_FAINT = {"alpha": 0.32, "linewidth": 0.8}
_FALL = 0.03  # part of the tokens in which the loss falls so fast that the rest would be flat beside it


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
      name: unique in the page.
      title: what is shown.
      unit: of the vertical axis.
      svg: the picture.
      legend: (label, colour) per series; empty for one series.
      note: what the picture does not say by itself; may be empty.
    """

    name: str
    title: str
    unit: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()
    note: str = ""


def colours(run: Record) -> dict[str, str]:
    """Returns domain -> colour, the same in every chart and table."""
    return {domain: PALETTE[n % len(PALETTE)] for n, domain in enumerate(run.experiment.data.domains)}


def groups(run: Record) -> list[tuple[str, list[Chart]]]:
    """Returns (heading, charts); a chart without data is left out."""
    everything = [
        ("Loss", [_training_loss, _domain_loss, _heldout("loss"), _heldout("bits_per_byte")]),
        ("Curriculum", [_learning_rate, _batch_size, _mixture, _domain_tokens]),
        ("Experts", [_expert_load, _expert_layers, _expert_share("dead"), _expert_share("dropped")]),
        ("Stability and speed", [_norm("grad_norm"), _norm("param_norm"), _throughput, _data_wait, _mfu, _memory]),
    ]
    drawn = [(heading, [one for one in (make(run) for make in makers) if one]) for heading, makers in everything]
    return [(heading, charts) for heading, charts in drawn if charts]


def _window(run: Record) -> int:
    """Returns how many log intervals are averaged: a fortieth of the run, none of a short one."""
    return max(5, len(run.tokens) // 40) if len(run.tokens) >= 25 else 1


def _smooth(run: Record, key: str) -> np.ndarray:
    return series.smooth(series.column(run.metrics.train, key), run.stages, _window(run))


def _focus(axes: Axes, tokens: np.ndarray, values: np.ndarray) -> str:
    """Sets the vertical range to what follows the first fall; returns a note if the beginning lies above it.

    Args:
      axes: drawn on already.
      tokens: [n] where the values were measured.
      values: [..., n], NaN where unknown.
    """
    later = values[..., tokens >= _FALL * np.max(tokens, initial=0.0)]
    later = later[np.isfinite(later)]
    if not len(later):
        return ""
    low, high = float(later.min()), float(np.quantile(later, 0.999))
    margin = 0.06 * (high - low or abs(high) or 1.0)
    axes.set_ylim(low - margin, high + margin)
    top = float(np.nanmax(values))
    return f"The axis ends at {high + margin:.2f}; the highest value is {top:.2f}." if top > high + margin else ""


def _training_loss(run: Record) -> Chart | None:
    raw = series.column(run.metrics.train, "loss")
    if not np.isfinite(raw).any():
        return None
    smoothed, notes = _smooth(run, "loss"), []

    def plot(axes: Axes) -> None:
        axes.plot(*series.extremes(run.tokens, raw), color=_NEUTRAL, **_FAINT)
        axes.plot(*series.means(run.tokens, smoothed), color=_NEUTRAL, linewidth=1.8)
        notes.append(_focus(axes, run.tokens, raw))

    svg = chart(run, "training-loss", "Training loss over tokens", plot, lambda value: f"{value:.3g}")
    if _window(run) > 1:
        notes.insert(0, f"Light: every log interval. Dark: mean of {_window(run)} intervals inside a stage.")
    return Chart("training-loss", "Training loss", "nats per token", svg, note=" ".join(notes))


def _domain_loss(run: Record) -> Chart | None:
    drawn = {domain: _smooth(run, f"loss/{domain}") for domain in colours(run)}
    drawn = {domain: values for domain, values in drawn.items() if np.isfinite(values).any()}
    if not drawn:
        return None
    notes: list[str] = []

    def plot(axes: Axes) -> None:
        for domain, values in drawn.items():
            keep = _inside_stages(run, values)
            axes.plot(*series.means(run.tokens[keep], values[keep]), color=colours(run)[domain], linewidth=1.6)
        notes.append(_focus(axes, run.tokens, np.stack(list(drawn.values()))))

    svg = chart(run, "domain-loss", "Training loss of each domain over tokens", plot, lambda value: f"{value:.3g}")
    legend = tuple((domain, colours(run)[domain]) for domain in drawn)
    return Chart("domain-loss", "Training loss by domain", "nats per token", svg, legend, notes[0])


def _inside_stages(run: Record, values: np.ndarray) -> np.ndarray:
    """Returns which points to join: a gap inside a stage is bridged, a stage without the domain breaks the line."""
    known = np.isfinite(values)
    seen = {stage: known[run.stages == stage].any() for stage in np.unique(run.stages)}
    return known | np.array([not seen[stage] for stage in run.stages], bool)


def _heldout(key: str) -> Callable[[Record], Chart | None]:
    title, unit = {
        "loss": ("Held-out loss by domain", "nats per token"),
        "bits_per_byte": ("Held-out bits per byte by domain", "bits per byte of text"),
    }[key]

    def make(run: Record) -> Chart | None:
        lines = [line for line in run.metrics.evaluations if line["step"] <= run.timeline.num_steps]
        tokens = np.array([run.timeline.tokens_before(line["step"]) for line in lines], float)
        found = {domain: series.column(lines, f"{key}/{domain}") for domain in colours(run)}
        found = {domain: values for domain, values in found.items() if np.isfinite(values).any()}
        if not found:
            return None
        total = series.column(lines, key)
        dots = "o" if len(lines) <= 40 else ""
        notes: list[str] = []

        def plot(axes: Axes) -> None:
            style = {"marker": dots, "markersize": 2.8}
            for domain, values in found.items():
                axes.plot(*series.means(tokens, values), color=colours(run)[domain], linewidth=1.6, **style)
            axes.plot(*series.means(tokens, total), color=INK, linewidth=1.4, linestyle=(0, (4, 2)), **style)
            notes.append(_focus(axes, tokens, np.stack([*found.values(), total])))

        svg = chart(run, f"heldout-{key.replace('_', '-')}", title, plot, lambda value: f"{value:.3g}")
        legend = (*((domain, colours(run)[domain]) for domain in found), ("all (dashed)", INK))
        return Chart(f"heldout-{key.replace('_', '-')}", title, unit, svg, legend, notes[0])

    return make


def _line(
    run: Record, name: str, title: str, unit: str, values: np.ndarray, format_y: Callable[[float], str], *,
    smooth: bool = True, zero: bool = True, note: str = "",
) -> Chart | None:  # fmt: skip
    """Returns a chart of one series: raw and smoothed where it is noisy, as it is where it is planned."""
    if not np.isfinite(values).any():
        return None

    def plot(axes: Axes) -> None:
        axes.plot(*series.extremes(run.tokens, values), color=_NEUTRAL, **(_FAINT if smooth else {"linewidth": 1.8}))
        if smooth:
            smoothed = series.smooth(values, run.stages, _window(run))
            axes.plot(*series.means(run.tokens, smoothed), color=_NEUTRAL, linewidth=1.8)
        if zero:
            axes.set_ylim(0, 1.12 * max(float(np.nanmax(values)), 1e-12))

    return Chart(name, title, unit, chart(run, name, f"{title} over tokens", plot, format_y), note=note)


def _learning_rate(run: Record) -> Chart | None:
    values = series.column(run.metrics.train, "learning_rate")
    return _line(run, "learning-rate", "Learning rate", "at each log interval", values, units.power, smooth=False)


def _batch_size(run: Record) -> Chart | None:
    values = series.column(run.metrics.train, "batch_size")
    if not np.isfinite(values).any():
        return None

    def plot(axes: Axes) -> None:
        axes.plot(*series.changes(run.tokens, values), color=_NEUTRAL, linewidth=1.8, drawstyle="steps-pre")
        axes.set_ylim(0, 1.12 * float(np.nanmax(values)))

    svg = chart(run, "batch-size", "Batch size over tokens", plot, lambda value: f"{value:,.0f}")
    return Chart("batch-size", "Batch size", "sequences per step", svg)


def _mixture(run: Record) -> Chart | None:
    shares = {domain: series.column(run.metrics.train, f"share/{domain}") for domain in colours(run)}
    shares = {domain: np.nan_to_num(values) for domain, values in shares.items() if np.nansum(values) > 0}
    if not shares:
        return None

    def plot(axes: Axes) -> None:
        smoothed = np.stack([series.smooth(values, run.stages, _window(run)) for values in shares.values()])
        x, y = series.means(run.tokens, smoothed)
        fills = [colours(run)[domain] for domain in shares]
        # From zero, so that the first interval is filled as well.
        x, y = np.concatenate([[0.0], x]), np.concatenate([y[:, :1], y], axis=1)
        axes.stackplot(x, y, colors=fills, alpha=0.8, linewidth=0)
        for n, stage in enumerate(run.experiment.curriculum):
            planned = np.cumsum([domain_shares(stage).get(domain, 0.0) for domain in shares])[:-1]
            steps = run.timeline.steps_of(n)
            ends = [run.timeline.tokens_before(step) for step in (steps.start, steps.stop)]
            axes.hlines(planned, *ends, color="white", linewidth=1.1)
        axes.set_ylim(0, 1)

    svg = chart(run, "mixture", "Share of rows of each domain over tokens, stacked", plot, lambda y: f"{100 * y:.0f}%")
    legend = tuple((domain, colours(run)[domain]) for domain in shares)
    return Chart(
        "mixture", "Mixture", "share of the rows", svg, legend, "Areas: rows that were served. White lines: the plan."
    )


def _domain_tokens(run: Record) -> Chart | None:
    width = np.diff(run.tokens, prepend=0.0)
    shares = {domain: series.column(run.metrics.train, f"share/{domain}") for domain in colours(run)}
    drawn = {domain: np.cumsum(np.nan_to_num(width * share)) for domain, share in shares.items()}
    drawn = {domain: tokens for domain, tokens in drawn.items() if len(tokens) and tokens[-1] > 0}
    if not drawn:
        return None

    def plot(axes: Axes) -> None:
        for domain, tokens in drawn.items():
            axes.plot(*series.extremes(run.tokens, tokens), color=colours(run)[domain], linewidth=1.6)
        axes.set_ylim(0, 1.05 * max(tokens[-1] for tokens in drawn.values()))

    svg = chart(run, "domain-tokens", "Tokens of each domain so far", plot, count_tick)
    legend = tuple((domain, colours(run)[domain]) for domain in drawn)
    return Chart("domain-tokens", "Tokens by domain", "consumed so far", svg, legend)


def _norm(key: str) -> Callable[[Record], Chart | None]:
    title, note = {
        "grad_norm": ("Gradient norm", "Global norm before clipping."),
        "param_norm": ("Parameter norm", "Global norm after the step."),
    }[key]

    def make(run: Record) -> Chart | None:
        values = series.column(run.metrics.train, key)
        name = key.replace("_", "-")
        zero = key == "grad_norm"
        return _line(run, name, title, "", values, lambda value: f"{value:.3g}", smooth=zero, zero=False, note=note)

    return make


def _expert_load(run: Record) -> Chart | None:
    values = series.column(run.metrics.train, "experts/max_load")
    note = "Tokens of a layer's busiest expert over the mean of its experts, averaged over the layers; 1 is even."
    return _line(
        run, "expert-load", "Load of the busiest expert", "times the mean", values, _short, zero=False, note=note
    )


def _expert_layers(run: Record) -> Chart | None:
    """The busiest expert of each layer, as a map of layers over tokens."""
    lines = [line.get("experts/layers", {}).get("max_load") for line in run.metrics.train]
    known = [n for n, one in enumerate(lines) if isinstance(one, list) and one]
    if not known:
        return None
    depth = len(lines[known[0]])
    loads = np.array([lines[n] for n in known if len(lines[n]) == depth], np.float64)
    tokens = run.tokens[[n for n in known if len(lines[n]) == depth]]
    worst = int(np.argmax(loads[-1]))

    def plot(axes: Axes) -> None:
        order = np.argsort(loads[-1])[::-1]
        for rank, layer in enumerate(order):
            style = {"color": _NEUTRAL, "linewidth": 1.8} if rank == 0 else {"color": _NEUTRAL, **_FAINT}
            axes.plot(*series.means(tokens, loads[:, layer]), **style)

    svg = chart(run, "expert-layers", "Load of the busiest expert of each layer", plot, _short)
    note = f"One line a layer. Dark: layer {worst + 1} of the {depth} with experts, the least even at the end."
    return Chart("expert-layers", "Busiest expert by layer", "times the mean", svg, note=note)


def _expert_share(key: str) -> Callable[[Record], Chart | None]:
    title, note = {
        "dead": ("Unused experts", "Share of the experts that no token chose in a log interval."),
        "dropped": ("Dropped choices", "Share of the choices that a full expert dropped."),
    }[key]

    def make(run: Record) -> Chart | None:
        values = series.column(run.metrics.train, f"experts/{key}")
        if not np.nansum(values) > 0:
            return None  # nothing to see
        return _line(run, f"expert-{key}", title, "share", values, lambda y: f"{100 * y:.3g}%", note=note)

    return make


def _short(value: float) -> str:
    return f"{value:.3g}"


def _throughput(run: Record) -> Chart | None:
    values = series.column(run.metrics.train, "tokens_per_second")
    return _line(run, "throughput", "Throughput", "tokens per second", values, count_tick)


def _mfu(run: Record) -> Chart | None:
    values = series.column(run.metrics.train, "mfu")
    note = "Model FLOP/s over the peak of the devices; recomputation does not count."
    return _line(run, "mfu", "Model FLOPs utilisation", "", values, lambda value: f"{100 * value:.3g}%", note=note)


def _data_wait(run: Record) -> Chart | None:
    wait, step = (series.column(run.metrics.train, key) for key in ("data_wait_seconds", "step_seconds"))
    share = wait / np.where(step > 0, step, np.nan)
    note = "Part of a step in which the devices waited for the loader."
    return _line(run, "data-wait", "Data wait", "share of the step", share, lambda y: f"{100 * y:.3g}%", note=note)


def _memory(run: Record) -> Chart | None:
    values = series.column(run.metrics.train, "memory_bytes") / 2**30
    note = "Peak on the fullest device of the first host."
    return _line(run, "memory", "Device memory", "GiB", values, lambda y: f"{y:.3g}", smooth=False, note=note)
