"""Ranges of visible keys and of tiles, against masks written out in full."""

import attention_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import tables, target
from pallas_kernels.kernels.attention import hopper, hopper_ranges, tuning_hopper
from pallas_kernels.kernels.attention.spec import AttentionSpec

BLOCKS = (16, 8)


@st.composite
def cases(draw):
    """A spec, lengths, and segments and positions or None, as NumPy arrays."""
    batch, queries, keys = draw(st.integers(1, 2)), draw(st.integers(1, 60)), draw(st.integers(1, 60))
    window = draw(st.none() | st.tuples(st.integers(-1, 30), st.integers(-1, 30)))
    spec = AttentionSpec(draw(st.booleans()), window, None, 1.0)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    masks = [None] * 4
    positioned = draw(st.booleans())
    if not positioned and (spec.causal or window):
        keys = queries
    if draw(st.booleans()):
        masks[:2] = [segments(rng, batch, length) for length in (queries, keys)]
        if queries == keys and draw(st.booleans()):
            masks[1] = None  # those of the queries
    if positioned:
        masks[2:] = [rng.integers(0, 80, (batch, length)).astype(np.int32) for length in (queries, keys)]
    return spec, batch, queries, keys, masks


def segments(rng, batch, length):
    """Documents in order, the last positions of a row padding."""
    ids = np.sort(rng.integers(0, 4, (batch, length)), axis=1).astype(np.int32)
    ids[:, length - rng.integers(0, length // 2 + 1) :] = -1
    return ids


@settings(max_examples=60, deadline=None)
@given(cases())
def test_ranges_hold_what_is_visible(case):
    spec, batch, queries, keys, masks = case
    mask = reference.visible(spec, batch, queries, keys, *masks)
    limits = hopper_ranges.bounds(spec, queries, keys, *masks)
    seen = np.broadcast_to(_seen(limits, keys), mask.shape)
    np.testing.assert_array_equal(seen, mask)
    for of, tiles in (("q", mask), ("kv", mask.swapaxes(1, 2))):
        found = np.asarray(hopper_ranges.tile_ranges(limits, *BLOCKS, keys, of=of))
        own, other = BLOCKS if of == "q" else BLOCKS[::-1]
        assert found.shape[1] == -(-tiles.shape[1] // own)
        for row in range(batch):
            for tile, (start, full_start, full_end, end) in enumerate(found[row % len(found)]):
                assert 0 <= start <= end
                assert full_start <= full_end <= end
                part = tiles[row, tile * own : (tile + 1) * own]
                outside = np.concatenate([part[:, : start * other], part[:, end * other :]], axis=1)
                assert not outside.any()
                assert part[:, full_start * other : full_end * other].all()


def _seen(limits, keys):
    index = np.arange(keys)
    first, last = (np.asarray(x)[:, :, None] for x in (limits.first, limits.last))
    seen = (index >= first) & (index < last)
    if limits.lowest is not None:
        position = np.asarray(limits.key_positions)[:, None]
        seen = seen & (position >= np.asarray(limits.lowest)[:, :, None])
        seen = seen & (position <= np.asarray(limits.highest)[:, :, None])
    return seen


def test_nothing_is_computed_on_the_device_without_documents():
    limits = hopper_ranges.bounds(AttentionSpec(True, (40, 0), None, 1.0), 128, 128, None, None, None, None)
    ranges = hopper_ranges.tile_ranges(limits, 32, 16, 128, of="q")
    assert isinstance(ranges, np.ndarray)
    # Rows 64 to 95 see keys 24 to 95: tiles 1 to 5, of which all rows see those of 55 to 64: none in full but 3.
    assert ranges[0, 2].tolist() == [1, 6, 6, 6]
    causal = hopper_ranges.bounds(AttentionSpec(True, None, None, 1.0), 128, 128, None, None, None, None)
    assert hopper_ranges.tile_ranges(causal, 32, 16, 128, of="q")[0, 2].tolist() == [0, 0, 4, 6]
    assert hopper_ranges.tile_ranges(causal, 32, 16, 128, of="kv")[0, 2].tolist() == [1, 2, 4, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"q_shape": (1, 8, 4, 96)}, "head size 96"),
        ({"k_shape": (1, 0, 2, 64)}, "without elements"),
        ({"on": target.TPU_V5P}, "TPU v5"),
    ],
)
def test_what_is_not_supported_is_named(change, words):
    case = {
        "q_shape": (1, 8, 4, 64),
        "k_shape": (1, 8, 2, 64),
        "dtype": "bfloat16",
        "spec": AttentionSpec(True, None, None, 1.0),
        "on": target.H200,
    }
    assert hopper.supported(**case) is None
    assert words in hopper.supported(**case | change)


def test_backward_divides_heads_where_blocks_are_few():
    few, many = ((1, 4096, 16, 128), (1, 4096, 2, 128)), ((16, 4096, 16, 128), (16, 4096, 16, 128))
    assert hopper.rule("bwd", *few, cores=132).splits == 8
    assert hopper.rule("bwd", *many, cores=132).splits == 1
    for head_dim in hopper.HEAD_SIZES:
        for config in (hopper.ForwardConfig(), hopper.BackwardConfig()):
            assert config.shared_bytes(head_dim) < hopper.MOST_SHARED


def test_the_tuner_offers_what_fits_and_the_kernels_find_what_it_records(monkeypatch):
    shapes = tuning_hopper.shapes()
    keys = {tuning_hopper.shape_class(shape) for shape in shapes.values()}
    assert len(keys) == len(shapes) >= 10
    assert {"fwd/head128/causal/group8/4096", "bwd/head128/causal/group8/4096/rows2"} <= keys
    for name, shape in shapes.items():
        configs = tuning_hopper.candidates("hopper", shape)
        assert len(configs) >= 4
        assert all(config.shared_bytes(shape.size) < hopper.MOST_SHARED for config in configs)
        last = configs[-1]
        monkeypatch.setattr(
            tables,
            "lookup",
            lambda *key, want=tuning_hopper.shape_class(shape), last=last: (
                vars(last) if key == ("attention_hopper", "hopper", want) else None
            ),
        )
        _, structs = tuning_hopper.build("hopper", shape, last)
        with target.compiling_for(target.H200):
            found = hopper._config(
                name[:3], type(last), structs[0].shape, structs[1].shape, shape.spec, shape.documents > 1
            )
        assert found == last
