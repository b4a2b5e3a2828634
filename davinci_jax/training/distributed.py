"""Joins the processes of a run on several hosts."""

from __future__ import annotations

import os

import jax

from davinci_jax.errors import ConfigError

_PODS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS")


def initialize() -> None:
    """Calls `jax.distributed.initialize` where the environment describes more than one process.

    Slurm and TPU pods are recognised by JAX itself. Elsewhere set JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ConfigError: a coordinator is named, but not the number of processes or the own one.
    """
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment and "SLURM_JOB_ID" not in environment:
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
