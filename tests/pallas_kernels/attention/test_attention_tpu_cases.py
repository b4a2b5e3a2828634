"""More cases of the TPU kernels in the interpreter."""

import numpy as np
import pytest
from attention_reference import visible
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from test_attention_tpu_kernels import SMALL, check, ids, spec
from test_block_lists import check as check_list
from test_block_lists import check_flags, make_list, make_spec

from pallas_kernels import target
from pallas_kernels.kernels.attention import tpu_backward

pytestmark = pytest.mark.exhaustive

PACKED = np.concatenate([ids((0, 130), (1, 1), (7, 69)), ids((-1, 200))])
OTHER = np.concatenate([ids((0, 20), (-1, 10), (1, 100), (3, 70)), ids((2, 200))])
ASCENDING, SHUFFLED = (x.astype(np.int32)[None] for x in (np.arange(300), np.random.default_rng(0).permutation(300)))


@pytest.mark.parametrize(
    ("shape", "case", "masks"),
    [
        ((1, 200, 200, 3, 1, 64), {"size": 64}, {}),
        ((1, 200, 200, 2, 2, 256), {"size": 256, "soft_cap": 15.0}, {}),
        ((1, 130, 300, 2, 2, 128), {"causal": False}, {}),
        ((1, 300, 300, 2, 1, 128), {"window": (70, -1), "soft_cap": 20.0}, {}),
        ((1, 300, 300, 2, 1, 128), {"causal": False, "window": (40, 9)}, {}),
        ((2, 200, 200, 2, 1, 128), {}, {"segments": (PACKED, None)}),
        ((2, 200, 200, 2, 1, 128), {"causal": False}, {"segments": (PACKED, OTHER)}),
        ((1, 300, 300, 2, 2, 128), {}, {"positions": (ASCENDING + 100, SHUFFLED)}),
        ((1, 300, 300, 2, 2, 128), {"window": (50, 3)}, {"positions": (SHUFFLED, ASCENDING)}),
        ((2, 200, 200, 2, 1, 128), {"window": (30, -1)}, {"segments": (PACKED, None)}),
        ((1, 256, 256, 32, 1, 128), {}, {}),
    ],
)
def test_masks_and_shapes(shape, case, masks):
    check(shape, spec(**case), **masks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("on", [target.TPU_V6E, target.TPU_7X], ids=["v6e", "tpu7x"])
def test_half_precision(dtype, on):
    check((1, 256, 256, 4, 2, 128), spec(), dtype=dtype, on=on)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([(128, 128), (256, 128), (128, 256)]), st.integers(1, 3))
def test_random_documents(seed, causal, blocks, groups):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(100, 400))
    packed = np.sort(rng.integers(-1, 6, (1, length))).astype(np.int32)
    sizes = {**SMALL, "block_q": blocks[0], "block_kv": blocks[1]}
    check((1, length, length, 2 * groups, groups, 128), spec(causal), (packed, packed), sizes=sizes, seed=seed)


@st.composite
def _cases(draw):
    queries = draw(st.sampled_from([1, 14]))
    own = draw(st.booleans())
    keys = queries if own else draw(st.sampled_from([9, 16]))
    window = draw(st.sampled_from([None, (0, -1), (3, 0), (5, 2), (-1, 4)]))
    spec = make_spec(draw(st.booleans()), window)
    rng = np.random.default_rng(draw(st.integers(0, 999)))

    def ids(length):
        numbers = np.sort(rng.integers(0, 5, (2, length))).astype(np.int32)
        if rng.integers(2):
            numbers[:, length - rng.integers(length) :] = -1
        return numbers

    segments = None
    if draw(st.booleans()):
        q_ids = ids(queries)
        segments = (q_ids, None if own and draw(st.booleans()) else ids(keys))
    positions = None
    if draw(st.booleans()) or (keys != queries and (spec.causal or window)):
        positions = tuple(rng.integers(0, 25, (2, n)).astype(np.int32) for n in (queries, keys))
    if not (spec.causal or window):
        positions = None
    sizes = draw(st.sampled_from([(4, 4), (4, 8)]))
    return spec, queries, keys, segments, positions, sizes


@settings(max_examples=25, deadline=None)
@given(_cases())
def test_every_visible_pair_is_in_a_listed_block(case):
    spec, queries, keys, segments, positions, sizes = case
    blocks = make_list(spec, 2, queries, keys, segments, positions, sizes)
    mask = visible(spec, 2, queries, keys, *(segments or (None, None)), *(positions or (None, None)))
    check_list(blocks, mask, sizes)
    check_flags(blocks)


def test_a_long_row_is_taken_in_spans_of_keys(monkeypatch):
    monkeypatch.setattr(tpu_backward, "keys_at_once", lambda *_: 128)
    check((1, 200, 200, 2, 1, 128), spec(window=(90, -1)))
    check((1, 200, 200, 2, 2, 128), spec(), positions=(ASCENDING[:, :200], SHUFFLED[:, :200]))


@pytest.mark.parametrize(("tile_q", "tile_kv"), [(256, 128), (128, 256)])
def test_tiles_that_are_not_square(tile_q, tile_kv):
    sizes = {"block_q": 256, "block_kv": 256, "tile_q": tile_q, "tile_kv": tile_kv, "unroll": 2}
    check((1, 300, 300, 2, 1, 128), spec(), sizes=sizes)


def test_bfloat16_in_units_of_eight_heads():
    check((1, 256, 256, 16, 2, 128), spec(), dtype="bfloat16")


def test_two_cores_have_no_races():
    packed = ids((0, 50), (2, 120), (5, 60), (-1, 26))
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    check((1, 256, 256, 16, 2, 128), spec(), (packed, packed), params=params)
    assert not interpret_pallas_call.races.races_found
