"""Runs the Hopper kernels in the interpreter of Mosaic GPU through the public function, beside the reference."""

import contextlib
import threading

import attention_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import thread_map

import pallas_kernels
from pallas_kernels import target
from pallas_kernels.kernels.attention import hopper
from pallas_kernels.kernels.attention.spec import AttentionSpec

# Of the largest value: an operand of a product has 11 or 8 bits, and so has the result.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}
NAMES = ("out", "dq", "dk", "dv", "dsinks")


@contextlib.contextmanager
def interpreted(params=None):
    """Kernels for the H200 run in the interpreter, which compiles them once and not for each block and warpgroup."""
    lock, programs, usual = threading.Lock(), {}, thread_map._run_jaxpr

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in programs:
                function = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None)
                programs[id(jaxpr)] = jaxpr, function.lower(consts, *args).compile()
        programs[id(jaxpr)][1](consts, *args)

    thread_map._run_jaxpr = run
    try:
        with target.interpreting(target.H200, params):
            yield
    finally:
        thread_map._run_jaxpr = usual


def check(
    *,
    heads=(1, 1),
    head_dim=64,
    queries=128,
    keys=None,
    masks=(None,) * 4,
    sinks=None,
    dtype="float16",
    block_kv=64,
    splits=1,
    **options,
):
    """Output, log-sum-exp and all gradients of one random case, the gradient of the log-sum-exp included.

    `heads` are those of queries and of keys; `masks` are q_segments, kv_segments, q_positions, kv_positions;
    `options` go to the public function as they are.
    """
    batch = next((len(x) for x in masks if x is not None), 1)
    keys = keys or queries
    rng = np.random.default_rng(queries + keys)
    long, short = ((batch, length, count, head_dim) for length, count in zip((queries, keys), heads, strict=True))
    q, k, v, dout = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in (long, short, short, long))
    dlse = rng.standard_normal((batch, heads[0], queries)).astype(np.float32)

    causal, window = options.setdefault("causal", True), options.get("window")
    window = (window - 1, -1 if causal else window - 1) if isinstance(window, int) else window
    spec = AttentionSpec(causal, window, options.get("soft_cap"), options.get("scale", head_dim**-0.5))
    seen = reference.visible(spec, batch, queries, keys, *masks)
    known = {"scale": spec.scale, "soft_cap": spec.soft_cap, "sinks": sinks}
    _, wanted_lse = reference.attention(q, k, v, seen, **known)
    dlse = np.where(np.isinf(wanted_lse), 0, dlse)
    wanted, wanted_lse, *gradients = reference.attention(q, k, v, seen, **known, dout=dout, dlse=dlse)

    for name, pair in (("segment_ids", masks[:2]), ("positions", masks[2:])):
        alone = pair[1] is None
        options[name] = pair[0] if alone else tuple(jnp.asarray(x) for x in pair)
    config = (hopper.ForwardConfig(block_kv, 2), hopper.BackwardConfig(2, splits))
    arrays = (q, k, v) if sinks is None else (q, k, v, jnp.asarray(sinks, jnp.float32))

    def call(q, k, v, sinks=None):
        choices = {"sinks": sinks, "return_lse": True, "backend": "pallas", "config": config}
        return pallas_kernels.attention(q, k, v, **options, **choices)

    with interpreted():
        (found, lse), pullback = jax.vjp(call, *arrays)
        slopes = pullback((dout, jnp.asarray(dlse, jnp.float32)))
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(wanted_lse))
    finite = ~np.isinf(wanted_lse)
    np.testing.assert_allclose(np.asarray(lse)[finite], wanted_lse[finite], atol=1e-4)
    expected = (wanted, *gradients[: len(arrays)])
    for name, actual, right in zip(NAMES, (found, *slopes), expected, strict=False):
        assert name == "dsinks" or actual.dtype == dtype
        difference, largest = np.abs(np.asarray(actual, np.float64) - right).max(), np.abs(right).max()
        assert difference < TOLERANCE[dtype] * largest, f"{name}: off by {difference}, largest {largest}"
