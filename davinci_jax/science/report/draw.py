"""One chart of a report as inline SVG: a line figure over tokens with the stage borders drawn in."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from davinci_jax.science.report.record import Record
from davinci_jax.training import units

# Okabe & Ito's palette for all kinds of colour vision, without the yellow that white paper swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C3E", "#5F6670")
INK, MUTED, GRID = "#26292e", "#6b7079", "#e6e7ea"

_WIDTH, _HEIGHT = 430, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 20, 26
_LABEL_WIDTH = 7.0  # of a character of a stage's name, with some air
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "davinci_jax",
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#b9bcc2",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def count_tick(value: float) -> str:
    """Returns the tick of a count without idle zeros: 2.5M, 10B."""
    return re.sub(r"\.0+(?=\D|$)|(?<=\.\d)0(?=\D|$)", "", units.count(value))


def chart(
    run: Record, name: str, description: str, plot: Callable[[Axes], None], format_y: Callable[[float], str]
) -> Markup:
    """Returns a figure as an `<svg>` element that scales with its container.

    Args:
      run: gives the tokens and the stage borders.
      name: letters and dashes, unique in the page; goes before all ids of the figure.
      description: read out in place of the picture.
      plot: draws on the axes; x is in tokens.
      format_y: text of a tick.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        axes = figure.add_axes((_LEFT / _WIDTH, _BOTTOM / _HEIGHT, width / _WIDTH, height / _HEIGHT))
        axes.patch.set_visible(False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        plot(axes)
        end = float(np.nanmax(run.tokens, initial=1.0))
        axes.set_xlim(0, end)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_tick(value)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_y(value)))
        _draw_stages(axes, run, end, width)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=_NO_METADATA, transparent=True)
    return _inline(file.getvalue(), name, description)


def _draw_stages(axes: Axes, run: Record, end: float, width: float) -> None:
    """Draws a line where each stage ends and its name above it, where there is room."""
    for n, stage in enumerate(run.experiment.curriculum):
        steps = run.timeline.steps_of(n)
        low, high = (run.timeline.tokens_before(step) for step in (steps.start, steps.stop))
        if low >= end:
            break
        if low > 0:
            axes.axvline(low, color="#9a9ea6", linewidth=0.8, linestyle=(0, (2, 3)))
        middle, room = (low + min(high, end)) / 2, (min(high, end) - low) / end * width
        if len(stage.name) * _LABEL_WIDTH <= room:
            axes.annotate(
                stage.name, (middle, 1), xycoords=("data", "axes fraction"), xytext=(0, 6),
                textcoords="offset points", ha="center", color=MUTED, fontsize=9.5, annotation_clip=False,
            )  # fmt: skip


def _inline(svg: str, name: str, description: str) -> Markup:
    """Makes a file into an element of a page: no prologue, no name spaces, ids of its own, two decimals."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'\sid="(figure|axes|patch|line2d|matplotlib|text|xtick|ytick|FillBetween\w+)\w*"', "", svg)
    svg = re.sub(r'\b(id=")', rf"\1{name}-", svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    svg = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1))
