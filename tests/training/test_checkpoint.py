"""Checkpoints: what is kept, what damage is noticed, what is refused."""

import dataclasses
import pathlib
import random
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from davinci_jax.errors import CheckpointError
from davinci_jax.experiment import CheckpointConfig, MeshConfig
from davinci_jax.sharding import make_mesh
from davinci_jax.training.checkpoint import Checkpoints
from davinci_jax.training.state import TrainState

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

CONFIG = CheckpointConfig(every_steps=5, keep_last=2, keep_every=20)


def make_state(step: int, mesh: MeshConfig = MeshConfig()) -> TrainState:
    """A state of a few kilobytes, different at every step, with float32, bfloat16 and integer leaves."""

    def make():
        w = jax.random.normal(jax.random.key(step), (16, 24), out_sharding=P("fsdp", None))
        model = {"w": w, "half": w.astype(jnp.bfloat16), "b": jnp.full(3, step, jnp.float32)}
        return TrainState(step=jnp.array(step, jnp.int32), model=model, opt_state=({"mu": 2 * w},))

    with jax.set_mesh(make_mesh(mesh)):
        return jax.jit(make)()


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a: TrainState, b: TrainState) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of the steps 5 and 10."""
    checkpoints = Checkpoints(tmp_path, CONFIG)
    for step in (5, 10):
        checkpoints.save(make_state(step), {"note": step})
    checkpoints.close()
    return tmp_path


def reopen(folder) -> tuple[Checkpoints, int]:
    """Opens, restores and closes; returns the checkpoints and the step that was restored."""
    checkpoints = Checkpoints(folder, CONFIG)
    try:
        state, meta = checkpoints.restore(abstract(make_state(0)))
    finally:
        checkpoints.close()
    assert same(state, make_state(meta["step"]))
    return checkpoints, meta["step"]


def test_keeps_the_last_and_the_named_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    for step in (5, 10, 15, 20, 25, 30, 35):
        checkpoints.save(make_state(step), {})
    checkpoints.close()
    assert checkpoints.steps() == [20, 30, 35]


def test_restores_the_newest_on_another_mesh(folder):
    other = make_state(0, MeshConfig(replica=2, fsdp=4))
    checkpoints = Checkpoints(folder, CONFIG)
    state, meta = checkpoints.restore(abstract(other))
    checkpoints.close()
    assert meta["step"] == 10
    assert meta["note"] == 10
    assert same(state, make_state(10))
    assert state.model["w"].sharding == other.model["w"].sharding


def test_nothing_saved_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    assert checkpoints.restore(abstract(make_state(0))) is None
    checkpoints.close()


def test_every_flipped_file_is_named_and_the_step_before_used(folder):
    whole = folder.parent / "whole"
    shutil.copytree(folder, whole)
    files = sorted(path.relative_to(folder) for path in (folder / "10").rglob("*") if path.is_file())
    for name in files:
        content = bytearray((whole / name).read_bytes())
        if not content:
            continue
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        content[random.Random(str(name)).randrange(len(content))] ^= 1 << random.Random(1).randrange(8)
        (folder / name).write_bytes(content)
        checkpoints, step = reopen(folder)
        assert step == 5, name
        assert [bad for bad, _ in checkpoints.damaged] == [10]
        assert str(pathlib.Path(*name.parts[1:])) in checkpoints.damaged[0][1]
        assert (folder / "10.damaged").is_dir(), "nothing is thrown away"


@pytest.mark.parametrize("how", ["truncate", "delete"])
def test_a_truncated_or_deleted_file_is_named(folder, how):
    victim = max((path for path in (folder / "10").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "delete":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    checkpoints, step = reopen(folder)
    assert step == 5
    assert victim.name in checkpoints.damaged[0][1]


def test_an_array_that_is_not_what_was_saved_is_noticed(folder, monkeypatch):
    """Whatever goes wrong between the checked file and the devices: here the loader itself flips a bit."""
    checkpoints = Checkpoints(folder, CONFIG)
    load = checkpoints._orbax.load

    def flipping(step, wanted):
        nested = load(step, wanted)
        nested["model"]["b"] = nested["model"]["b"] + jnp.float32(1e-6)
        return nested

    monkeypatch.setattr(checkpoints._orbax, "load", flipping)
    _, meta = checkpoints.restore(abstract(make_state(0)))
    assert meta["step"] == 5
    assert "model" in checkpoints.damaged[0][1]
    assert (folder / "10.damaged").is_dir()
    checkpoints.save(make_state(10), {})  # the run reaches the step again
    checkpoints.close()
    assert reopen(folder)[1] == 10


def test_a_save_that_never_finished_does_not_count(folder):
    (folder / "10" / "seal-0-of-1.json").unlink()
    checkpoints, step = reopen(folder)
    assert step == 5
    assert (checkpoints.unfinished, checkpoints.damaged) == ([10], [])
    assert not (folder / "10").exists()
    assert (folder / "10.unfinished").is_dir(), "nothing is thrown away"


def test_all_damaged_is_an_error_and_no_fresh_start(folder):
    for step in (5, 10):
        (folder / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
    for what in (r"step 10: .*step 5: ", r"10\.damaged, 5\.damaged"):  # and not at the second start either
        checkpoints = Checkpoints(folder, CONFIG)
        with pytest.raises(CheckpointError, match=rf"no whole checkpoint \({what}"):
            checkpoints.restore(abstract(make_state(0)))
        checkpoints.close()


def test_a_damaged_step_can_be_saved_again(folder):
    (folder / "10" / "_CHECKPOINT_METADATA").write_text("{}")
    checkpoints = Checkpoints(folder, CONFIG)
    checkpoints.save(make_state(10), {})
    checkpoints.close()
    assert reopen(folder)[1] == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: jax.ShapeDtypeStruct((16, 25), w.dtype, sharding=w.sharding),
            r"saved float32\[16, 24\], wanted float32\[16, 25\]",
        ),
        (
            lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16, sharding=w.sharding),
            r"saved float32\[16, 24\], wanted bfloat16",
        ),
    ],
)
def test_another_shape_or_dtype_is_refused_by_name(folder, change, message):
    wanted = abstract(make_state(0))
    wanted = dataclasses.replace(wanted, model={**wanted.model, "w": change(wanted.model["w"])})
    checkpoints = Checkpoints(folder, CONFIG)
    with pytest.raises(CheckpointError, match="model/w: " + message):
        checkpoints.restore(wanted)
    checkpoints.close()


def test_a_full_disk_is_told_and_the_older_step_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(make_state(5), {})
    checkpoints.wait()
    # A limit on the size of files stands for the full disk: the write fails in the same place.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        checkpoints.save(make_state(10), {})
        with pytest.raises(CheckpointError, match=r"10: could not be written .*step 5 is whole; free or mend the disk"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
        checkpoints.close()
    assert reopen(tmp_path)[1] == 5
