"""What of an experiment decides what a run computes, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from davinci_jax.experiment.experiment import Experiment
from davinci_jax.experiment.serialize import resolve, to_dict

# Fields that say where or how a run executes, not what it computes: a run may be continued with other values. Data
# that move to another folder are recognised by their checksums.
NOT_IDENTITY = {
    "run": (
        "name",
        "directory",
        "micro_batch",
        "log_every_steps",
        "tensorboard",
        "peak_flops",
        "watchdog_seconds",
    ),
    "model": ("remat", "loss_chunk"),
    "data": ("root", "tokenizer", "workers", "prefetch"),
    "mesh": ("replica", "fsdp"),
    "checkpoint": ("every_steps", "keep_last", "keep_every"),
    "evaluation": ("every_steps", "tokens"),
}
NOT_IDENTITY_OF_SOURCE = ("path", "documents", "max_epochs")


def identity(experiment: Experiment) -> dict[str, Any]:
    """Returns the fields that decide what the run computes, flattened to dotted names."""
    tree = to_dict(resolve(experiment))
    for section, names in NOT_IDENTITY.items():
        for name in names:
            del tree[section][name]
    for source in tree["data"]["sources"]:
        for name in NOT_IDENTITY_OF_SOURCE:
            del source[name]
    return flatten({section: fields for section, fields in tree.items() if fields})


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns dotted name -> leaf of nested dicts and lists."""
    if isinstance(tree, (dict, list)) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: leaf for key, item in items for name, leaf in flatten(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree}


def fingerprint(experiment: Experiment) -> str:
    """Returns 16 hex digits that change when, and only when, what the run computes changes."""
    text = json.dumps(identity(experiment), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
