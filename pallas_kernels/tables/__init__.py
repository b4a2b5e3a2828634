"""Block sizes by operation, device family and shape class: one JSON file per operation, filled by `tune`.

{"v5p": {"fwd/head128/causal/4096": {"config": {"block_q": 1024, ...}, "cost": 470000, "unit": "cycles",
                                     "source": "static", "versions": {"jax": "0.10.2", ...}}}}
"""

import functools
import importlib.resources
import json


@functools.cache
def load(operation: str) -> dict:
    """The table of one operation; empty where there is none."""
    file = importlib.resources.files(__name__) / f"{operation}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def lookup(operation: str, family: str, shape_class: str) -> dict | None:
    """The recorded config of `shape_class` on a device family, or None."""
    entry = load(operation).get(family, {}).get(shape_class)
    return dict(entry["config"]) if entry else None
