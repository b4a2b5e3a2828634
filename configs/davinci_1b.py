"""The recipe on a 1.5 B model and an eighth of the tokens: 1 T in four stages of the same shape.

Batches are halved, so steps, warm-up and ramp shrink to a quarter; the learning rate stays. The report has no such
run: the sizes are ours.
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
        run=dataclasses.replace(base.run, name="davinci_1b", micro_batch=8),
        model=presets.davinci_1b(),
        curriculum=scaled(STAGES, tokens=1 / 8, batch=1 / 2),
        evaluation=EvaluationConfig(every_steps=2500),
        checkpoint=CheckpointConfig(every_steps=2500, keep_every=2500),
    )
