"""Metrics as arrays, smoothed and thinned: a chart of 100,000 lines draws no more points than it has pixels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 300


def column(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """Returns float64 [len(lines)], NaN where a line has no number under the key."""
    values = (line.get(key) for line in lines)
    return np.array([value if isinstance(value, (int, float)) else np.nan for value in values], np.float64)


def smooth(values: np.ndarray, groups: np.ndarray, window: int) -> np.ndarray:
    """Returns the centred moving mean of values [n] inside runs of equal groups [n]; NaN counts for nothing.

    The window shrinks on both sides alike towards the ends of a group, so that a slope is not bent there, and no
    value is averaged across a stage border, where the mixture changes and with it the loss.
    """
    smoothed = np.full(len(values), np.nan)
    borders = np.flatnonzero(groups[1:] != groups[:-1]) + 1
    for part in np.split(np.arange(len(values)), borders):
        known = np.isfinite(values[part])
        sums = np.concatenate([[0.0], np.cumsum(np.where(known, values[part], 0.0))])
        counts = np.concatenate([[0], np.cumsum(known)])
        index = np.arange(len(part))
        half = np.minimum(window // 2, np.minimum(index, len(part) - 1 - index))
        low, high = index - half, index + half + 1
        total = counts[high] - counts[low]
        with np.errstate(invalid="ignore", divide="ignore"):
            smoothed[part] = (sums[high] - sums[low]) / np.where(total, total, np.nan)
    return smoothed


def extremes(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Thins to the lowest and highest point of every bin, in order: a spike of one step stays visible."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= 2 * bins:
        return x, y
    edges = np.linspace(0, len(x), bins + 1).astype(int)
    parts = [np.arange(low, high) for low, high in itertools.pairwise(edges)]
    keep = np.unique([[part[np.argmin(y[part])], part[np.argmax(y[part])]] for part in parts])
    return x[keep], y[keep]


def means(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Thins x [n] and y [..., n] to the means of bins of neighbouring points; NaN counts for nothing."""
    if len(x) <= bins:
        return x, y
    edges = np.linspace(0, len(x), bins + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, len(x)))
    known = np.isfinite(y)
    totals = np.add.reduceat(np.where(known, y, 0.0), edges, axis=-1)
    counts = np.add.reduceat(known, edges, axis=-1, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        return np.add.reduceat(x, edges) / sizes, totals / np.where(counts, counts, np.nan)


def changes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thins a step function to the first and last point of each level."""
    if len(x) <= 2:
        return x, y
    new = y[1:] != y[:-1]
    keep = np.concatenate([[True], new]) | np.concatenate([new, [True]])
    return x[keep], y[keep]


def stage_ends(groups: np.ndarray) -> np.ndarray:
    """Returns the index of the last point of each run of equal groups."""
    return np.append(np.flatnonzero(groups[1:] != groups[:-1]), len(groups) - 1) if len(groups) else np.array([], int)
