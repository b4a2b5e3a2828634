"""Runs the Hopper kernels in the interpreter of Mosaic GPU, beside the reference."""

import attention_reference as reference
import jax.numpy as jnp
import numpy as np

from pallas_kernels import target
from pallas_kernels.kernels.attention import hopper

# Of the largest value: an operand of a product has 11 or 8 bits, and so has the result.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}


def check(
    spec,
    *,
    heads=(1, 1),
    head_dim=64,
    queries=128,
    keys=None,
    masks=(None,) * 4,
    dtype="float16",
    block_kv=64,
    splits=1,
):
    """Output, log-sum-exp and all gradients of one random case; `heads` are those of queries and of keys."""
    batch = next((len(x) for x in masks if x is not None), 1)
    keys = keys or queries
    rng = np.random.default_rng(queries + keys)
    long, short = ((batch, length, count, head_dim) for length, count in zip((queries, keys), heads, strict=True))
    q, k, v, dout = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in (long, short, short, long))
    dlse = rng.standard_normal((batch, heads[0], queries))
    mask = reference.visible(spec, batch, queries, keys, *masks)
    out, lse, *gradients = reference.attention(
        q, k, v, mask, scale=spec.scale, soft_cap=spec.soft_cap, dout=dout, dlse=dlse
    )
    dlse = np.where(np.isinf(lse), 0, dlse)
    delta = np.einsum("bthk,bthk->bht", out, np.asarray(dout, np.float64)) - dlse
    names = ("q_segments", "kv_segments", "q_positions", "kv_positions")
    given = {name: None if x is None else jnp.asarray(x) for name, x in zip(names, masks, strict=True)}
    with target.interpreting(target.H200):
        found, sums = hopper.forward(q, k, v, spec=spec, config=hopper.ForwardConfig(block_kv, 2), **given)
        finite = jnp.asarray(np.where(np.isinf(lse), 0, lse), jnp.float32)
        config = hopper.BackwardConfig(2, splits)
        delta = jnp.asarray(delta, jnp.float32)
        slopes = hopper.backward(q, k, v, finite, delta, dout, spec=spec, config=config, **given)
    np.testing.assert_array_equal(np.isinf(sums), np.isinf(lse))
    np.testing.assert_allclose(np.where(np.isinf(sums), 0, sums), np.where(np.isinf(lse), 0, lse), atol=1e-4)
    for name, actual, wanted in zip(("out", "dq", "dk", "dv"), (found, *slopes), (out, *gradients[:3]), strict=True):
        assert actual.dtype == dtype
        largest = np.abs(wanted).max()
        difference = np.abs(np.asarray(actual, np.float64) - wanted).max()
        assert difference < TOLERANCE[dtype] * largest, f"{name}: off by {difference}, largest {largest}"
