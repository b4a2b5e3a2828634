"""The processes of a run on several hosts: joining them, and what only the first of them does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

# Not public, but the class that jax asks to be derived from to make a cluster known; the same in jax 0.10 to 0.12.
from jax._src.clusters import ClusterEnv

from davinci_jax.errors import CheckpointError, ConfigError, UserError

_BY_HAND = (
    "set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, "
    "or JAX_NUM_PROCESSES=1 to train on this host alone"
)
_HEARTBEAT_SECONDS = 30


def initialize() -> None:
    """Joins the processes of a run, where there is more than one.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID win; JAX_NUM_PROCESSES=1
    trains alone. Without them JAX detects the cluster: Cloud TPU VMs and pods, Slurm, Open MPI, Kubernetes jobs. With
    one process nothing is started: Slurm and Open MPI would leave it a single GPU.

    Raises:
      ConfigError: the environment contradicts itself, or describes a cluster that JAX cannot read.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        _join(os.environ["JAX_COORDINATOR_ADDRESS"], _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID"), None)
    elif os.environ.get("JAX_NUM_PROCESSES") != "1":
        address, count, rank, local_devices = _detect()
        if count is not None and count > 1:
            _join(address, count, rank, local_devices)


def _number(name: str) -> int:
    value = os.environ.get(name)
    if not (value or "").isdigit():
        raise ConfigError(name, value, "must go with JAX_COORDINATOR_ADDRESS", "set it to a number")
    return int(value)


def _detect() -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Returns what `jax.distributed.initialize` would find out by itself; it fails where there is no cluster."""
    try:
        return ClusterEnv.auto_detect_unset_distributed_params(
            coordinator_address=None,
            num_processes=None,
            process_id=None,
            local_device_ids=None,
            cluster_detection_method=None,
            initialization_timeout=300,
        )
    except Exception as error:  # a variable that is no number, a metadata server that does not answer, ...
        reason = " ".join(str(error).split())[:200]
        problem = f"describes a cluster that JAX cannot read ({type(error).__name__}: {reason})"
        raise ConfigError("environment", None, problem, _BY_HAND) from error


def _join(address: str, count: int, rank: int, local_devices: Sequence[int] | None) -> None:
    if not address.rpartition(":")[2].isdigit():
        raise ConfigError("JAX_COORDINATOR_ADDRESS", address, "names no port", "write host:port of process 0")
    if rank >= count:
        raise ConfigError("JAX_PROCESS_ID", rank, f"is not below JAX_NUM_PROCESSES = {count}", "count from 0")
    jax.distributed.initialize(
        address,
        num_processes=count,
        process_id=rank,
        local_device_ids=local_devices,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )


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
