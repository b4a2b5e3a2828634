"""The processes of a run on several hosts: joining them, and what only the first of them does."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import numpy as np

from davinci_jax.errors import CheckpointError, ConfigError, UserError

_PODS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS")


def initialize() -> None:
    """Calls `jax.distributed.initialize` where the environment describes more than one process.

    Slurm and TPU pods on Kubernetes are recognised by JAX itself. Elsewhere set JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, which always win.

    Raises:
      ConfigError: a coordinator is named, but not the number of processes or the own one.
    """
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            if not environment.get(name, "").isdigit():
                raise ConfigError(
                    name, environment.get(name), "must go with JAX_COORDINATOR_ADDRESS", "set it to a number"
                )
        jax.distributed.initialize(
            environment["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(environment["JAX_NUM_PROCESSES"]),
            process_id=int(environment["JAX_PROCESS_ID"]),
            heartbeat_timeout_seconds=30,
        )
    elif int(environment.get("SLURM_NTASKS", "1")) > 1 or any("," in environment.get(name, "") for name in _PODS):
        jax.distributed.initialize()


def on_first_host(action: Callable[[], None]) -> None:
    """Runs `action` on process 0 while the others wait; if it fails there, all processes end with its reason."""
    failure: UserError | None = None
    if jax.process_index() == 0:
        try:
            action()
        except UserError as error:
            failure = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = multihost_utils.broadcast_one_to_all(np.array(failure is not None))
        if failed and failure is None:
            failure = CheckpointError("host 0", None, "could not go on", "see what it printed")
    if failure is not None:
        raise failure
