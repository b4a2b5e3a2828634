"""A made-up run directory of two stages and two domains, whose figures are known."""

from __future__ import annotations

import json
import pathlib

from davinci_jax.experiment import (
    Batch,
    DataConfig,
    Experiment,
    LearningRate,
    ModelConfig,
    RunConfig,
    Source,
    Stage,
    to_json,
)
from davinci_jax.training.metrics import MetricsWriter

LENGTH = 64
HOSTILE = "<script>alert('1')"
MARKUP = "A&B<i>$x_1$"


def experiment(name: str = "tiny", domains: tuple[str, str] = ("General", "QA"), root: str = "nowhere") -> Experiment:
    """40 steps of 8 sequences, the first domain only; then 20 steps of 16 sequences, a quarter of the first domain."""
    first, second = domains
    return Experiment(
        run=RunConfig(name=name),
        model=ModelConfig(
            vocab_size=64, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, mlp_size=8
        ),
        data=DataConfig(
            root=root,
            sequence_length=LENGTH,
            sources=(
                Source(name="web", domain=first, level="L3", tokens=100_000),
                Source(name="answers", domain=second, level="L5", tokens=7_680, stages=("two",), max_epochs=4),
            ),
        ),
        curriculum=(
            Stage(
                name="one",
                tokens=40 * 8 * LENGTH,
                batch=(Batch(size=8),),
                learning_rate=LearningRate(peak=3e-4, warmup_steps=5),
                mixture={first: 100},
            ),
            Stage(
                name="two",
                tokens=20 * 16 * LENGTH,
                batch=(Batch(size=16),),
                learning_rate=LearningRate(peak=3e-4, shape="cosine", final=3e-5),
                mixture={first: 25, second: 75},
            ),
        ),
    )


def line(step: int, domains: tuple[str, str] = ("General", "QA"), **more: object) -> dict:
    """The train line after `step` steps."""
    second = step > 40
    tokens = LENGTH * (8 * min(step, 40) + 16 * max(step - 40, 0))
    shares = (0.25, 0.75) if second else (1.0, 0.0)
    return {
        "step": step, "stage": "two" if second else "one", "tokens": tokens, "batch_size": 16 if second else 8,
        "learning_rate": 1e-4, "loss": 5.0 - 0.05 * step, f"loss/{domains[0]}": 5.0 - 0.04 * step,
        **({f"loss/{domains[1]}": 4.0 - 0.04 * step} if second else {}),
        **{f"share/{domain}": share for domain, share in zip(domains, shares, strict=True)},
        "grad_norm": 0.5, "param_norm": 10.0 + step, "tokens_per_second": 1000.0, "mfu": 0.4, "step_seconds": 0.5,
        "data_wait_seconds": 0.01, "memory_bytes": 2**30, "host_memory_bytes": 2**29, "time": 1e9 + step, **more,
    }  # fmt: skip


def evaluation(step: int, domains: tuple[str, str] = ("General", "QA")) -> dict:
    """The evaluation line after `step` steps."""
    parts = {f"{key}/{domain}": value for key, value in (("loss", 4.125), ("bits_per_byte", 1.5)) for domain in domains}
    return {"step": step, "stage": "one" if step <= 40 else "two", "loss": 4.25, "bits_per_byte": 1.25, **parts,
            "time": 1e9 + step}  # fmt: skip


def write(
    folder: pathlib.Path, steps: int = 60, domains: tuple[str, str] = ("General", "QA"), **more: object
) -> pathlib.Path:
    """Writes a run that got to `steps`, killed once at step 35 and resumed at 30; `more` goes to `experiment`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(to_json(experiment(domains=domains, **more)))
    with MetricsWriter(folder, tensorboard=False) as writer:
        writer.event("start", step=0, devices="8 x cpu", mesh={"fsdp": 8}, time=1e9)
        for step in range(1, min(steps, 35) + 1):
            writer.train(line(step, domains, loss=9.0 if step > 30 else 5.0 - 0.05 * step))
            if step % 10 == 0:
                writer.event("checkpoint", step=step, time=1e9 + step)
        if steps > 35:
            writer.event("resume", step=30, devices="8 x cpu", mesh={"fsdp": 8}, time=1e9 + 30)
            for step in range(31, steps + 1):
                writer.train(line(step, domains))
                if step % 20 == 0:
                    writer.evaluation(evaluation(step, domains))
        if steps == 60:
            writer.event("finish", step=60, time=1e9 + 60)
    return folder


def write_samples(folder: pathlib.Path) -> None:
    """Writes two samples, one of them hostile."""
    samples = [
        {"prompt": "def f(x):", "text": "\n    return x"},
        {"prompt": "</blockquote>", "text": "<img src=x>" + HOSTILE},
    ]
    (folder / "samples.json").write_text(json.dumps({"step": 60, "samples": samples}))
