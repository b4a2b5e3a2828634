"""The whole recipe in five minutes on two cores: text of the Python installation, four stages, 1.3 M parameters.

Same mixture table, batch ramp and learning-rate segments as configs/davinci_3b.py, scaled down. The six numbers
below set the size; everything else follows from them.
"""

from davinci_jax.curriculum.recipe import STAGES, scaled
from davinci_jax.experiment import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    ModelConfig,
    RunConfig,
    Source,
)

TOKENS = 2_000_000  # of the whole run; time is in proportion
SEQUENCE_LENGTH = 256
BATCH = 2  # sequences per step at the start; doubles twice in stage 1-1, as 1024 -> 2048 -> 4096 does
LEARNING_RATE = 3e-3  # peak of stage 1; a small model takes ten times that of 3 B parameters
VOCABULARY = 4096
WIDTH = 128

PAPER = {"tokens": 8e12, "sequence_length": 4096, "batch": 1024, "learning_rate": 3e-4}


def curriculum():
    """The four stages with the paper's proportions: steps of the ramp and warm-ups as shares of their stage."""
    return scaled(
        STAGES,
        tokens=TOKENS / PAPER["tokens"],
        batch=BATCH / PAPER["batch"],
        length=SEQUENCE_LENGTH / PAPER["sequence_length"],
        learning_rate=LEARNING_RATE / PAPER["learning_rate"],
    )


def sources():
    """Text that every machine has; `davinci curate` extracts it. Tokens are estimates until shards are there."""
    return (
        Source(
            name="python-docs",  # docstrings of the standard library and pydoc topics
            domain="General",
            level="L2",
            tokens=7e5,
            documents="python-installation:docs",
            max_epochs=3,  # the mixture draws more General text than there is
        ),
        Source(
            name="python-source",  # the standard library
            domain="Code",
            level="L2",
            tokens=3.5e6,
            documents="python-installation:source",
        ),
        Source(
            name="scientific-docs",  # docstrings of numpy and scipy
            domain="Science",
            level="L2",
            tokens=2.3e6,
            documents="python-installation:scientific-docs",
        ),
        Source(
            name="doctest-qa",  # examples in all those docstrings, as questions and answers
            domain="QA",
            level="L2",
            tokens=5e5,
            documents="python-installation:doctests",
            max_epochs=2,
        ),
    )


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        run=RunConfig(name="quickstart", micro_batch=BATCH, log_every_steps=10),
        model=ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_layers=4,
            num_heads=WIDTH // 32,
            num_kv_heads=WIDTH // 64,
            head_size=32,
            mlp_size=3 * WIDTH,
            max_positions=SEQUENCE_LENGTH,
            init_std=WIDTH**-0.5,  # 3 B parameters start from 0.02, which is about this at their width of 2048
            compute_dtype="float32",
            remat="none",
            loss_chunk=BATCH * SEQUENCE_LENGTH,
        ),
        data=DataConfig(root="data/quickstart", sources=sources(), sequence_length=SEQUENCE_LENGTH, heldout=0.05),
        curriculum=curriculum(),
        evaluation=EvaluationConfig(every_steps=200, tokens=16_384),
        checkpoint=CheckpointConfig(every_steps=250, keep_last=3, keep_every=None),
    )
