"""How a global batch is cut into micro-batches over the devices of the mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import Experiment
from davinci_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """The shape of a step's batch on the devices.

    Attributes:
      mesh: the mesh.
      micro_rows: rows of one micro-batch over all devices.
      max_micro: micro-batches of the largest batch of the run; smaller ones are padded and the padding never read.
    """

    mesh: Mesh
    micro_rows: int
    max_micro: int

    @functools.cached_property
    def local_rows(self) -> np.ndarray:
        """The rows of a micro-batch that this host's devices hold, int64, ascending."""
        index_map = NamedSharding(self.mesh, spec("batch")).addressable_devices_indices_map((self.micro_rows,))
        rows = {row for (piece,) in index_map.values() for row in range(self.micro_rows)[piece]}
        return np.array(sorted(rows), np.int64)

    def put(self, batch: Any) -> Any:
        """Returns this host's part [micro, local_rows, ...] of a batch as global arrays, padded to `max_micro`."""
        return jax.tree.map(self._put, batch)

    def _put(self, x: np.ndarray) -> jax.Array:
        if x.shape[0] < self.max_micro:
            x = np.concatenate([x, np.zeros((self.max_micro - x.shape[0], *x.shape[1:]), x.dtype)])
        sharding = NamedSharding(self.mesh, PartitionSpec(None, *spec(*("batch", "sequence")[: x.ndim - 1])))
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0], self.micro_rows, *x.shape[2:]))


def batch_layout(experiment: Experiment, mesh: Mesh) -> BatchLayout:
    """Returns the layout with the largest micro-batch, at most `run.micro_batch` rows a device, that divides them all.

    Raises:
      ConfigError: a stage's batch is not divisible by the devices that share it.
    """
    devices = math.prod(mesh.shape[axis] for axis in ("replica", "fsdp"))
    sizes = [piece.size for stage in experiment.curriculum for piece in stage.batch]
    for stage in experiment.curriculum:
        for piece in stage.batch:
            if piece.size % devices:
                near = max(1, round(piece.size / devices)) * devices
                raise ConfigError(
                    f"curriculum.{stage.name}.batch.size",
                    piece.size,
                    f"is not divisible by the {devices} devices of the mesh (replica x fsdp)",
                    f"choose {near}, or another mesh",
                )
    per_device = math.gcd(*sizes) // devices
    rows = max(n for n in range(1, min(per_device, experiment.run.micro_batch) + 1) if per_device % n == 0)
    return BatchLayout(mesh, rows * devices, max(sizes) // (rows * devices))
