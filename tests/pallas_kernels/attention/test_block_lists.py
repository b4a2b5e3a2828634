"""Lists of blocks against the mask they stand for, written out in full."""

import numpy as np
import pytest
from attention_reference import visible

from pallas_kernels.kernels.attention import block_lists
from pallas_kernels.kernels.attention.spec import AttentionSpec

BLOCK = 4


def make_spec(causal=True, window=None):
    return AttentionSpec(causal=causal, window=window, soft_cap=None, scale=1.0)


def make_list(spec, batch, queries, keys, segments=None, positions=None, sizes=(BLOCK, BLOCK), **options):
    q_ids, k_ids = segments or (None, None)
    first, last = block_lists.intervals(spec, batch, queries, keys, q_ids, k_ids, positions is not None)
    return block_lists.block_list(spec, first, last, keys, *sizes, positions=positions, **options)


def entries(blocks):
    count = int(blocks.count)
    assert count <= len(blocks.rows)
    rows, cols, flags = (np.asarray(x)[:count].tolist() for x in (blocks.rows, blocks.cols, blocks.flags))
    return [(row, col, flag & 7, flag & ~7) for row, col, flag in zip(rows, cols, flags, strict=True)]


def check(blocks, mask, sizes=(BLOCK, BLOCK), exact=False):
    """Every block of `mask` is listed as what it is; `exact`: none is listed that has nothing visible."""
    batch, queries, keys = mask.shape
    per_row = blocks.rows_per_batch
    padded = np.pad(mask, ((0, 0), (0, -queries % sizes[0]), (0, -keys % sizes[1])))
    found = {}
    for row, col, kind, _ in entries(blocks):
        assert kind in blocks.kinds
        found[row // per_row, row % per_row, col] = kind
    assert list(found) == sorted(found)
    for b, i, j in np.ndindex(batch, padded.shape[1] // sizes[0], padded.shape[2] // sizes[1]):
        part = padded[b, i * sizes[0] : (i + 1) * sizes[0], j * sizes[1] : (j + 1) * sizes[1]]
        kind = found.get((b, i, j), block_lists.EMPTY)
        inside = part[: queries - i * sizes[0]]
        if part.any():
            assert kind != block_lists.EMPTY, (b, i, j)
        elif exact:
            assert kind == block_lists.EMPTY, (b, i, j)
        if kind == block_lists.FULL:
            assert inside.all(), (b, i, j)
        if kind == block_lists.DIAGONAL:
            assert not np.triu(part, 1).any(), (b, i, j)


def check_flags(blocks):
    """FIRST and LAST enclose the entries of each block of queries; a row of the batch starts with its first."""
    listed = entries(blocks)
    for at, (row, _, kind, flags) in enumerate(listed):
        if kind == block_lists.FLUSH:
            assert flags == 0
            continue
        before, after = listed[at - 1][0] if at else None, listed[at + 1][0] if at + 1 < len(listed) else None
        assert bool(flags & block_lists.FIRST) == (before != row)
        assert bool(flags & block_lists.LAST) == (after != row)
        starts = row % blocks.rows_per_batch == 0 and before != row
        assert bool(flags & block_lists.FIRST_OF_ROW) == starts


def test_a_causal_mask_is_known_at_trace_time_and_needs_no_bounds():
    blocks = make_list(make_spec(), 1, 12, 12)
    assert blocks.bounds is None
    assert isinstance(blocks.count, int)
    kinds = [(row, col, kind) for row, col, kind, _ in entries(blocks)]
    full, diagonal = block_lists.FULL, block_lists.DIAGONAL
    expected = [(0, 0, diagonal), (1, 0, full), (1, 1, diagonal), (2, 0, full), (2, 1, full), (2, 2, diagonal)]
    assert kinds == expected


@pytest.mark.slow
def test_documents_leave_only_the_blocks_they_share():
    ids = np.array([[0] * 6 + [1] * 2 + [4] * 8, [-1] * 4 + [0] * 12], np.int32)
    blocks = make_list(make_spec(), 2, 16, 16, (ids, None))
    mask = visible(make_spec(), 2, 16, 16, ids, ids)
    check(blocks, mask, exact=True)
    check_flags(blocks)
    # Two blocks for the document across the first border; nothing of another document; padding keeps one EMPTY entry.
    assert len(entries(blocks)) == 1 + 2 + 1 + 2 + 1 + 1 + 2 + 3


def test_flush_entries_end_each_row_of_the_batch():
    blocks = make_list(make_spec(), 2, 8, 8, flush=True)
    kinds = [kind for _, _, kind, _ in entries(blocks)]
    flush, full, diagonal = block_lists.FLUSH, block_lists.FULL, block_lists.DIAGONAL
    assert kinds == [diagonal, full, diagonal, flush, flush] * 2
    check_flags(blocks)


@pytest.mark.parametrize("offset", [0, 8])
def test_a_part_of_the_keys_is_listed_from_its_own_start(offset):
    spec = make_spec(window=(6, -1))
    first, last = block_lists.intervals(spec, 1, 16, 16, None, None, False)
    blocks = block_lists.block_list(spec, first, last, 8, BLOCK, BLOCK, key_offset=offset)
    check(blocks, visible(spec, 1, 16, 16)[:, :, offset : offset + 8], exact=True)
    inside = np.asarray(blocks.bounds)[0] + offset
    assert (inside[0] == np.maximum(np.arange(16) - 6, 0)).all()
