"""Display: the lines without a terminal, the panel with one, and the time left."""

import io

import pytest
from rich.console import Console

from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.experiment import (
    Batch,
    DataConfig,
    Experiment,
    LearningRate,
    ModelConfig,
    RunConfig,
    Source,
    Stage,
)
from davinci_jax.training import units
from davinci_jax.training.display import Display, Pace

_RATE = LearningRate(peak=3e-4)
_LINE = {
    "step": 10, "stage": "1-1", "tokens": 20480, "batch_size": 32, "learning_rate": 3e-4, "loss": 7.25,
    "grad_norm": 0.5, "tokens_per_second": 12400.0, "mfu": 0.412, "step_seconds": 0.5, "data_wait_seconds": 0.01,
    "host_memory_bytes": 2**30,
}  # fmt: skip
_EVALUATION = {
    "step": 10, "loss": 7.5, "bits_per_byte": 2.5, "loss/General": 7.4, "bits_per_byte/General": 2.4, "loss/QA": 7.6,
    "bits_per_byte/QA": 2.6,
}  # fmt: skip


class _Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def experiment():
    return Experiment(
        run=RunConfig(name="[red]tiny"),
        model=ModelConfig(
            vocab_size=64, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, mlp_size=8
        ),
        data=DataConfig(
            root="data", sequence_length=64, sources=(Source(name="a", domain="General", level="L2", tokens=1e6),)
        ),
        curriculum=(
            Stage(
                name="1-1",
                tokens=64 * 32 * 30,
                batch=(Batch(size=16, steps=20), Batch(size=32)),
                learning_rate=_RATE,
                mixture={"General": 1},
            ),
            Stage(
                name="1-2", tokens=64 * 32 * 10, batch=(Batch(size=32),), learning_rate=_RATE, mixture={"General": 1}
            ),
        ),
    )


def _show(experiment, terminal, clock=None, info=None, width=80):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, highlight=False)
    timeline = Timeline.compile(experiment.curriculum, experiment.data.sequence_length)
    with Display(experiment, timeline, console, clock or _Clock()) as display:
        display.start({"run_directory": "runs/tiny", "devices": "8 x cpu", "mesh": {"fsdp": 8}, "params": 3.2e6,
                       "flops_per_token": 2.033e10, "step": 0, **(info or {})})  # fmt: skip
        display.train(_LINE)
        display.evaluation(_EVALUATION)
        display.checkpoint(10)
        display.event("stage 1-2 begins")
        panel = display._live.get_renderable() if display._live else None
        display.finish("finished after 50 steps", {"report": "runs/tiny/report.html"})
    return console, panel


def test_without_a_terminal_every_report_is_one_line(experiment):
    console, _ = _show(experiment, terminal=False)
    lines = console.file.getvalue().splitlines()
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert lines[0].split() == ["run", "[red]tiny", "→", "runs/tiny"]
    assert "devices     8 x cpu, mesh fsdp 8" in lines
    assert "model       3.20M parameters, 20.3 GFLOP per token" in lines
    assert "tokens      81.9k in 2 stages, 1.02k to 2.05k per step" in lines
    assert "steps       50" in lines
    train = next(line for line in lines if line.startswith("step "))
    # 81,920 tokens in all, 20,480 consumed, 61,440 left at 12,400 a second.
    assert " ".join(train.split()) == (
        "step 10/50 25.0% stage 1-1 loss 7.2500 lr 3.00e-04 batch 32 12.4k tok/s mfu 41.2% wait 2.0% left 5 s"
    )
    assert "held-out  step 10  loss 7.5000  bits/byte 2.5000  General 7.4000  QA 7.6000" in lines
    assert "checkpoint  step 10" in lines
    assert any(line.endswith("stage 1-2 begins") for line in lines)
    assert lines[-2:] == ["finished after 50 steps", "report      runs/tiny/report.html"]


def test_a_resumed_run_says_from_where(experiment):
    console, _ = _show(experiment, terminal=False, info={"step": 30})
    # 20 steps of 16 and 10 of 32 sequences are 40,960 of 81,920 tokens.
    assert "resumed     after step 30, 50.0% of the tokens" in console.file.getvalue().splitlines()


def test_missing_metrics_are_left_out_of_the_line(experiment):
    console = Console(file=io.StringIO(), force_terminal=False, highlight=False)
    timeline = Timeline.compile(experiment.curriculum, 64)
    with Display(experiment, timeline, console) as display:
        display.start({})
        display.train({**_LINE, "mfu": None, "data_wait_seconds": None, "loss": float("nan")})
    line = console.file.getvalue().splitlines()[-1]
    assert "mfu" not in line
    assert "wait" not in line
    assert "loss nan" in line


def test_output_that_holds_no_unicode_does_not_end_the_run(experiment, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", output)
    with Display(experiment, Timeline.compile(experiment.curriculum, 64)) as display:
        display.start({"run_directory": "runs/größe"})
        display.train(_LINE)
    output.flush()
    assert b"runs/gr??e" in output.buffer.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_panel_fits_the_terminal_and_tells_everything(experiment, width):
    _, panel = _show(experiment, terminal=True, width=width)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(panel)
    lines = console.file.getvalue().splitlines()
    assert {len(line) for line in lines} == {min(width, 100)}
    text = " ".join(console.file.getvalue().split())
    for part in ("[red]tiny", "10 / 50", "7.2500", "3.00e-04", "41.2%", "12.4k", "25.0%", "stage 1-1 · 1 of 2"):
        assert part in text
    assert "held out, step 10" in text
    assert "checkpoint at step 10" in text


def test_the_bar_is_filled_in_proportion_to_tokens(experiment):
    _, panel = _show(experiment, terminal=True)
    bar, names = panel._progress(76)
    filled = sum(span.end - span.start for span in bar.spans if span.style == "cyan")
    assert filled == pytest.approx(0.25 * 69, abs=1)
    # The second stage is a quarter of the tokens: its name stands where it begins.
    assert names.plain.index("1-2") == round(0.75 * 69)


def test_time_left_follows_tokens_not_steps_and_counts_down():
    clock = _Clock()
    pace = Pace(10_000, clock)
    assert pace.seconds_left() is None
    pace.report(1_000, tokens_per_second=100.0)
    assert pace.seconds_left() == pytest.approx(90.0)
    clock.now += 10
    pace.report(3_000, tokens_per_second=100.0)  # 200 a second by the clock: evaluations and checkpoints count
    assert pace.seconds_left() == pytest.approx(35.0)
    clock.now += 5
    assert pace.seconds_left() == pytest.approx(30.0)
    clock.now += 500
    assert pace.seconds_left() == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.count(512), "512"),
        (units.count(999_600), "1.00M"),
        (units.count(78_643_200), "78.6M"),
        (units.count(4e12), "4.00T"),
        (units.flops(20.33e9), "20.3 GFLOP"),
        (units.flops(1.6e23), "160 ZFLOP"),
        (units.duration(59.6), "1 min 00 s"),
        (units.duration(4 * 3600 + 305), "4 h 05 min"),
        (units.duration(12 * 86400 + 3 * 3600), "12 d 03 h"),
        (units.duration(float("inf")), "unknown"),
        (units.memory(1.25 * 2**30), "1.25 GiB"),
        (units.memory(812 * 2**20), "812 MiB"),
        (units.power(2.5e-5), "2.5e-5"),
        (units.power(0), "0"),
        (units.number(None), "-"),
        (units.percent(0.4117), "41.2%"),
    ],
)
def test_units(text, expected):
    assert text == expected
