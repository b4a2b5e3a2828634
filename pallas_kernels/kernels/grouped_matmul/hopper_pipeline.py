"""The ring of stages in shared memory through which one warpgroup of a Hopper kernel feeds those that multiply."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Stages are numbered through the whole kernel, from 0; stage number i uses slot i mod `stages`.

    Attributes:
      full: a barrier for each slot: all copies into it have arrived.
      empty: a barrier for each slot: every consumer has read it.
      stages: the number of slots.
    """

    full: Any
    empty: Any
    stages: int

    def slot(self, stage: jax.Array) -> jax.Array:
        return lax.rem(stage, jnp.int32(self.stages))

    def acquire(self, stage: jax.Array) -> jax.Array:
        """For the producer: the slot of a stage, once consumers have read what it held before."""
        slot = self.slot(stage)
        pl.when(stage >= self.stages)(lambda: plgpu.barrier_wait(self.empty.at[slot]))
        return slot

    def drain(self, loaded: jax.Array) -> None:
        """For the producer at its end: awaits every arrival, so that the barriers end in a known phase."""
        for slot in range(self.stages):

            @pl.when(slot < loaded)
            def _(slot=slot):
                plgpu.barrier_wait(self.empty.at[slot])

    def wait(self, slot: jax.Array) -> None:
        """For a consumer: until the slot is loaded."""
        plgpu.barrier_wait(self.full.at[slot])

    def release(self, stage: jax.Array) -> None:
        """For a consumer: it has read the stage."""
        plgpu.barrier_arrive(self.empty.at[self.slot(stage)])
