"""The loader: the same global order for any hosts, micro-batches, threads and processes, and for any first step."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from shard_sets import write_shards

from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.data.loader import TrainLoader
from davinci_jax.data.mixture import MixtureIndex
from davinci_jax.data.rows import ConcatRows
from davinci_jax.data.shards import ShardSet
from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment import Batch as BatchPiece
from davinci_jax.experiment import LearningRate, Stage

LENGTH = 16


def stage(name, steps, ramp, mixture):
    sizes = [ramp[0]] * 2 + [ramp[1]] * (steps - 2)
    return Stage(
        name=name, tokens=sum(sizes) * LENGTH, learning_rate=LearningRate(peak=1.0), mixture=mixture,
        batch=(BatchPiece(size=ramp[0], steps=2), BatchPiece(size=ramp[1])),
    )  # fmt: skip


def make_parts(root, ramp=((4, 8), (8, 16))):
    """Returns (rows, index, timeline): two stages with a ramp each over three sources, the last of which is unused."""
    rows = []
    for n, name in enumerate("ab"):
        if not (root / name).exists():
            rng = np.random.default_rng(n)
            documents = [rng.integers(0, 60000, k).tolist() for k in rng.integers(1, 50, 60)]
            write_shards(root / name, documents, block_tokens=12)
        rows.append(ConcatRows(ShardSet(root / name), LENGTH, n))
    timeline = Timeline.compile((stage("1", 5, ramp[0], {"x": 1}), stage("2", 4, ramp[1], {"x": 1})), LENGTH)
    sizes = [len(timeline.sequences_of(n)) for n in range(2)]
    stages = [(sizes[0], (0.7, 0.3, 0.0)), (sizes[1], (0.2, 0.8, 0.0))]
    index = MixtureIndex(stages, [reader.num_rows for reader in rows] + [0], seed=3)
    assert index.num_sequences == timeline.num_sequences
    return [*rows, None], index, timeline


def make_loader(root, micro_rows=4, local_rows=None, ramp=((4, 8), (8, 16)), **options):
    rows, index, timeline = make_parts(root, ramp)
    local_rows = np.arange(micro_rows) if local_rows is None else local_rows
    return TrainLoader(rows, index, timeline, micro_rows, local_rows, **options)


def read_all(loader, first_step=0):
    """Returns step -> batch with [micro, rows] joined."""
    found = {}
    for step, batch in loader.steps(first_step):
        assert all(array.dtype == np.int32 for array in batch)
        found[step] = [array.reshape(-1, *array.shape[2:]) for array in batch]
    loader.close()
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for step in one:
        for a, b in zip(one[step], other[step], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("loader")


def read_one_by_one(root, *ramp):
    """Returns the steps, row by row: each sequence looked up and read alone."""
    rows, index, timeline = make_parts(root, *ramp)
    steps = {}
    for step in range(timeline.num_steps):
        info = timeline.at(step)
        batches = []
        for sequence in range(info.first_sequence, info.first_sequence + info.batch_size):
            found = index.lookup(np.array([sequence]))
            batches.append(rows[found.source[0]].read(found.row))
        steps[step] = [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]
    assert len(steps) == 9
    return steps


@pytest.fixture(scope="module")
def reference(root):
    return read_one_by_one(root)


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_any_micro_batch_gives_the_same_order(root, reference, micro_rows):
    loader = make_loader(root, micro_rows)
    for step, batch in loader.steps(0):
        assert batch.tokens.shape == (len(reference[step][0]) // micro_rows, micro_rows, LENGTH)
        assert batch.sources.shape == batch.tokens.shape[:2]
    assert_same(read_all(make_loader(root, micro_rows)), reference)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_hosts_together_read_the_same_batch(root, hosts, interleaved):
    """Batches of 8 and 16, each host holding a part of every micro-batch of 8, in the order of the global index."""
    micro_rows, ramp = 8, ((8, 16), (8, 16))
    reference = read_one_by_one(root, ramp)
    held = np.arange(micro_rows).reshape(-1, hosts).T if interleaved else np.arange(micro_rows).reshape(hosts, -1)
    parts = [dict(make_loader(root, micro_rows, local_rows=rows, ramp=ramp).steps(0)) for rows in held]
    for step, whole in reference.items():
        for n, array in enumerate(whole):
            joined = np.empty((len(array) // micro_rows, micro_rows, *array.shape[1:]), np.int32)
            for rows, part in zip(held, parts, strict=True):
                joined[:, rows] = part[step][n]
            np.testing.assert_array_equal(joined.reshape(array.shape), array)


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("first_step", [0, 1, 4, 8, 9])
def test_a_run_may_begin_anywhere(root, reference, first_step, prefetch):
    found = read_all(make_loader(root, prefetch=prefetch), first_step)
    assert_same(found, {step: batch for step, batch in reference.items() if step >= first_step})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "first_step"),
    [
        (1, 0),
        pytest.param(2, 0, marks=pytest.mark.exhaustive),
        (3, 7),
        pytest.param(3, 9, marks=pytest.mark.exhaustive),
    ],
)
def test_any_number_of_workers_gives_the_same_order(root, reference, workers, first_step):
    found = read_all(make_loader(root, workers=workers, prefetch=2), first_step)
    assert_same(found, {step: batch for step, batch in reference.items() if step >= first_step})


def test_batches_are_plain_arrays_that_may_be_kept(root):
    loader = make_loader(root)
    batches = [batch for _, batch in loader.steps(0)]
    assert all(
        (type(array) is np.ndarray and array.flags.owndata) or array.base is not None for b in batches for array in b
    )
    assert len({batch.tokens.tobytes() for batch in batches}) == len(batches)


def test_a_batch_that_micro_batches_do_not_divide(root):
    with pytest.raises(ConfigError, match=r"curriculum.batch.size = 4: is no multiple of the 3 rows"):
        make_loader(root, micro_rows=3)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_shard_ends_the_steps_for_good(tmp_path, workers):
    loader = make_loader(tmp_path, workers=workers)
    file = tmp_path / "b" / "train-00002.array_record"
    content = bytearray(file.read_bytes())
    inside = [at for at, byte in enumerate(content) if byte][100]  # the rest is padding
    content[inside] ^= 1
    file.write_bytes(content)
    steps = loader.steps(0)
    with pytest.raises(DataError, match=r"b/train-00002.array_record, record \d: cannot be read \("):
        list(steps)
    with pytest.raises(DataError, match=r"b/train-00002.array_record, record \d: cannot be read \("):
        next(steps)
    loader.close()


def test_steps_out_of_order_are_refused(root):
    loader = make_loader(root)
    steps = loader.steps(0)
    next(steps)
    next(steps._iterator)
    with pytest.raises(RuntimeError, match="gave step 2 where step 1 belongs"):
        next(steps)
    with pytest.raises(RuntimeError, match="gave step 2"):
        next(steps)
    loader.close()


def test_the_iterator_ends_once_and_for_all(root):
    loader = make_loader(root)
    steps = loader.steps(8)
    assert [step for step, _ in steps] == [8]
    assert list(steps) == []
    loader.close()
    loader.close()


_PARENT = """
import pathlib, sys, time
sys.path.insert(0, {tests!r})
from test_data_loader import make_loader
if __name__ == "__main__":
    loader = make_loader(pathlib.Path({root!r}), workers=2)
    steps = loader.steps(0)
    next(steps)
    print("ready", flush=True)
    if sys.argv[1] == "signal":
        time.sleep(1)
        print(len(list(steps)), flush=True)
        loader.close()
    elif sys.argv[1] == "raise":
        raise SystemExit(3)
    else:
        time.sleep(60)
"""


def start_parent(root, tmp_path, what):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT.format(tests=os.path.dirname(__file__), root=str(root)))
    process = subprocess.Popen(
        [sys.executable, script, what], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    return process, children_of(process.pid)


def children_of(pid):
    """Returns the processes below `pid` that run Python's spawned main."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue
    return found


@pytest.mark.slow
def test_workers_outlive_a_signal_to_the_group(root, tmp_path):
    make_parts(root)
    process, workers = start_parent(root, tmp_path, "signal")
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    assert process.stdout.readline() == "8\n"
    process.stdout.close()
    assert process.wait() == 0


@pytest.mark.slow
def test_a_parent_that_forgets_to_close_ends(root, tmp_path):
    make_parts(root)
    process, workers = start_parent(root, tmp_path, "raise")
    assert process.wait(timeout=20) == 3
    process.stdout.close()
    assert not any(_is_running(worker) for worker in workers)


@pytest.mark.slow
def test_workers_die_with_their_parent(root, tmp_path):
    make_parts(root)
    process, workers = start_parent(root, tmp_path, "kill")
    assert len(workers) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(_is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


def _is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_timeline_needs_pieces_only(root, reference):
    rows, index, timeline = make_parts(root)
    plain = SimpleNamespace(
        num_steps=timeline.num_steps, pieces=[SimpleNamespace(**p._asdict()) for p in timeline.pieces]
    )
    assert_same(read_all(TrainLoader(rows, index, plain, 4, np.arange(4))), reference)
