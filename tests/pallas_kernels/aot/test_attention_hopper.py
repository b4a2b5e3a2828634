"""The Hopper attention kernels, compiled for an H200: registers, spills, and tensor-core products left asynchronous."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.compiler import aot
from pallas_kernels.kernels.attention import hopper
from pallas_kernels.kernels.attention.spec import AttentionSpec

BATCH, LENGTH, HEADS, GROUPS = 2, 1000, 8, 2
# Bytes of stores, as recorded when the kernels were written. What the backward kernel spills are mostly numbers that
# stay the same over its loop, about ten loads a step; a soft cap keeps half a tile of scores more.
MOST_SPILLED = {
    "forward": {"plain": 0, "soft cap": 0, "positions": 0},
    "backward": {"plain": 80, "soft cap": 304, "positions": 128},
}
# ptxas says so where it makes products wait that the kernel leaves in flight.
SERIALISED = ("C7510", "C7511", "C7512", "C7513", "C7514", "C7515", "C7516", "C7517", "C7518")


def compiled(direction, spec, head_dim, masks, **config):
    """The report of ptxas on one kernel; `masks` names what is given beside the arrays."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    heads, keys = shape((BATCH, LENGTH, HEADS, head_dim)), shape((BATCH, LENGTH, GROUPS, head_dim))
    rows = jax.ShapeDtypeStruct((BATCH, HEADS, LENGTH), jnp.float32)
    arrays = (heads, keys, keys) if direction == "forward" else (heads, keys, keys, rows, rows, heads)
    given = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    kind = hopper.ForwardConfig if direction == "forward" else hopper.BackwardConfig

    def call(arrays, masks):
        return getattr(hopper, direction)(*arrays, spec=spec, config=kind(**config), **masks)

    program = aot.compile_for("h200", call, arrays, dict.fromkeys(masks, given))
    (kernel,) = program.kernels
    return kernel


def check(direction, kernel, kind="plain"):
    assert kernel.registers == 168  # 384 threads share 64 K; warpgroups divide theirs anew at the start
    assert kernel.spill_stores <= MOST_SPILLED[direction][kind]
    assert not [line for line in kernel.warnings if any(code in line for code in SERIALISED)]


CAUSAL = AttentionSpec(True, None, None, 0.1)
PACKED = ("q_segments", "kv_segments")


@pytest.mark.parametrize("head_dim", hopper.HEAD_SIZES)
def test_forward(head_dim):
    kernel = compiled("forward", CAUSAL, head_dim, PACKED)
    check("forward", kernel)
    assert kernel.wgmma == 2 * (head_dim // 16 + 128 // 16)  # once in the loop, once around it


@pytest.mark.parametrize("head_dim", hopper.HEAD_SIZES)
def test_backward(head_dim):
    kernel = compiled("backward", CAUSAL, head_dim, PACKED, splits=4)
    check("backward", kernel)
    strips = 128 // head_dim
    assert kernel.wgmma == strips * (2 * head_dim // 16 + 2 * 64 // 16) + 128 // 16


@pytest.mark.exhaustive
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("head_dim", hopper.HEAD_SIZES)
@pytest.mark.parametrize(
    ("kind", "spec", "masks"),
    [
        ("plain", AttentionSpec(False, None, None, 0.1), ()),
        ("soft cap", AttentionSpec(True, (256, -1), 50.0, 0.1), PACKED),
        ("positions", AttentionSpec(True, None, None, -0.1), (*PACKED, "q_positions", "kv_positions")),
    ],
)
def test_more_kinds_of_masks(direction, head_dim, kind, spec, masks):
    check(direction, compiled(direction, spec, head_dim, masks), kind)
