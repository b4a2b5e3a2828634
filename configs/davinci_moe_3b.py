"""The report's recipe on a mixture of experts: 3.06 B parameters, of which 0.60 B work on a token; 2 T tokens.

Data and stages are those of configs/davinci_3b.py on a quarter of the tokens: about what a model with a fifth of the
active parameters bears. The report has no such run: the model is `presets.davinci_moe_3b`, the budget is ours.
Experts are balanced by a bias (arXiv 2408.15664); variants are overrides:

  with the classic losses too:      model.moe.aux_loss=0.001 model.moe.router_z_loss=0.001
  without the bias:                 model.moe.bias_rate=none
"""

import dataclasses
import pathlib

from davinci_jax.curriculum.recipe import STAGES, scaled
from davinci_jax.experiment import Experiment, load_config
from davinci_jax.models import presets

BASE = pathlib.Path(__file__).with_name("davinci_3b.py")


def config() -> Experiment:
    base = load_config(BASE)
    return dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, name="davinci_moe_3b"),
        model=presets.davinci_moe_3b(),
        curriculum=scaled(STAGES, tokens=1 / 4, batch=1 / 2),
    )
