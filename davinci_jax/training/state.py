"""What a checkpoint holds and the step advances."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from davinci_jax import optimizers
from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.experiment import Experiment, ModelConfig
from davinci_jax.models.decoder import Decoder, build
from davinci_jax.training.trees import abstract


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run between two steps.

    Attributes:
      step: int32 scalar, the number of steps done.
      model: parameters, float32.
      opt_state: state of the optax chain, sharded like the parameters it belongs to.
    """

    step: jax.Array
    model: Decoder
    opt_state: Any


def make_optimizer(experiment: Experiment, timeline: Timeline) -> optax.GradientTransformation:
    """Returns the optimizer of a run, with the learning rates of its stages as the schedule."""
    decoder = jax.eval_shape(functools.partial(build, experiment.model), jax.random.key(0))
    return optimizers.build(experiment.optimizer, timeline.learning_rates(), decoder)


def init_state(config: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step, made in place on the devices of the current mesh."""
    return jax.jit(functools.partial(_init, config, optimizer, seed))()


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns shapes, dtypes and shardings of `init_state` on the current mesh, computing nothing."""
    return abstract(functools.partial(_init, config, optimizer, seed))


def _init(config: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    model = build(config, jax.random.key(seed))
    return TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=optimizer.init(model))
