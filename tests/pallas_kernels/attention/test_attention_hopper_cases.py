"""More cases of the Hopper kernels in the interpreter, which takes seconds for each."""

import hopper_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.kernels.attention import hopper

pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")
pytestmark = pytest.mark.exhaustive


def test_head_size_128_with_heads_divided_among_blocks():
    hopper_cases.check(heads=(2, 1), head_dim=128, queries=192, dtype="bfloat16", splits=2)


def test_window_and_soft_cap_and_sinks():
    """Tiles that need no mask lie between tiles that do, along queries as along keys."""
    options = {"window": 200, "soft_cap": 5.0, "sinks": np.array([-1.0, 1.5])}
    hopper_cases.check(heads=(2, 2), head_dim=128, queries=300, **options)


def test_positions_out_of_order_and_a_negative_scale():
    positions = np.concatenate([np.arange(64) + 100, np.arange(40)])[None].astype(np.int32)
    masks = (None, None, positions, np.arange(150, dtype=np.int32)[None])
    hopper_cases.check(head_dim=128, queries=104, keys=150, masks=masks, block_kv=128, window=(90, -1), scale=-0.1)


def test_all_keys_of_another_length():
    hopper_cases.check(queries=64, keys=200, causal=False)


def test_two_rows_of_documents_one_of_them_padding_alone_in_a_window_on_both_sides():
    segments = np.stack([np.repeat(np.int32([0, 1, 4]), [9, 70, 21]), np.full(100, -1, np.int32)])
    masks = (segments, None, None, None)
    hopper_cases.check(heads=(3, 3), queries=100, masks=masks, causal=False, window=(20, 5), dtype="bfloat16")


def test_vmap_is_one_call_with_a_larger_batch(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 1, 70, 1, 64)), jnp.float16) for _ in range(3))
    config = (hopper.ForwardConfig(64, 2), hopper.BackwardConfig())
    batches = []

    def loss(backend, q, k, v):
        sizes = config if backend == "pallas" else None
        return jnp.square(pallas_kernels.attention(q, k, v, backend=backend, config=sizes).astype(jnp.float32)).sum()

    def gradients(backend):
        return jax.vmap(jax.grad(lambda *x: loss(backend, *x), (0, 1, 2)))

    def counted(kernel):
        return lambda q, *others, **options: (batches.append(len(q)), kernel(q, *others, **options))[1]

    for direction in ("forward", "backward"):
        monkeypatch.setattr(hopper, direction, counted(getattr(hopper, direction)))
    with hopper_cases.interpreted():
        found = gradients("pallas")(q, k, v)
    assert batches.count(2) == 2  # a loop would call kernels for a batch of 1 alone
    for one, other in zip(found, gradients("xla")(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, atol=4e-3 * np.abs(other).max())
