"""Kernels on arrays divided over four chips: each runs the kernel on its part, and nothing moves between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import attention, linear_cross_entropy
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


def divided(device, kind):
    """A mesh of four chips, and shapes of (x, w, labels) whose tokens are divided over two of them."""
    mesh = Mesh(np.array(aot.devices(device)[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    shapes = (((512, 128), jnp.bfloat16, ("data",)), ((1024, 128), jnp.bfloat16, ()), ((512,), jnp.int32, ("data",)))
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, dtype, spec in shapes
    ]


@pytest.mark.parametrize(
    ("device", "kind"), [("v5p", AxisType.Auto), ("h200", AxisType.Auto), ("h200", AxisType.Explicit)]
)
def test_cross_entropy_compiles_over_a_mesh_where_there_is_no_kernel(device, kind):
    gradients = jax.grad(lambda x, w, labels: linear_cross_entropy(x, w, labels)[0], (0, 1))
    compiled = aot.compile_for(device, gradients, *divided(device, kind))
    assert not [kernel for kernel in compiled.kernels if "cross_entropy" in kernel.name]
    assert "all-reduce" in compiled.text


def test_a_decoder_trains_with_kernels_on_every_chip():
    """The gradients of `davinci_jax`'s loss: attention in scanned blocks, the head's cross-entropy in a shard_map."""
    from davinci_jax import sharding
    from davinci_jax.experiment import MeshConfig, ModelConfig
    from davinci_jax.models import decoder

    config = ModelConfig(
        vocab_size=1024, hidden_size=256, num_layers=2, num_heads=2, num_kv_heads=1, head_size=128, mlp_size=512
    )
    mesh = sharding.make_mesh(MeshConfig(), aot.devices("v6e"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = jax.eval_shape(lambda: decoder.Decoder(config, jax.random.key(0)))
        rows = sharding.spec("batch", "sequence")

    def place(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    model = jax.tree.map(lambda leaf: place(leaf, leaf.sharding.spec), model)
    ids = place(jax.ShapeDtypeStruct((8, 512), jnp.int32), rows)
    step = jax.grad(lambda model, *batch: decoder.training_loss(model, *batch)[0])
    names = {kernel.name.split(".")[0] for kernel in aot.compile_for("v6e", step, model, *[ids] * 4).kernels}
    wanted = {"attention_forward", "attention_backward", "cross_entropy_logits", "cross_entropy_gradients"}
    assert wanted <= names
