"""What `pallas_kernels.tune` needs to know of the Hopper kernels, for which only a device gives times."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kernels.attention import hopper, tuning
from pallas_kernels.kernels.attention.tuning import Shape

__all__ = ["FAMILIES", "OPERATION", "arguments", "build", "candidates", "shape_class", "shapes"]

OPERATION = hopper.TABLE
FAMILIES = ("hopper",)
TOKENS = 16384  # of a call: enough blocks for every multiprocessor


def shapes() -> dict[str, Shape]:
    """Shapes worth tuning for, by name: those of other families that the kernels take, in larger batches."""
    found = {"bwd-1-row": Shape(backward=True)}  # few blocks: heads are divided among more of them
    for name, shape in tuning.shapes().items():
        if shape.size in hopper.HEAD_SIZES:
            fields = {"batch": TOKENS // shape.length, "size": shape.size, "documents": shape.documents}
            found[name] = Shape(shape.backward, length=shape.length, causal=shape.causal, **fields)
    return found


def shape_class(shape: Shape) -> str:
    """The key of the table."""
    q, k = _structs(shape)[:2]
    return hopper.shape_class(_direction(shape), q.shape, k.shape, shape.spec, shape.documents > 1)


def candidates(family: str, shape: Shape) -> list[hopper.Config]:
    """Configs whose buffers fit into shared memory."""
    del family
    if shape.backward:
        found = [hopper.BackwardConfig(stages, splits) for stages, splits in itertools.product((2, 3), (1, 2, 4, 8))]
    else:
        found = [hopper.ForwardConfig(block_kv, stages) for block_kv in (64, 128, 192) for stages in (2, 3, 4)]
    slack = 4096  # barriers, and vectors that start at multiples of 1024
    return [config for config in found if config.shared_bytes(shape.size) + slack <= hopper.MOST_SHARED]


def build(family: str, shape: Shape, config: hopper.Config) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The function to time and its arguments."""
    del family
    q, k, rows = _structs(shape)
    arrays = [q, k, k, rows, rows, q] if shape.backward else [q, k, k]
    masks = [jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32)] * (shape.documents > 1)
    kernel = getattr(hopper, "backward" if shape.backward else "forward")

    def call(*given):
        ids = given[len(arrays)] if masks else None
        return kernel(*given[: len(arrays)], spec=shape.spec, q_segments=ids, kv_segments=ids, config=config)

    return call, arrays + masks


def arguments(family: str, shape: Shape, config: hopper.Config) -> list[jax.Array]:
    """Random numbers, and documents of equal length."""
    rng = np.random.default_rng(0)
    ids = np.tile(np.arange(shape.length, dtype=np.int32) * shape.documents // shape.length, (shape.batch, 1))
    structs = build(family, shape, config)[1]
    drawn = [ids if x.dtype == jnp.int32 else rng.standard_normal(x.shape, np.float32) for x in structs]
    return [jnp.asarray(x, struct.dtype) for x, struct in zip(drawn, structs, strict=True)]


def _direction(shape: Shape) -> str:
    return "bwd" if shape.backward else "fwd"


def _structs(shape: Shape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k, and a statistic of the rows of scores."""
    q = jax.ShapeDtypeStruct((shape.batch, shape.length, shape.heads, shape.size), shape.dtype)
    k = jax.ShapeDtypeStruct((*q.shape[:2], shape.kv_heads, shape.size), shape.dtype)
    return q, k, jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.length), jnp.float32)
