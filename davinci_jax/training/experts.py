"""How evenly the experts of a model were used, as a few numbers a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# What a step tells of its experts, see `training.step.make_step`.
KEYS = ("expert_load", "expert_dropped", "expert_balance_loss", "router_z_loss")


def figures(steps: Sequence[dict[str, np.ndarray]], tokens: int) -> dict[str, Any]:
    """Returns the metrics of an interval of steps of a model with experts.

    Args:
      steps: the metrics of each step: "expert_load" [L, E], "expert_dropped" [L], "expert_balance_loss" [L] and
        "router_z_loss" [L].
      tokens: that the interval consumed.

    Returns:
      Under "experts/layers", lists with a number for each layer: "max_load", the tokens of the busiest expert over the
      mean; "variation", the standard deviation of the loads over their mean; "dead", the share of experts that no
      token chose; "dropped", the share of choices that a full expert dropped. Under "experts/<name>" the mean of each
      over the layers, and "per_token", "balance_loss" and "z_loss".
    """
    load = np.sum([one["expert_load"] for one in steps], axis=0, dtype=np.float64)
    dropped = np.sum([one["expert_dropped"] for one in steps], axis=0, dtype=np.float64)
    mean = np.maximum(load.mean(axis=1), 1e-9)  # a threshold may leave a layer without any token
    layers = {
        "max_load": load.max(axis=1) / mean,
        "variation": load.std(axis=1) / mean,
        "dead": (load == 0).mean(axis=1),
        "dropped": dropped / np.maximum(load.sum(axis=1), 1.0),
    }
    return {
        **{f"experts/{name}": float(values.mean()) for name, values in layers.items()},
        "experts/per_token": float(load.sum(axis=1).mean() / tokens),
        "experts/balance_loss": float(np.mean([one["expert_balance_loss"] for one in steps])),
        "experts/z_loss": float(np.mean([one["router_z_loss"] for one in steps])),
        "experts/layers": {name: [float(f"{value:.4g}") for value in values] for name, values in layers.items()},
    }
