"""The public attention function on its reference backend: numbers, gradients, transformations, meshes, bad input."""

import functools
import subprocess
import sys
import textwrap

import attention_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pallas_kernels
from pallas_kernels import supported, target
from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.attention import RESIDUAL, AttentionSpec, api, attention
from pallas_kernels.kernels.attention.xla import _chunks


def inputs(length=40, keys=None, heads=4, groups=2, size=8, batch=2, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, length, heads, size), *((batch, keys or length, groups, size),) * 2)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def documents(batch, length, seed=0, padding=0):
    """Segment ids of a few documents a row, empty ones among them, and `padding` places at the end."""
    rng = np.random.default_rng(seed)
    borders = np.sort(rng.integers(0, length, (batch, 3)), axis=1)
    ids = (np.arange(length)[None, :, None] >= borders[:, None]).sum(-1)
    ids[:, length - padding :] = -1
    return jnp.asarray(ids)


def pull(function, *arrays):
    """Values and gradients of an attention (out, lse), under cotangents that are drawn at random."""

    @jax.jit
    def run(*arrays):
        out, pullback = jax.vjp(function, *arrays)
        cotangents = [jax.random.normal(jax.random.key(i), x.shape, jnp.float32) for i, x in enumerate(out)]
        cotangents = [c.astype(x.dtype) for c, x in zip(cotangents, out, strict=True)]
        cotangents[1] = jnp.where(jnp.isfinite(out[1]), cotangents[1], 0)
        return *out, *pullback(tuple(cotangents)), *cotangents

    return [np.asarray(x, np.float64) for x in run(*arrays)]


CASES = [
    {"causal": True},
    {"causal": False, "window": (5, 2)},
    {"causal": True, "window": 7, "soft_cap": 2.0},
    {"causal": False, "soft_cap": 1.5, "scale": 0.7},
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_all_gradients_equal_the_reference(case, packed):
    q, k, v = inputs()
    sinks = jnp.asarray([-1.0, 0.0, 0.5, 2.0])
    ids = documents(2, 40, padding=4) if packed else None
    got = pull(lambda q, k, v, s: attention(q, k, v, sinks=s, segment_ids=ids, return_lse=True, **case), q, k, v, sinks)
    window = {None: None, 7: (6, -1), (5, 2): (5, 2)}[case.get("window")]
    spec = AttentionSpec(case["causal"], window, case.get("soft_cap"), case.get("scale", 8**-0.5))
    mask = attention_reference.visible(spec, 2, 40, 40, ids, ids)
    options = {"scale": spec.scale, "soft_cap": spec.soft_cap, "sinks": np.asarray(sinks)}
    want = attention_reference.attention(q, k, v, mask, dout=got[-2], dlse=got[-1], **options)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, want, strict=False):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5, err_msg=name)


# 300 queries are three chunks: of all keys, of those up to the diagonal, of those that a window reaches.
CHUNKED = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "ahead": {"causal": False, "window": (-1, 4)},
    "wide": {"causal": False, "window": (1000, 1000)},
    "moved": {"causal": True, "positions": True},
}


def equals_the_reference(length, case, heads, seed):
    """Values and gradients in one row of documents; `positions`: given ones, which leave gaps."""
    q, k, v = inputs(length, heads=heads[0], groups=heads[1], size=4, batch=1, seed=seed)
    ids, at = documents(1, length, seed), None
    case = dict(case)
    if case.pop("positions", False):
        at = jnp.asarray(np.sort(np.random.default_rng(seed).permutation(2 * length)[:length]))[None]
    got = pull(
        lambda q, k, v: attention(q, k, v, segment_ids=ids, positions=at, return_lse=True, **case, backend="xla"),
        q,
        k,
        v,
    )
    window = case.get("window")
    pair = window if window is None or isinstance(window, tuple) else (window - 1, -1 if case["causal"] else window - 1)
    mask = attention_reference.visible(
        AttentionSpec(case["causal"], pair, None, 0.5), 1, length, length, ids, ids, at, at
    )
    want = attention_reference.attention(q, k, v, mask, scale=0.5, dout=got[-2], dlse=got[-1])
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=False):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CHUNKED.values(), ids=CHUNKED)
def test_gradients_of_keys_are_summed_over_all_chunks_of_queries(case):
    equals_the_reference(300, case, (2, 1), 0)


@pytest.mark.exhaustive
@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 300),
    st.sampled_from([(1, 1), (4, 1), (4, 4), (6, 3)]),
    st.sampled_from([None, 1, 100, (3, 0), (0, 4), (-1, 2)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_any_shape_and_mask(length, heads, window, causal, moved, seed):
    equals_the_reference(length, {"causal": causal, "window": window, "positions": moved}, heads, seed)


def test_queries_that_see_nothing_give_zero_and_no_gradient():
    q, k, v = inputs()
    got = pull(lambda *x: attention(*x, segment_ids=jnp.full((2, 40), -1), return_lse=True), q, k, v)
    assert np.isneginf(got[1]).all()
    for index in (0, 2, 3, 4):
        assert (got[index] == 0).all()


def test_a_sink_of_no_weight_changes_nothing_even_for_queries_that_see_nothing():
    q, k, v = inputs()
    ids = documents(2, 40, padding=4)
    sinks = jnp.asarray([-jnp.inf, 0.5, -jnp.inf, -jnp.inf])
    got = pull(lambda q, k, v, s: attention(q, k, v, sinks=s, segment_ids=ids, return_lse=True), q, k, v, sinks)
    mask = attention_reference.visible(AttentionSpec(True, None, None, 1.0), 2, 40, 40, ids, ids)
    finite = np.where(np.isinf(sinks), -1e5, sinks)
    want = list(attention_reference.attention(q, k, v, mask, scale=8**-0.5, sinks=finite, dout=got[-2], dlse=got[-1]))
    want[1][want[1] < -9e4] = -np.inf
    assert np.isneginf(got[1]).any()
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=False):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5, err_msg=name)
    assert np.isfinite(got[5]).all()
    np.testing.assert_allclose(got[5][1], want[5][1], rtol=2e-5)


@pytest.mark.slow
def test_parts_merge_where_padding_sees_none_of_them():
    q, k, v = inputs()
    ids, where = documents(2, 40, padding=4), jnp.tile(jnp.arange(40), (2, 1))

    def merged(q, k, v):
        options = {"return_lse": True}
        parts = [
            attention(
                q, k[:, part], v[:, part], segment_ids=(ids, ids[:, part]), positions=(where, where[:, part]), **options
            )
            for part in (slice(0, 24), slice(24, 40))
        ]
        outs, lses = map(jnp.stack, zip(*parts, strict=True))
        shares = jax.nn.softmax(jnp.maximum(lses, -1e30), axis=0)
        return jnp.einsum("pbthk,pbht->bthk", outs, shares)

    def run(function):
        def loss(*arrays):
            out = function(*arrays)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    def whole(q, k, v):
        return attention(q, k, v, segment_ids=ids)

    got, want = (run(function) for function in (merged, whole))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


EMPTY = {"batch": {"batch": 0}, "sequence": {"length": 0}, "queries": {"length": 0, "keys": 7}, "heads": {"heads": 0}}


@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
def test_arrays_without_elements_give_the_like(sizes):
    q, k, v = inputs(**sizes)
    options = {"causal": False, "return_lse": True, "sinks": jnp.ones(q.shape[2])}
    out, lse, *gradients = pull(lambda *x: attention(*x, **options), q, k, v)[:5]
    assert out.shape == q.shape
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    for gradient, x in zip(gradients, (q, k, v), strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("on", [target.TPU_V5P, target.H200], ids=["tpu", "hopper"])
def test_without_keys_every_query_sees_nothing(on):
    q, k, v = inputs(5)
    k, v = k[:, :0], v[:, :0]
    got = pull(lambda *x: attention(*x, causal=False, return_lse=True), q, k, v)
    assert (got[0] == 0).all()
    assert np.isneginf(got[1]).all()
    assert (got[2] == 0).all()
    assert got[3].shape == k.shape
    with target.compiling_for(on):
        halves = [x.astype(jnp.bfloat16) for x in inputs(5, size=64)]
        assert supported(attention, halves[0], halves[1][:, :0], halves[2][:, :0], causal=False).endswith("elements")
        assert attention(*(x[:0] for x in halves)).shape == (0, 5, 4, 64)  # auto runs XLA


def test_without_rows_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    data = PartitionSpec("data")

    def loss(*x):
        run = jax.shard_map(lambda *x: attention(*x), mesh=mesh, in_specs=data, out_specs=data)
        return run(*x).sum()

    assert jax.jit(jax.grad(loss))(*inputs(5, batch=0)).shape == (0, 5, 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 0.02), (jnp.float16, 0.004)])
def test_16_bit_stays_within_its_rounding(dtype, tolerance):
    q, k, v = inputs(140, heads=4, groups=4, size=64, dtype=dtype)
    got = pull(lambda *x: attention(*x, return_lse=True), q, k, v)
    mask = attention_reference.visible(AttentionSpec(True, None, None, 0.125), 2, 140, 140)
    want = attention_reference.attention(q, k, v, mask, scale=0.125, dout=got[-2], dlse=got[-1])
    for a, b in zip(got[:5], want, strict=False):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.slow
def test_parts_of_a_sequence_merge_through_positions_and_log_sum_exp():
    """As ring attention does: keys in two shards, the partial results merged by their log-sum-exp."""
    q, k, v = inputs()
    where = jnp.tile(jnp.arange(40), (2, 1))

    def merged(q, k, v):
        parts = []
        for keys in (slice(0, 24), slice(24, 40)):
            options = {"positions": (where, where[:, keys]), "return_lse": True}
            parts.append(attention(q, k[:, keys], v[:, keys], **options))
        lse = jnp.logaddexp(parts[0][1], parts[1][1])
        out = sum(part * jnp.exp(own - lse).transpose(0, 2, 1)[..., None] for part, own in parts)
        return out, lse

    for a, b in zip(pull(merged, q, k, v), pull(lambda *x: attention(*x, return_lse=True), q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_vmap_equals_a_loop():
    q, k, v = (jnp.stack([x, 2 * x, -x]) for x in inputs(12))
    ids = jnp.stack([documents(2, 12, seed) for seed in range(3)])
    one = jax.jit(lambda *x: attention(*x[:3], segment_ids=x[3]))
    mapped = jax.jit(jax.vmap(one))(q, k, v, ids)
    looped = jnp.stack([one(*x) for x in zip(q, k, v, ids, strict=True)])
    np.testing.assert_allclose(mapped, looped, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [AxisType.Explicit, AxisType.Auto])
def test_divided_over_batch_and_heads(axes):
    q, k, v = inputs(12, heads=8, groups=2, batch=4)
    ids = documents(4, 12)

    def run(q, k, v, ids):
        return pull(lambda *x: attention(*x, segment_ids=ids, return_lse=True), q, k, v)

    want = run(q, k, v, ids)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axes,) * 2)
    with jax.set_mesh(mesh):
        heads, rows = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data", None, "tensor"), ("data",)))
        arrays = [jax.device_put(x, s) for x, s in zip((q, k, v, ids), (heads,) * 3 + (rows,), strict=True)]
        out = jax.jit(lambda *x: attention(*x[:3], segment_ids=x[3]))(*arrays)
        assert out.sharding.is_equivalent_to(heads, 4)
        grads = jax.jit(jax.grad(lambda *x: jnp.square(attention(*x[:3], segment_ids=x[3])).sum(), (0, 1, 2)))(*arrays)
    np.testing.assert_allclose(out, want[0], atol=1e-6)
    want = jax.jit(jax.grad(lambda *x: jnp.square(attention(*x, segment_ids=ids)).sum(), (0, 1, 2)))(q, k, v)
    for got, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [AxisType.Explicit, AxisType.Auto])
def test_one_key_head_serves_query_heads_that_are_divided(axes):
    q, k, v = inputs(12, heads=8, groups=1, batch=4)

    def loss(*x):
        out, lse = attention(*x, return_lse=True)
        return (jnp.sin(out).sum() + jnp.cos(lse).sum()), out

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, want), gradients = jax.jit(run)(q, k, v)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(axes,) * 2)
    with jax.set_mesh(mesh):
        heads, whole = (NamedSharding(mesh, PartitionSpec("data", *rest)) for rest in ((None, "tensor"), ()))
        arrays = [jax.device_put(x, s) for x, s in zip((q, k, v), (heads, whole, whole), strict=True)]
        (_, got), found = jax.jit(run)(*arrays)
        assert got.sharding.is_equivalent_to(heads, 4)
    for a, b in zip((got, *found), (want, *gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_key_heads_that_devices_cannot_share_are_named_with_a_remedy():
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Explicit,))
    q, k, v = inputs(12, heads=8, groups=2)
    with jax.set_mesh(mesh):
        heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
        with pytest.raises(ArgumentError, match=r"`k` has 2 heads.*4 devices.*jnp.repeat\(k, 2, axis=2\)"):
            attention(jax.device_put(q, heads), k, v)
        got = jax.jit(attention)(
            *(jax.device_put(x, heads) for x in (q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)))
        )
    np.testing.assert_allclose(got, jax.jit(attention)(q, k, v), atol=1e-6)


def test_an_explicitly_divided_sequence_is_refused():
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Explicit,))
    q, k, v = inputs(16)
    with jax.set_mesh(mesh), pytest.raises(ArgumentError, match=r"divided along `t`.*reshard"):
        attention(jax.device_put(q, NamedSharding(mesh, PartitionSpec(None, "context"))), k, v)


@pytest.mark.slow
def test_inside_shard_map_gradients_of_a_replicated_key_are_summed():
    q, k, v = inputs(12, batch=4)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def loss(q, k, v):
        def local(q, k, v):
            k, v = (jnp.broadcast_to(x, (len(q), *x.shape)) for x in (k, v))
            return jax.lax.psum(jnp.square(attention(q, k, v)).sum(), "data")

        data, whole = PartitionSpec("data"), PartitionSpec()
        return jax.shard_map(local, mesh=mesh, in_specs=(data, whole, whole), out_specs=whole)(q, k, v)

    def plain(q, k, v):
        return jnp.square(attention(q, *(jnp.broadcast_to(x, (4, *x.shape)) for x in (k, v)))).sum()

    got, want = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k[0], v[0]) for f in (loss, plain))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_remat_policy_keeps_the_output_and_the_forward_pass_is_not_run_again():
    q, k, v = inputs(12)

    def exponentials(policy):
        f = jax.checkpoint(lambda *x: jnp.square(attention(*x)).sum(), policy=policy)
        text = str(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(q, k, v))
        return text.count(" exp ")

    kept = exponentials(jax.checkpoint_policies.save_only_these_names(RESIDUAL))
    assert kept < exponentials(jax.checkpoint_policies.nothing_saveable)


def test_chunks_cover_every_query_once_and_are_few():
    spec = AttentionSpec(True, (50, -1), None, 1.0)
    for length in (1, 128, 129, 512, 4096, 100_000):
        chunks = _chunks(spec, length, length, moved=False)
        assert [rows.start for rows, _ in chunks] == [0, *(rows.stop for rows, _ in chunks[:-1])]
        assert chunks[-1][0].stop == length
        assert len(chunks) <= 16
        for rows, keys in chunks:
            assert keys == slice(max(0, rows.start - 50), rows.stop)


def test_scores_that_nobody_sees_are_not_computed():
    """10 of 16 blocks for a causal mask at four chunks, 7 of them in a window of one chunk."""
    q, k, v = inputs(512, heads=1, groups=1, batch=1)

    def flops(**options):
        return jax.jit(lambda *x: attention(*x, **options)).lower(q, k, v).cost_analysis()["flops"]

    whole = 2 * 2 * 512 * 512 * q.shape[-1] + 20 * 512 * 512  # the softmax is a few FLOPs a score
    assert flops() < whole * 10 / 16
    assert flops(window=129) < whole * 7 / 16


@pytest.mark.parametrize("device", [target.TPU_V6E, target.H200], ids=["TPU", "Hopper"])
def test_documents_take_no_comparison_of_all_queries_with_all_keys(device):
    """Neither forward nor backward; the length is no block's and no head's."""
    length = 1088
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16) for heads in (2, 1))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, ids):
        return jnp.sum(attention(q, k, k, segment_ids=ids, backend="pallas").astype(jnp.float32))

    with target.compiling_for(device):
        program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(q, k, ids))
    assert f"[1,{length}]" in program
    assert f"{length},{length}]" not in program


@pytest.mark.parametrize("window", [(-1, 2**31 - 1), (2**40, 3), (2**31 - 1, -1), 2**31 - 1])
def test_a_window_beyond_int32_has_no_bound(window):
    q, k, v = inputs(12)
    sides = [-1 if side > 2**30 else side for side in (window if isinstance(window, tuple) else (window, window))]
    found = attention(q, k, v, causal=False, window=window)
    np.testing.assert_array_equal(found, attention(q, k, v, causal=False, window=tuple(sides)))


def test_documents_and_positions_of_lists():
    q, k, v = inputs(12, batch=1)
    ids, at = [[0] * 5 + [1] * 7], [list(range(12))]
    wanted = attention(q, k, v, segment_ids=np.int32(ids), positions=np.int32(at))
    np.testing.assert_array_equal(attention(q, k, v, segment_ids=ids, positions=at), wanted)


IDS = np.zeros((2, 12), np.int32)
BAD = [
    ({"q": (2, 12, 4)}, "`q` has shape"),
    ({"k": (2, 12, 3, 8), "v": (2, 12, 3, 8)}, "`k` has 3 heads, which do not divide the 4 of q"),
    ({"k": (2, 12, 2, 16), "v": (2, 12, 2, 16)}, "`k` has shape .* does not fit q"),
    ({"v": (2, 11, 2, 8)}, "`v` has shape"),
    ({"window": -3}, "`window` is -3"),
    ({"window": (1, -2)}, "`window` is"),
    ({"soft_cap": -1.0}, "`soft_cap` is -1.0"),
    ({"segment_ids": np.array([[0, 1, 0] * 4] * 2)}, "`segment_ids` decrease in row 0"),
    ({"segment_ids": np.array([[0] * 12, [0, 1, -1, 1] * 3])}, "`segment_ids` decrease in row 1"),
    ({"segment_ids": np.array([[0] * 12, [0, 1, -1, 1] + [2] * 8])}, "`segment_ids` have padding within .* of row 1"),
    ({"segment_ids": np.zeros((2, 11), int)}, r"`segment_ids` has int32\[2, 11\]"),
    ({"segment_ids": np.full((2, 12), 3_000_000_000)}, "`segment_ids` has values from 3000000000"),
    ({"positions": np.full((2, 12), 2**30)}, "`positions` go from 1073741824"),
    ({"segment_ids": np.zeros((2, 12))}, "`segment_ids` has float64"),
    ({"k": (2, 9, 2, 8), "v": (2, 9, 2, 8)}, "`positions` is None"),
    ({"sinks": np.zeros(3)}, "`sinks` has shape"),
    ({"sinks": [0.0, 1.0]}, "`sinks` has shape"),
    ({"sinks": [None] * 4}, "`sinks` is list"),
    ({"sinks": np.zeros(4, bool)}, "`sinks` is bool"),
    ({"window": 2.5}, "`window` is 2.5"),
    ({"window": (1, 2.5)}, "`window` is 2.5"),
    ({"window": (1, 2, 3)}, "`window` is"),
    ({"window": True}, "`window` is True"),
    ({"causal": 2.0}, "`causal` is 2.0"),
    ({"return_lse": "yes"}, "`return_lse` is 'yes'"),
    ({"scale": "1"}, "`scale` is '1'"),
    ({"scale": np.inf}, "`scale` is inf"),
    ({"soft_cap": np.zeros(2)}, "`soft_cap` is array"),
    ({"segment_ids": (IDS, IDS, IDS)}, "`segment_ids` has 3 parts"),
    ({"segment_ids": (IDS, None)}, "`segment_ids` is NoneType"),
    ({"segment_ids": [IDS, IDS]}, r"`segment_ids` has int32\[2, 2, 12\]"),
    ({"positions": (IDS,)}, "`positions` has 1 parts"),
    ({"positions": (None, IDS)}, "`positions` is NoneType"),
    ({"config": 3}, "`config` is 3"),
    ({"config": (None, None), "backend": "xla"}, '`config` is given with backend="xla"'),
    ({"q": (2, 12, 4, 0), "k": (2, 12, 2, 0), "v": (2, 12, 2, 0)}, "`q` has shape"),
    ({"backend": "cuda"}, "`backend` is 'cuda'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_named(change, message):
    arrays = {"q": (2, 12, 4, 8), "k": (2, 12, 2, 8), "v": (2, 12, 2, 8)}
    options = {name: value for name, value in change.items() if name not in arrays}
    arrays |= {name: value for name, value in change.items() if name in arrays}
    with pytest.raises(ArgumentError, match=message):
        attention(*(jnp.zeros(shape) for shape in arrays.values()), **options)


def test_what_is_no_array_is_named():
    with pytest.raises(ArgumentError, match="`q` is list"):
        attention([[1.0]], *inputs(12)[1:])


@pytest.mark.parametrize("name", ["scale", "soft_cap", "window", "causal", "return_lse"])
def test_what_kernels_are_compiled_for_cannot_be_traced(name):
    q, k, v = inputs(12)
    with pytest.raises(ArgumentError, match=f"`{name}` is traced"):
        jax.jit(lambda x: attention(q, k, v, **{name: x}))(1)


@pytest.mark.slow
def test_scalars_and_sequences_of_numpy_are_as_good_as_those_of_python():
    q, k, v = inputs(12)

    def run(q, k, v, **options):
        return jax.jit(functools.partial(attention, **options))(q, k, v)

    plain = run(q, k, v, causal=True, window=2, scale=0.5, soft_cap=3.0, sinks=jnp.arange(4.0))
    scalars = {"causal": np.bool_(True), "scale": np.float32(0.5), "soft_cap": np.int64(3)}
    for window in (np.int64(2), (np.int32(1), -1), [1, -1]):
        np.testing.assert_array_equal(run(q, k, v, window=window, sinks=[0, 1, 2, 3], **scalars), plain)
    arrays = (np.asarray(x) for x in (q, k, v))
    assert supported(attention, q, k, v, window=np.int64(2), backend="xla", **scalars) is None
    np.testing.assert_allclose(attention(*arrays, window=2, sinks=np.arange(4), **scalars), plain, atol=1e-6)


def test_block_sizes_are_those_of_the_kernel_that_runs():
    q, k, v = (jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16),) * 3
    of_tpu = (pallas_kernels.TpuAttentionForwardConfig(tile_q=256), None)
    of_hopper = (pallas_kernels.HopperAttentionForwardConfig(), pallas_kernels.HopperAttentionBackwardConfig())
    with target.compiling_for(target.TPU_V5P):
        assert supported(attention, q, k, v, config=of_tpu) is None
        with pytest.raises(ArgumentError, match=r"has HopperAttentionForwardConfig; give pallas_kernels.TpuAttentionF"):
            supported(attention, q, k, v, config=of_hopper)
        with pytest.raises(ArgumentError, match=r"`config` has .*ForwardConfig; give .*BackwardConfig"):
            supported(attention, q, k, v, config=of_tpu[::-1])
    arrays = [x.astype(jnp.bfloat16) for x in inputs(12)]
    assert attention(*arrays, config=of_tpu).shape == arrays[0].shape  # on this CPU auto runs XLA


def test_generations_without_kernels_are_named_and_run_xla():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(12, size=64))
    for on in (target.Target("tpu", "TPU v4", cores=2), target.Target("gpu", "NVIDIA A100")):
        with target.compiling_for(on):
            assert supported(attention, q, k, v) == f"there is no kernel for {on.device_kind}"
            assert jax.eval_shape(functools.partial(attention, return_lse=True), q, k, v)[0].shape == q.shape


@pytest.mark.slow
def test_without_absl_hopper_runs_xla():
    """In a process of its own: an import that has been made cannot be taken back."""
    code = """
        import sys
        sys.modules["absl"] = None
        import jax, pallas_kernels as kernels
        from pallas_kernels import target
        x = jax.ShapeDtypeStruct((1, 64, 2, 64), "bfloat16")
        with target.compiling_for(target.H200):
            print(kernels.supported(kernels.attention, x, x, x))
            print(jax.eval_shape(lambda x: kernels.attention(x, x, x, return_lse=True), x)[0].shape)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["absl-py is not installed, which Mosaic GPU needs", "(1, 64, 2, 64)"], (
        done.stderr
    )


def test_cudnn_is_asked_for_through_the_function_that_needs_it(monkeypatch):
    def answers(error):
        def dot_product_attention(*_, implementation):
            assert implementation == "cudnn"
            if error:
                raise error

        monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
        return api._cudnn_found.__wrapped__()

    assert not api._cudnn_found()
    assert answers(None)
    assert not answers(RuntimeError("cuDNN is not detected."))


def test_a_named_backend_that_cannot_says_why(monkeypatch):
    q, k, v = inputs(12)
    with pytest.raises(UnsupportedError, match='backend="pallas" does not take this case: there is no kernel for cpu'):
        attention(q, k, v, backend="pallas")
    with pytest.raises(UnsupportedError, match="cuDNN does not run on cpu"):
        attention(q, k, v, backend="cudnn")
    with target.compiling_for(target.H200):
        assert supported(attention, q, k, v, backend="cudnn") == "jax finds no cuDNN"
        monkeypatch.setattr(api, "_cudnn_found", lambda: True)
        assert "float32" in supported(attention, q, k, v, backend="cudnn")
        q, k, v = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (q, k, v))
        assert "window" in supported(attention, q, k, v, window=(1, 1), causal=False, backend="cudnn")
