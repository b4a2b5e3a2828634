"""A run of a few seconds, for tests that need a whole one: documents, tokenizer, shards, four short stages."""

import json
import os
import pathlib
import random
import subprocess
import sys

from davinci_jax.data.shard_sources import shard_sources
from davinci_jax.experiment import (
    Batch,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    LearningRate,
    MeshConfig,
    ModelConfig,
    RunConfig,
    Source,
    Stage,
    to_json,
)

MODEL = ModelConfig(
    vocab_size=512, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=4, mlp_size=32,
    compute_dtype="float32", remat="none", max_positions=64,
)  # fmt: skip
LENGTH = 32
# Two devices divide all that eight would; eight on a machine of two cores mostly wait for each other.
ENVIRONMENT = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
# Sequences of the stages: 8 x 2 + 16 x 2 + 16 x 2, then 16 x 4 each.
STEPS = (6, 4, 4, 4)


def make_documents(root: pathlib.Path, seed: int = 0) -> None:
    """Writes documents of words over small alphabets, one per domain."""
    rng = random.Random(seed)
    for source, letters in (("web", "abcde "), ("code", "(){}=x\n"), ("pairs", "QA?: ")):
        folder = root / "documents" / source
        folder.mkdir(parents=True)
        with (folder / "part.jsonl").open("w") as file:
            for n in range(300):
                text = "".join(rng.choices(letters, k=rng.randint(20, 400)))
                spans = [[0, len(text) // 2]] if source == "pairs" else []
                file.write(json.dumps({"id": f"{source}/{n}", "text": text, "questions": spans, "level": "L2"}) + "\n")


def make_experiment(root: pathlib.Path) -> Experiment:
    """Four stages of 18 steps in all; checkpoints every 3 steps, evaluation every 4."""

    def stage(name, steps, ramp, mixture, **rate):
        pieces = (*(Batch(size=size, steps=2) for size in ramp[:-1]), Batch(size=ramp[-1]))
        sequences = sum(size * 2 for size in ramp[:-1]) + ramp[-1] * (steps - 2 * (len(ramp) - 1))
        tokens, rate = sequences * LENGTH, LearningRate(**rate)
        return Stage(name=name, tokens=tokens, batch=pieces, learning_rate=rate, mixture=mixture)

    early, late = {"General": 70, "Code": 30}, {"General": 20, "Code": 30, "QA": 50}
    return Experiment(
        run=RunConfig(name="tiny", directory=str(root / "run"), micro_batch=8, log_every_steps=1),
        model=MODEL,
        data=DataConfig(
            root=str(root / "data"), sequence_length=LENGTH, heldout=0.1,
            sources=(
                Source(name="web", domain="General", level="L2", tokens=2e4, max_epochs=20),
                Source(name="code", domain="Code", level="L2", tokens=2e4, max_epochs=20),
                Source(
                    name="pairs", domain="QA", level="L2", tokens=2e4, max_epochs=20, stages=("2-1", "2-2"),
                    loss="answers",
                ),
            ),
        ),
        curriculum=(
            stage("1-1", STEPS[0], (8, 16, 16), early, peak=1e-2, warmup_steps=3),
            stage("1-2", STEPS[1], (16,), early, peak=1e-2, shape="cosine", final=1e-3),
            stage("2-1", STEPS[2], (16,), late, peak=1e-3, warmup_steps=2),
            stage("2-2", STEPS[3], (16,), late, peak=1e-3),
        ),
        mesh=MeshConfig(),
        evaluation=EvaluationConfig(every_steps=4, tokens=256),
        checkpoint=CheckpointConfig(every_steps=3, keep_last=2, keep_every=None),
    )  # fmt: skip


def prepare(root: pathlib.Path) -> Experiment:
    """Makes the documents, the tokenizer and the shards below `root`; returns the experiment."""
    experiment = make_experiment(root)
    make_documents(root / "data")
    shard_sources(experiment, new_tokenizer=True)
    return experiment


def write_config(experiment: Experiment, file: pathlib.Path) -> pathlib.Path:
    file.write_text(to_json(experiment))
    return file


def command(*arguments: object) -> list[str]:
    """The command line of `davinci` with this interpreter."""
    return [sys.executable, "-m", "davinci_jax.cli", *map(str, arguments)]


def faulty(fault: str, step: int, *arguments: object) -> list[str]:
    """The command line of `davinci train` with a fault of faulty_train.py."""
    script = pathlib.Path(__file__).with_name("faulty_train.py")
    return [sys.executable, str(script), fault, str(step), *map(str, arguments)]


def davinci(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Runs `davinci` in a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=check, env=ENVIRONMENT)
