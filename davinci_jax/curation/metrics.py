"""How good probabilities of classes are, on texts with known classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_BINS = 10
_DIGITS = 4


def measure(probabilities: np.ndarray, targets: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Returns the metrics of a classifier as JSON values, rounded to four digits.

    Args:
      probabilities: float [N, C].
      targets: int [N].
      classes: names of the C classes.

    Returns:
      texts; accuracy, and that of always naming the most frequent class; macro_f1; log_loss in nats;
      calibration_error (Naeini et al. 2015, 10 bins of equal width of the top probability); confusion as rows of true
      classes; per class precision, recall and count; and for classes that are numbers, mean_absolute_error of the
      expected value and, for each threshold, precision and recall of "expected value >= threshold".
    """
    predicted = probabilities.argmax(axis=1)
    count = len(classes)
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (targets, predicted), 1)
    right = np.diag(confusion)
    precision, recall = (right / np.maximum(confusion.sum(axis=axis), 1) for axis in (0, 1))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    chosen = np.clip(probabilities[np.arange(len(targets)), targets], 1e-12, 1)
    out = {
        "texts": len(targets),
        "accuracy": _round(np.mean(predicted == targets)),
        "most_frequent": _round(confusion.sum(axis=1).max() / len(targets)),
        "macro_f1": _round(f1.mean()),
        "log_loss": _round(-np.log(chosen).mean()),
        "calibration_error": _round(calibration_error(probabilities, targets)),
        "confusion": confusion.tolist(),
        "classes": {
            name: {"precision": _round(precision[n]), "recall": _round(recall[n]), "texts": int(confusion[n].sum())}
            for n, name in enumerate(classes)
        },
    }
    values = numeric(classes)
    if values is not None:
        out |= _graded(probabilities @ values, values[targets], values)
    return out


def numeric(classes: Sequence[str]) -> np.ndarray | None:
    """Returns the classes as numbers, float64 [C], or `None` if one of them is none."""
    try:
        return np.array([float(name) for name in classes])
    except ValueError:
        return None


def calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Returns the mean distance, over texts, of top probability and accuracy in 10 bins of the top probability."""
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    bins = np.minimum((top * _BINS).astype(int), _BINS - 1)
    gaps = [abs(top[bins == n].sum() - right[bins == n].sum()) for n in range(_BINS)]
    return float(sum(gaps) / len(targets))


def _graded(expected: np.ndarray, true: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    thresholds = {}
    for threshold in values[1:]:
        chosen, wanted = expected >= threshold, true >= threshold
        both = int((chosen & wanted).sum())
        thresholds[f"{threshold:g}"] = {
            "kept": _round(chosen.mean()),
            "precision": _round(both / max(1, int(chosen.sum()))),
            "recall": _round(both / max(1, int(wanted.sum()))),
        }
    return {"mean_absolute_error": _round(np.abs(expected - true).mean()), "thresholds": thresholds}


def _round(value: Any) -> float:
    return round(float(value), _DIGITS)
