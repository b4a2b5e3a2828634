"""Series against plain loops."""

import numpy as np
import pytest

from davinci_jax.science.report import series


def _plain_smooth(values, groups, window):
    result = []
    for n in range(len(values)):
        first = n
        while first and groups[first - 1] == groups[n]:
            first -= 1
        last = n
        while last + 1 < len(values) and groups[last + 1] == groups[n]:
            last += 1
        half = min(window // 2, n - first, last - n)
        known = [v for v in values[n - half : n + half + 1] if np.isfinite(v)]
        result.append(sum(known) / len(known) if known else np.nan)
    return np.array(result)


@pytest.mark.parametrize("window", [1, 2, 5, 9, 100])
def test_smooth_is_the_centred_mean_inside_a_stage(window):
    rng = np.random.default_rng(0)
    values = rng.normal(size=60)
    values[rng.random(60) < 0.3] = np.nan
    groups = np.repeat([0, 1, 0, 2], [1, 20, 30, 9])
    np.testing.assert_allclose(series.smooth(values, groups, window), _plain_smooth(values, groups, window), rtol=1e-12)


def test_smooth_keeps_a_slope_and_does_not_look_across_a_border():
    values = np.concatenate([np.arange(20.0), np.full(20, 100.0)])
    groups = np.repeat([0, 1], 20)
    np.testing.assert_allclose(series.smooth(values, groups, 7), values, rtol=1e-12)


def test_extremes_keep_a_spike_of_one_point():
    rng = np.random.default_rng(1)
    x, y = np.arange(100_000.0), rng.normal(size=100_000)
    y[54_321], y[77_777] = 1e3, np.nan
    thin_x, thin_y = series.extremes(x, y, bins=300)
    assert len(thin_x) <= 600
    assert thin_y[thin_x == 54_321] == 1e3
    assert np.nanmin(thin_y) == np.nanmin(y)
    assert (np.diff(thin_x) > 0).all()
    assert np.isin(thin_x, x).all()


def test_means_are_those_of_the_bins():
    x, y = np.arange(1000.0), np.stack([np.arange(1000.0) ** 2, np.full(1000, np.nan)])
    y[0, 3] = np.nan
    thin_x, thin_y = series.means(x, y, bins=10)
    np.testing.assert_allclose(thin_x, [np.mean(x[n * 100 : n * 100 + 100]) for n in range(10)])
    np.testing.assert_allclose(thin_y[0], [np.nanmean(y[0, n * 100 : n * 100 + 100]) for n in range(10)])
    assert np.isnan(thin_y[1]).all()


def test_changes_keep_both_ends_of_every_level():
    x, y = np.arange(9.0), np.array([8, 8, 8, 16, 32, 32, 32, 32, 32.0])
    thin_x, thin_y = series.changes(x, y)
    assert thin_x.tolist() == [0, 2, 3, 4, 8]
    assert thin_y.tolist() == [8, 8, 16, 32, 32]


def test_column_takes_numbers_only():
    lines = [{"a": 1}, {"a": None}, {"a": "x"}, {}, {"a": 2.5}, {"a": [1]}]
    np.testing.assert_array_equal(series.column(lines, "a"), [1, np.nan, np.nan, np.nan, 2.5, np.nan])
