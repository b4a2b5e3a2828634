"""The mesh refuses sizes that do not fit, and specs follow the table."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from davinci_jax import sharding
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import MeshConfig


@pytest.mark.parametrize(
    ("config", "replica", "fsdp"),
    [(MeshConfig(), 1, 8), (MeshConfig(replica=2), 2, 4), (MeshConfig(replica=-1, fsdp=2), 4, 2)],
)
def test_mesh_takes_the_devices_that_are_left(config, replica, fsdp):
    mesh = sharding.make_mesh(config)
    assert dict(mesh.shape) == {"replica": replica, "fsdp": fsdp, "context": 1, "tensor": 1, "expert": 1, "stage": 1}
    assert set(mesh.axis_types) == {AxisType.Explicit}


def test_mesh_of_given_devices():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[3:4])
    assert list(mesh.devices.flat) == jax.devices()[3:4]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(replica=3, fsdp=2), "replica 3 x fsdp 2 = 6 does not match 8 devices"),
        (MeshConfig(replica=3), "8 devices / 3 on the other axes is no whole number"),
        (MeshConfig(fsdp=4), "replica 1 x fsdp 4 = 4 does not match 8 devices"),
    ],
)
def test_mesh_that_does_not_fit_shows_the_arithmetic(config, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(config)


def test_spec_follows_the_table():
    assert sharding.spec("batch", "sequence", None) == PartitionSpec(("replica", "fsdp"), "context", None)
    assert sharding.spec("layers", "embed", "heads", "head_size") == PartitionSpec(None, "fsdp", "tensor", None)


def test_spec_refuses_unknown_names_and_a_mesh_axis_used_twice():
    with pytest.raises(ConfigError, match="did you mean 'embed'"):
        sharding.spec("embd")
    with pytest.raises(ConfigError, match="two axes over one mesh axis"):
        sharding.spec("batch", "embed")


def test_constrain_reshards_under_a_mesh_and_does_nothing_without():
    x = jnp.zeros((8, 2))
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.out("batch") is None
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        assert sharding.constrain(jnp.zeros((8, 2)), "batch", None).sharding.shard_shape((8, 2)) == (1, 2)
