"""Writing the tables of block sizes."""

import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

from pallas_kernels import tables
from pallas_kernels.compiler import aot
from pallas_kernels.tune.costs import Cost

FOLDER = pathlib.Path(tables.__file__).parent


def entry(config: Any, cost: Cost) -> dict[str, Any]:
    """One entry of a table."""
    return {
        "config": dataclasses.asdict(config),
        "cost": round(cost.value, 1),
        "unit": cost.unit,
        "source": cost.source,
        "versions": {name: version for name, version in aot.versions().items() if name in ("jax", "libtpu")},
    }


def keeps(old: dict[str, Any] | None, new: dict[str, Any]) -> bool:
    """Whether the old entry is worth more: it was measured, and the new one was not."""
    return old is not None and old["source"] == "measured" and new["source"] != "measured"


def write(
    operation: str,
    family: str,
    shape_class: str,
    new: dict[str, Any],
    *,
    force: bool = False,
    folder: pathlib.Path | None = None,
) -> bool:
    """Puts an entry into the table of an operation, whole or not at all; False if the one that is there is kept.

    Args:
      operation: the name of the table.
      family: of the device.
      shape_class: the key of the entry.
      new: what `entry` gives.
      force: also write over an entry that was measured with one that was not.
      folder: of the tables, where they are not those of the package.
    """
    folder = folder or FOLDER
    file = folder / f"{operation}.json"
    table = json.loads(file.read_text()) if file.exists() else {}
    by_class = table.setdefault(family, {})
    if keeps(by_class.get(shape_class), new) and not force:
        return False
    by_class[shape_class] = new
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as temporary:
        json.dump(table, temporary, indent=2, sort_keys=True)
        temporary.write("\n")
    os.chmod(temporary.name, 0o644)
    os.replace(temporary.name, file)
    return True
