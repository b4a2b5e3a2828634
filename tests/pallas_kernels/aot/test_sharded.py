"""Kernels on arrays divided over four chips: each runs the kernel on its part, and nothing moves between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import attention
from pallas_kernels.compiler import aot

pytestmark = pytest.mark.exhaustive

HEADS = PartitionSpec("data", None, "tensor")


def gradients(q, k, v, ids):
    def loss(q, k, v):
        return jnp.square(attention(q, k, v, segment_ids=ids).astype(jnp.float32)).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)


def in_shard_map(q, k, v, ids):
    return jax.shard_map(gradients, in_specs=(HEADS,) * 3 + (PartitionSpec("data"),), out_specs=HEADS)(q, k, v, ids)


@pytest.mark.parametrize(
    ("function", "kind"),
    [(gradients, AxisType.Explicit), (in_shard_map, AxisType.Auto)],
    ids=["explicit axes", "shard_map"],
)
def test_attention_moves_nothing_between_chips(function, kind):
    mesh = Mesh(np.array(aot.devices("v5p")).reshape(2, 2), ("data", "tensor"), axis_types=(kind,) * 2)

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    q, kv = (struct((4, 1024, heads, 128), jnp.bfloat16, HEADS) for heads in (4, 2))
    compiled = aot.compile_for("v5p", function, q, kv, kv, struct((4, 1024), jnp.int32, PartitionSpec("data")))
    assert compiled.kernel("attention_forward")
    assert compiled.kernel("attention_backward")
    assert [name for name in ("all-gather", "all-reduce", "all-to-all", "permute") if name in compiled.text] == []
