"""The compiled curriculum against the arithmetic of the report's table 5 and against closed formulas."""

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from davinci_jax.curriculum.recipe import STAGES, scaled
from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import Batch, LearningRate, Stage

LENGTH = 4096


def stage(tokens, *sizes, name="1-1", **rate):
    pieces = tuple(Batch(size=size, steps=steps) for size, steps in sizes)
    rate = LearningRate(**({"peak": 1e-3} | rate))
    return Stage(name=name, tokens=tokens, batch=pieces, learning_rate=rate, mixture={"General": 1})


def rates(steps: int, **rate) -> list[float]:
    """Returns the learning rates of one stage of so many steps."""
    timeline = Timeline.compile((stage(steps * 8, (1, None), **rate),), 8)
    assert timeline.num_steps == steps
    return [timeline.at(step).learning_rate for step in range(steps)]


@pytest.fixture(scope="module")
def report() -> Timeline:
    return Timeline.compile(STAGES, LENGTH)


def test_steps_of_the_report(report):
    # 4e12 = (70,000 x 1024 + 40,000 x 2048 + n x 4096) x 4096 tokens, and so on; n is rounded up.
    last = math.ceil((4 * 10**12 // LENGTH - 70_000 * 1024 - 40_000 * 2048) / 4096)
    assert [len(report.steps_of(n)) for n in range(4)] == [110_000 + last, 119_210, 59_605, 59_605]
    assert 110_000 + last == 310_919
    assert [piece.num_steps for piece in report.pieces[:3]] == [70_000, 40_000, last]
    assert report.num_steps == 549_339
    assert 8e12 <= report.num_tokens < 8e12 + 4 * 4096 * LENGTH
    assert report.num_tokens == report.num_sequences * LENGTH


def test_tokens_of_the_ramp(report):
    assert report.tokens_before(70_000) == pytest.approx(293.6e9, rel=1e-3)
    assert report.tokens_before(110_000) - report.tokens_before(70_000) == pytest.approx(335.5e9, rel=1e-3)
    assert report.tokens_before(310_919) == pytest.approx(4e12, rel=1e-5)
    assert report.tokens_before(549_339) == report.num_tokens


@pytest.mark.parametrize(
    ("step", "stage", "batch", "rate"),
    [
        (0, 0, 1024, 3e-4 / 2000),
        (999, 0, 1024, 1.5e-4),
        (1_999, 0, 1024, 3e-4),
        (2_000, 0, 1024, 3e-4),
        (69_999, 0, 1024, 3e-4),
        (70_000, 0, 2048, 3e-4),
        (109_999, 0, 2048, 3e-4),
        (110_000, 0, 4096, 3e-4),
        (310_918, 0, 4096, 3e-4),
        (310_919, 1, 4096, 3e-4),
        (430_128, 1, 4096, 3e-5),
        (430_129, 2, 4096, 3e-5 / 2000),
        (432_129, 2, 4096, 3e-5),
        (489_734, 3, 4096, 3e-5),
        (549_338, 3, 4096, 3e-5),
    ],
)
def test_borders_of_the_report(report, step, stage, batch, rate):
    info = report.at(step)
    assert (info.step, info.stage, info.batch_size) == (step, stage, batch)
    assert info.learning_rate == pytest.approx(rate, rel=1e-12)


def test_sequences_follow_each_other_without_a_gap():
    timeline = Timeline.compile(scaled(STAGES, tokens=1e-5, batch=1 / 512), LENGTH)
    expected = 0
    for step in range(timeline.num_steps):
        info = timeline.at(step)
        assert info.first_sequence == expected
        assert step in timeline.steps_of(info.stage)
        assert info.first_sequence in timeline.sequences_of(info.stage)
        expected += info.batch_size
    assert expected == timeline.num_sequences


def test_warmup_ends_with_the_peak():
    assert rates(8, warmup_steps=4, warmup_from=2e-4) == pytest.approx([4e-4, 6e-4, 8e-4, 1e-3, *[1e-3] * 4])
    assert rates(3, warmup_steps=0) == pytest.approx([1e-3] * 3)


def test_shapes_run_from_peak_to_final():
    assert rates(7, shape="linear", final=0.0, warmup_steps=2) == pytest.approx(
        [5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0]
    )
    assert rates(6, shape="wsd", final=1e-4, decay=0.5) == pytest.approx([1e-3, 1e-3, 1e-3, 7e-4, 4e-4, 1e-4])
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(10)]
    assert rates(10, shape="cosine", final=1e-4) == pytest.approx(cosine, rel=1e-12)
    assert rates(1, shape="cosine", final=1e-4) == pytest.approx([1e-4])


def test_schedule_under_jit_equals_the_host_to_the_last_stage(report):
    schedule = jax.jit(jax.vmap(report.learning_rates()))
    random = np.random.default_rng(0).integers(0, report.num_steps, 3000)
    borders = [report.steps_of(n).start + offset for n in range(4) for offset in (0, 1, 1998, 1999, 2000, 59_603)]
    steps = np.concatenate([random, borders, [report.num_steps - 1]])
    host = np.array([report.at(int(step)).learning_rate for step in steps])
    traced = schedule(jnp.asarray(steps, jnp.int32))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(traced, np.float64), host, rtol=1e-6)


def test_schedule_keeps_its_digits_at_the_end_of_a_decay_to_zero():
    timeline = Timeline.compile((stage(2e6 * 8, (1, None), shape="cosine", final=0.0),), 8)
    steps = timeline.num_steps - 2 - np.arange(50)
    host = [timeline.at(int(step)).learning_rate for step in steps]
    np.testing.assert_allclose(jax.jit(jax.vmap(timeline.learning_rates()))(steps), host, rtol=1e-6)


def test_schedule_holds_the_last_rate_past_the_end():
    timeline = Timeline.compile((stage(8 * 8, (1, None), shape="linear", final=1e-4),), 8)
    assert float(jax.jit(timeline.learning_rates())(100)) == pytest.approx(1e-4)


@pytest.mark.parametrize(("tokens", "steps"), [(80, 10), (80.0000000001, 10), (81, 11), (1, 1), (0.3 * 80, 3)])
def test_tokens_are_rounded_up_to_whole_steps(tokens, steps):
    assert Timeline.compile((stage(tokens, (1, None)),), 8).num_steps == steps


def test_float_tokens_of_whole_steps_add_no_step():
    for steps in (311_000, 119_210, 59_605):
        tokens = float(steps) * 4096 * LENGTH
        for rounded in (tokens, tokens * 0.1 * 10, np.nextafter(tokens, math.inf)):
            assert Timeline.compile((stage(rounded, (4096, None)),), LENGTH).num_steps == steps


def test_ramp_longer_than_its_stage_shows_the_arithmetic():
    with pytest.raises(ConfigError, match=r"curriculum\[1-1\].batch: .*\(10 x 2 \+ 5 x 4\) sequences x 8 = 320 tokens"):
        Timeline.compile((stage(320, (2, 10), (4, 5), (8, None)),), 8)


@pytest.mark.parametrize("shape", [{"warmup_steps": 11}, {"warmup_steps": 10, "shape": "cosine", "final": 0.0}])
def test_warmup_longer_than_its_stage(shape):
    with pytest.raises(ConfigError, match=r"warmup_steps = 1[01]: does not fit the stage, which has 10 steps"):
        Timeline.compile((stage(80, (1, None), **shape),), 8)


@pytest.mark.parametrize("step", [-1, 549_339])
def test_steps_outside_the_run(report, step):
    with pytest.raises(IndexError, match="outside the run of 549339 steps"):
        report.at(step)


def test_pickles(report):
    again = pickle.loads(pickle.dumps(report))
    assert again == report
    assert again.at(300_000) == report.at(300_000)
