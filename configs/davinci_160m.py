"""The recipe on a 159 M model and a hundredth of the tokens: 80 B in four stages of the same shape, for ablations.

Batches are an eighth, so steps, warm-up and ramp shrink to 8 %; the learning rate is doubled, as small models bear
and small budgets want. The report has no such run: the sizes are ours.
"""

import dataclasses
import pathlib

from davinci_jax.curriculum.recipe import STAGES, scaled
from davinci_jax.experiment import CheckpointConfig, EvaluationConfig, Experiment, load_config
from davinci_jax.models import presets

BASE = pathlib.Path(__file__).with_name("davinci_3b.py")


def config() -> Experiment:
    base = load_config(BASE)
    return dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, name="davinci_160m", micro_batch=16),
        model=presets.davinci_160m(),
        curriculum=scaled(STAGES, tokens=1 / 100, batch=1 / 8, learning_rate=2),
        evaluation=EvaluationConfig(every_steps=1000),
        checkpoint=CheckpointConfig(every_steps=1000, keep_every=5000),
    )
