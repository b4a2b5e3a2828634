"""The recipe of daVinci-LLM 3B on a 7.6 B model: same tokens, batches, learning rates and mixtures."""

import dataclasses
import pathlib

from davinci_jax.experiment import Experiment, load_config
from davinci_jax.models import presets

BASE = pathlib.Path(__file__).with_name("davinci_3b.py")


def config() -> Experiment:
    base = load_config(BASE)
    return dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, name="davinci_7b", micro_batch=2),
        model=presets.davinci_7b(),
    )
