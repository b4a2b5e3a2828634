"""The packing against best-fit decreasing item by item, and the plan on disk."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import write_shards

from davinci_jax.data import best_fit
from davinci_jax.data.best_fit import BestFitRows, best_fit_decreasing, make_plan, pack, plan_folder
from davinci_jax.data.rows import counted_rows
from davinci_jax.data.shards import ShardSet
from davinci_jax.errors import DataError
from davinci_jax.experiment import DataConfig, Source


def one_by_one(sizes, capacity):
    """Best-fit decreasing as the textbook has it; returns the fill of every bin."""
    bins = []
    for size in sorted(sizes, reverse=True):
        fitting = [n for n, filled in enumerate(bins) if filled + size <= capacity]
        if fitting:
            bins[max(fitting, key=lambda n: bins[n])] += size
        else:
            bins.append(size)
    return bins


@pytest.mark.slow
@given(
    st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=80)))
)
@settings(max_examples=300, deadline=None)
def test_same_bins_as_item_by_item(case):
    capacity, sizes = case
    bins = best_fit_decreasing(np.array(sizes), capacity)
    fill = np.bincount(bins, weights=sizes)
    assert sorted(fill) == sorted(one_by_one(sizes, capacity))
    assert set(bins) == set(range(len(fill)))


def test_fewer_rows_than_one_and_a_quarter_of_the_least():
    # Johnson et al. 1974: best-fit decreasing needs at most 11/9 of the optimum plus 4.
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(5.5, 1.2, 20_000).astype(int) + 1, 2048)
    bins = best_fit_decreasing(sizes, 2048)
    assert bins.max() + 1 <= 11 / 9 * -(-sizes.sum() // 2048) + 4


def test_pieces_of_long_documents():
    packed = pack(np.array([0, 25, 28, 30, 39]), 10)
    rows = np.split(packed.start, np.cumsum(packed.counts)[:-1])
    assert [row.tolist() for row in rows] == [[0], [10], [20, 25, 28], [30]]
    assert packed.length.tolist() == [10, 10, 5, 3, 2, 9]


def test_windows_are_packed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(best_fit, "WINDOW", 4)
    write_shards(tmp_path / "s", [[n] * 3 for n in range(10)])
    rows = BestFitRows(ShardSet(tmp_path / "s"), 6)
    assert rows.num_rows == 5
    tokens = rows.read(np.arange(5)).tokens
    assert tokens.tolist() == [[2 * n] * 3 + [2 * n + 1] * 3 for n in range(5)]
    assert rows.fill == 1.0


def test_the_plan_is_made_once_for_each_length_and_set(tmp_path):
    write_shards(tmp_path / "s", [[1] * n for n in range(1, 20)])
    shards = ShardSet(tmp_path / "s")
    BestFitRows(shards, 16)
    written = (plan_folder(shards, 16) / "start").stat().st_mtime_ns
    BestFitRows(shards, 16)
    BestFitRows(shards, 32)
    assert (plan_folder(shards, 16) / "start").stat().st_mtime_ns == written
    write_shards(tmp_path / "t", [[1] * n for n in range(1, 21)])
    assert plan_folder(ShardSet(tmp_path / "t"), 16).name != plan_folder(shards, 16).name


def test_counting_rows_writes_nothing(tmp_path, monkeypatch):
    """A plan of a run promises to change nothing; the count is that of the rows which training would open."""
    monkeypatch.setattr(best_fit, "WINDOW", 7)
    write_shards(tmp_path / "s", [[1] * n for n in range(1, 20)])
    before = sorted(tmp_path.rglob("*"))
    source = Source(name="s", domain="Code", level="L2", tokens=100)
    data = DataConfig(root=str(tmp_path), sources=(source,), sequence_length=16, packing="best_fit")
    counted = counted_rows(data, 0)
    assert sorted(tmp_path.rglob("*")) == before
    assert counted == BestFitRows(ShardSet(tmp_path / "s"), 16).num_rows == counted_rows(data, 0)


def test_many_hosts_may_make_the_plan_at_once(tmp_path):
    write_shards(tmp_path / "s", [[1] * n for n in range(1, 20)])
    shards = ShardSet(tmp_path / "s")
    expected = BestFitRows(ShardSet(tmp_path / "s"), 16).num_rows
    threads = [threading.Thread(target=make_plan, args=(shards, 16)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert BestFitRows(shards, 16).num_rows == expected
    assert [file.name for file in (tmp_path / "s").iterdir() if file.name.endswith(".tmp")] == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    write_shards(tmp_path / "s", [[1, 2]])

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(best_fit, "_write_plan", refuse)
    with pytest.raises(
        DataError, match=r"best-fit-train-8-.*cannot be written \(Permission denied\); make the plan with"
    ):
        BestFitRows(ShardSet(tmp_path / "s"), 8)


def test_a_changed_plan_is_named(tmp_path):
    write_shards(tmp_path / "s", [[1] * n for n in range(1, 20)])
    shards = ShardSet(tmp_path / "s")
    BestFitRows(shards, 16)
    file = plan_folder(shards, 16) / "start"
    starts = np.fromfile(file, np.int64)
    starts[3] += 1
    starts.tofile(file)
    rows = BestFitRows(shards, 16)
    with pytest.raises(
        DataError, match=r"best-fit-train-16-\w+: does not match its checksum at row \d+; remove the folder"
    ):
        rows.read(np.arange(rows.num_rows))
    (plan_folder(shards, 16) / "plan.json").write_text("{}")
    with pytest.raises(DataError, match=r"plan.json: cannot be read \('rows'\)"):
        BestFitRows(shards, 16)
