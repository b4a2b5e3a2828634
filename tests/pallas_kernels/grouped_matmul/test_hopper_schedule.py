"""Which rows the Hopper kernels work on: every row once or with one value, and no row of another group."""

import jax
import jax.numpy as jnp
import numpy as np
from grouped_reference import bounds
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kernels.grouped_matmul import hopper_schedule as schedule

TILE, GROUPS, ROWS = 16, 5, 100  # the same shapes throughout: one compilation
ROW_TILES = jax.jit(lambda sizes: schedule.row_tiles(sizes, ROWS, TILE))
GROUP_SIZES = st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(
    lambda cuts: np.diff(np.sort([0, *cuts])).astype(np.int32)
)


@settings(max_examples=200, deadline=None)
@given(GROUP_SIZES)
def test_tiles_cover_each_group_and_nothing_else(group_sizes):
    tiles, (products, count) = (np.asarray(part) for part in ROW_TILES(group_sizes))
    assert len(tiles) >= count
    owner = np.full(ROWS, GROUPS)
    for group, (start, end) in enumerate(bounds(group_sizes)):
        owner[start:end] = group
    covered = np.zeros(ROWS, bool)
    for index, (group, row, low, high) in enumerate(tiles[:count]):
        assert 0 <= row <= ROWS - TILE
        assert 0 <= low < high <= TILE
        assert (owner[row + low : row + high] == group).all()
        assert (index < products) == (group < GROUPS)
        # Groups of a tile or more have whole tiles alone.
        assert high - low == min(TILE, (owner == group).sum())
        covered[row + low : row + high] = True
    assert covered.all()


@settings(max_examples=50, deadline=None)
@given(GROUP_SIZES)
def test_no_more_tiles_than_needed(group_sizes):
    (_, count) = np.asarray(ROW_TILES(group_sizes)[1])
    sizes = [*group_sizes, ROWS - group_sizes.sum()]
    assert count == sum(-(-size // TILE) for size in sizes)


def test_sizes_beyond_the_rows_are_cut():
    tiles, (_, count) = (np.asarray(part) for part in ROW_TILES(np.array([90, 0, 50, 7, 0], np.int32)))
    owned = {(group, row + i) for group, row, low, high in tiles[:count] for i in range(low, high)}
    assert owned == {(0, i) for i in range(90)} | {(2, i) for i in range(90, 100)}


def test_longest_group_first():
    order = np.asarray(schedule.longest_first(jnp.array([3, 0, 8, 3], jnp.int32), 14))
    np.testing.assert_array_equal(order, [[2, 3, 11], [0, 0, 3], [3, 11, 14], [1, 3, 3]])


def test_bands_visit_every_tile_once():
    rows, columns, band = 7, 3, 4
    walked = [tuple(map(int, schedule.banded(jnp.int32(i), rows, columns, band))) for i in range(rows * columns)]
    assert sorted(walked) == [(row, column) for row in range(rows) for column in range(columns)]
    assert walked[:5] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert walked[-3:] == [(4, 2), (5, 2), (6, 2)]
