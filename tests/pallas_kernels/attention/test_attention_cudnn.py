"""What is asked of cuDNN for packed documents, with jax.nn's own in its place: queries that see no key give 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, target
from pallas_kernels.kernels.attention import api

LENGTH = 16


@pytest.fixture
def cudnn(monkeypatch):
    """`attention` by the calls that go to cuDNN; like it, jax.nn's gives the mean where a mask hides all keys."""
    there = jax.nn.dot_product_attention

    def dot_product_attention(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return there(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    monkeypatch.setattr(api, "_cudnn_found", lambda: True)

    def call(*arrays, **options):
        with target.compiling_for(target.H200):
            return attention(*arrays, backend="cudnn", **options)

    return call


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, LENGTH, heads, 8) for heads in (4, 2, 2, 4)]
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def runs(*lengths):
    return np.repeat(np.arange(len(lengths)), lengths)[None].repeat(2, axis=0).astype(np.int32)


@pytest.mark.parametrize(
    ("segment_ids", "blind", "options"),
    [
        (runs(8, 8), [], {}),
        (np.where(np.arange(LENGTH) < 12, runs(8, 8), -1), range(12, 16), {}),
        ((runs(8, 8), runs(16)), range(8, 16), {"causal": False}),
        ((runs(8, 8), runs(10, 6)), [8, 9], {}),  # their keys come later
        ((runs(16), runs(4, 12)), range(7, 16), {"window": 4}),  # their keys are too far back
    ],
)
def test_documents_equal_those_of_xla_and_queries_that_see_no_key_give_zero(cudnn, segment_ids, blind, options):
    q, k, v, dout = arrays()

    def run(function):
        out, pullback = jax.vjp(functools.partial(function, segment_ids=segment_ids, **options), q, k, v)
        return out, *pullback(dout)

    out, *grads = run(cudnn)
    assert [t for t in range(LENGTH) if not np.any(out[:, t])] == list(blind)
    for got, want in zip((out, *grads), run(functools.partial(attention, backend="xla")), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=4e-2)
