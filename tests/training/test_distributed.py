"""Which processes a run joins, from the environments that schedulers make; nothing is really started."""

import jax
import pytest
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster

from davinci_jax.errors import ConfigError
from davinci_jax.training.distributed import initialize

SLURM = {
    "SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "node[07-10]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}  # fmt: skip
TPU_VM = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "unknown:unknown:localhost,unknown:unknown:10.0.0.2",
    "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'",
}


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` was called with."""
    calls = []

    def record(address, num_processes, process_id, **rest):
        calls.append((address, num_processes, process_id, rest["local_device_ids"]))

    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", record)
    return calls


def setenv(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_machine_alone_starts_nothing(joined):
    initialize()
    assert joined == []


def test_slurm(joined, monkeypatch):
    setenv(monkeypatch, SLURM)
    initialize()
    ((address, *rest),) = joined
    assert address.startswith("node07:")
    assert rest == [4, 2, [0]]


def test_one_task_of_slurm_keeps_all_its_devices(joined, monkeypatch):
    setenv(monkeypatch, {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    initialize()
    assert joined == []


def test_slurm_that_cannot_be_read_is_one_line(joined, monkeypatch):
    setenv(monkeypatch, {**SLURM, "SLURM_NTASKS": "abc"})
    with pytest.raises(ConfigError, match=r"cannot read .*'abc'.*JAX_COORDINATOR_ADDRESS"):
        initialize()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    initialize()
    assert joined == []


def test_tpu_vms_are_found_through_their_metadata(joined, monkeypatch):
    """The second of two hosts of a slice; the metadata server of Compute Engine is a table here."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (TPU_VM[key], 200))
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
    initialize()
    assert joined == [("localhost:8482", 2, 1, None)]


def test_a_tpu_pod_on_kubernetes(joined, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
    variables = {"TPU_WORKER_HOSTNAMES": "localhost,other", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1"}
    setenv(monkeypatch, {**variables, "MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "2",
                         "MEGASCALE_SLICE_ID": "1"})  # fmt: skip
    initialize()
    assert joined == [("localhost:8482", 4, 3, None)]


def test_what_is_given_by_hand_wins(joined, monkeypatch):
    setenv(monkeypatch, SLURM)
    setenv(monkeypatch, {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", None)
    initialize()
    assert joined == [("a:1", 2, 1, None)]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID: must go with JAX_COORDINATOR_ADDRESS"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES = 'two'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID = 2: is not below"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "host"}, "names no port"),
    ],
)
def test_half_a_description_is_one_line(joined, monkeypatch, variables, message):
    setenv(monkeypatch, {"JAX_COORDINATOR_ADDRESS": "host:1234", **variables})
    with pytest.raises(ConfigError, match=message):
        initialize()
    assert joined == []
