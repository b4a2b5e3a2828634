"""configs/quickstart.py with a mixture of experts: 2.1 M parameters, of which 1.0 M work on a token.

Same data, stages and learning rate; `davinci curate` and `davinci shard` of the quickstart serve both.
"""

import dataclasses
import pathlib

from davinci_jax.experiment import Experiment, load_config
from davinci_jax.models import presets

BASE = pathlib.Path(__file__).with_name("quickstart.py")


def config() -> Experiment:
    """The experiment."""
    base = load_config(BASE)
    return dataclasses.replace(
        base, run=dataclasses.replace(base.run, name="quickstart_moe"), model=presets.davinci_moe_tiny()
    )
