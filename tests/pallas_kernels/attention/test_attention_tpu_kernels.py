"""The TPU kernels in Pallas' interpreter against float64."""

import attention_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import target
from pallas_kernels.kernels.attention import block_lists, tpu, tpu_heads, tpu_tiles
from pallas_kernels.kernels.attention.spec import AttentionSpec

SMALL = {"block_q": 128, "block_kv": 128, "tile_q": 128, "tile_kv": 128}
TOLERANCE = {"float32": 4e-6, "bfloat16": 1.5e-2, "float16": 1.5e-3}


def check(
    shape,
    spec,
    segments=None,
    positions=None,
    dtype="float32",
    sizes=SMALL,
    params=None,
    on=target.TPU_V5P,
    seed=0,
):
    """Forward and backward against the reference; `shape` is (B, T, S, H, G, K). Errors are relative to the largest."""
    batch, queries, keys, heads, groups, size = shape
    rng = np.random.default_rng(seed)
    dims = ((batch, queries, heads, size), *((batch, keys, groups, size),) * 2, (batch, queries, heads, size))
    q, k, v, dout = (jnp.asarray(rng.normal(size=d), dtype) for d in dims)
    dlse = rng.normal(size=(batch, heads, queries))
    masks = {}
    for names, pair in (
        (("q_segments", "kv_segments"), segments),
        (("q_positions", "kv_positions"), positions),
    ):
        masks |= {name: mask for name, mask in zip(names, pair or (), strict=False) if mask is not None}
    mask = attention_reference.visible(spec, batch, queries, keys, **masks)
    out, lse, dq, dk, dv, _ = attention_reference.attention(
        *(np.asarray(x, np.float64) for x in (q, k, v)),
        mask,
        scale=spec.scale,
        soft_cap=spec.soft_cap,
        dout=np.asarray(dout, np.float64),
        dlse=dlse,
    )
    delta = np.einsum("bthk,bthk->bht", out, np.asarray(dout, np.float64)) - dlse

    @jax.jit
    def run(q, k, v, dout, delta, masks):
        own, lse = tpu.forward(q, k, v, spec=spec, config=tpu.ForwardConfig(**sizes), **masks)
        finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
        config = tpu.BackwardConfig(**sizes)
        return own, lse, *tpu.backward(q, k, v, finite, delta, dout, spec=spec, config=config, **masks)

    with target.interpreting(on, params):
        got = run(q, k, v, dout, jnp.asarray(delta, jnp.float32), {n: jnp.asarray(x) for n, x in masks.items()})
    assert (np.isneginf(got[1]) == np.isneginf(lse)).all()
    expected = (out, np.where(np.isneginf(lse), 0, lse), dq, dk, dv)
    got = (got[0], np.where(np.isneginf(lse), 0, got[1]), *got[2:])
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        assert x.shape == y.shape
        error = np.abs(np.asarray(x, np.float64) - y).max() / max(np.abs(y).max(), 1)
        assert error < TOLERANCE[dtype], name


def spec(causal=True, window=None, soft_cap=None, size=128):
    return AttentionSpec(causal, window, soft_cap, size**-0.5)


def ids(*lengths):
    """Segment ids of one row from (id, length) pairs."""
    return np.repeat([n for n, _ in lengths], [n for _, n in lengths])[None].astype(np.int32)


@pytest.mark.slow
def test_causal_grouped_with_a_short_last_block():
    check((1, 200, 200, 4, 2, 128), spec(), sizes={**SMALL, "block_q": 256, "block_kv": 256, "unroll": 2})


@pytest.mark.slow
def test_packed_documents_with_padding():
    packed = ids((0, 50), (2, 120), (5, 60), (-1, 26))
    check((1, 256, 256, 2, 1, 128), spec(), (packed, packed))


@pytest.mark.slow
def test_swapping_halves_takes_two_heads_apart_and_joins_them():
    """What the loads with a stride do with words of two heads; the interpreter itself reads heads plainly."""
    rows, heads = 64, 4
    x = jnp.arange(rows * heads * 128, dtype=jnp.uint32).reshape(rows, heads, 128) % 60000
    words = x[:, 0::2] | (x[:, 1::2] << 16)  # [rows, pairs, 128], as packed rows of a (heads, size) tile lie

    def kernel(words, out, back):
        even, odd = words[pl.ds(0, rows // 2, stride=2), 1, :], words[pl.ds(1, rows // 2, stride=2), 1, :]
        out[0], out[1] = tpu_heads.swap_halves(even, odd)
        back[0], back[1] = tpu_heads.swap_halves(out[0], out[1])

    shape = jax.ShapeDtypeStruct((2, rows // 2, 128), jnp.uint32)
    with target.interpreting(target.TPU_V5P):
        apart, back = pl.pallas_call(kernel, out_shape=(shape, shape))(words)
    for n in range(2):  # a packed register of one head holds positions 2i and 2i + 1 in word i
        assert (apart[n] & 0xFFFF == x[0::2, 2 + n]).all()
        assert (apart[n] >> 16 == x[1::2, 2 + n]).all()
        assert (back[n] == words[n::2, 1]).all()


@pytest.mark.parametrize(
    ("heads", "groups", "size", "dtype", "block", "kv_block", "direct"),
    [
        (16, 2, 128, "bfloat16", 8, 2, (True, True)),
        (16, 16, 128, "float32", 8, 8, (True, True)),
        (32, 4, 128, "bfloat16", 8, 4, (True, True)),
        (4, 1, 128, "bfloat16", 4, 1, (True, False)),
        (3, 1, 128, "bfloat16", 3, 1, (False, False)),
        (24, 8, 128, "bfloat16", 6, 8, (False, True)),
        (16, 2, 64, "bfloat16", 8, 2, (False, False)),
        (7, 1, 64, "bfloat16", 7, 1, (False, False)),
        (16, 2, 256, "bfloat16", 8, 1, (False, False)),
    ],
)
def test_units_share_blocks_of_key_heads(heads, groups, size, dtype, block, kv_block, direct):
    units = tpu_heads.units(heads, groups, size, jnp.dtype(dtype))
    assert (units.q.block, units.kv.block) == (block, kv_block)
    assert (units.q.direct, units.kv.direct) == direct
    for unit in range(units.count):
        first = unit * units.q.block // units.ratio
        last = ((unit + 1) * units.q.block - 1) // units.ratio
        assert first // units.kv.block == last // units.kv.block == units.kv_block(unit)
        assert last - first + 1 == units.kv_heads


@pytest.mark.parametrize("tile_q", [2, 4, 8])
@pytest.mark.parametrize("tile_kv", [2, 4, 8])
def test_tiles_of_a_diagonal_block_cover_what_is_visible_and_mask_what_is_not(tile_q, tile_kv):
    covered, plain = np.zeros((8, 8), int), np.zeros((8, 8), bool)
    found = tpu_tiles.tiles(block_lists.DIAGONAL, 8, 8, tile_q, tile_kv, False)
    for tile in found:
        covered[tile.queries, tile.keys] += 1
        plain[tile.queries, tile.keys] |= not tile.masked
    causal = np.tri(8, dtype=bool)
    assert (covered[causal] == 1).all()
    assert not plain[~causal].any()
    assert all(causal[tile.queries, tile.keys].any() for tile in found)
    assert all(t.masked for t in tpu_tiles.tiles(block_lists.DIAGONAL, 8, 8, tile_q, tile_kv, True))


def test_what_is_not_supported_is_said():
    shape = (1, 256, 4, 128)
    assert tpu.supported(shape, shape, jnp.bfloat16, spec(), target.TPU_V5P) is None
    assert "head size 96" in tpu.supported((1, 256, 4, 96), (1, 256, 4, 96), jnp.bfloat16, spec(), target.TPU_V5P)
    assert "float64" in tpu.supported(shape, shape, jnp.float64, spec(), target.TPU_V5P)
    assert "NVIDIA" in tpu.supported(shape, shape, jnp.bfloat16, spec(), target.H200)
    assert "without elements" in tpu.supported((0, *shape[1:]), (0, *shape[1:]), jnp.bfloat16, spec(), target.TPU_V5P)
    long = (1, 1 << 20, 4, 128)
    assert "blocks of scores" in tpu.supported(long, long, jnp.bfloat16, spec(), target.TPU_V5P)


@pytest.mark.parametrize("kind", [tpu.ForwardConfig, tpu.BackwardConfig])
@pytest.mark.parametrize(("length", "size", "dtype"), [(80, 128, "bfloat16"), (5000, 256, "float32")])
def test_blocks_are_cut_to_arrays_and_memory(kind, length, size, dtype):
    q = jax.ShapeDtypeStruct((1, length, 16, size), dtype)
    with target.compiling_for(target.TPU_V5P):
        config = tpu.fitted(kind(), q, q)
        assert tpu.vmem_bytes(config, q, q) <= 56 * 2**20
    assert config.block_q == config.block_kv <= -(-length // 128) * 128
    assert config.block_q % 128 == config.block_q % config.tile_q == config.block_kv % config.tile_kv == 0
