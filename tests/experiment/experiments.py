"""A small experiment for the tests of this folder."""

from davinci_jax.experiment import Batch, DataConfig, Experiment, LearningRate, ModelConfig, RunConfig, Source, Stage


def small() -> Experiment:
    """Two sources of one domain, one of another, two stages."""
    rate = LearningRate(peak=1e-3, warmup_steps=2)
    return Experiment(
        run=RunConfig(name="small"),
        model=ModelConfig(
            vocab_size=64, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_size=4, mlp_size=16
        ),
        data=DataConfig(
            root="data",
            sequence_length=8,
            sources=(
                Source(name="web", domain="General", level="L3", tokens=1000),
                Source(name="books", domain="General", level="L2", tokens=500.0),
                Source(name="pairs", domain="QA", level="L5", tokens=300, stages=("2",)),
            ),
        ),
        curriculum=(
            Stage(
                name="1",
                tokens=800,
                batch=(Batch(size=2, steps=5), Batch(size=4)),
                learning_rate=rate,
                mixture={"General": 1},
            ),
            Stage(name="2", tokens=400, batch=(Batch(size=4),), learning_rate=rate, mixture={"General": 30, "QA": 70}),
        ),
    )
