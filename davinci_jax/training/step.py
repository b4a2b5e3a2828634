"""One optimizer step: micro-batches accumulate to the global batch in one compiled function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from davinci_jax.data.batch import Batch
from davinci_jax.experiment import ModelConfig
from davinci_jax.layers import Load
from davinci_jax.models.decoder import Decoder, rebalance, training_loss
from davinci_jax.training.state import TrainState

StepFunction = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, num_sources: int, state: Any
) -> StepFunction:
    """Returns the jitted step `(state, batch, num_micro) -> (state, metrics)`; the state is donated.

    The batch holds int32 [micro, rows, L] arrays, of which the first `num_micro` (int32 scalar) count: the bound is
    a traced value, so a batch ramp compiles once. Gradients are those of the mean loss over the global batch's
    targets, whatever the number of micro-batches and devices.

    Metrics, float32: "loss" (mean negative log-likelihood), "grad_norm" (before clipping), "param_norm" (after the
    step), and per source [num_sources] "nll" (sum), "targets" and "rows" (counts). A model with experts adds, per
    layer that has some, "expert_load" [L, E] and "expert_dropped" [L], int32 sums of `Load.counts` and `Load.dropped`,
    and "expert_balance_loss" and "router_z_loss" [L], means. The bias of its experts moves after the update.

    Args:
      config: the architecture.
      optimizer: an optax chain over the decoder.
      num_sources: length of the per-source sums.
      state: the state, or its abstract form; its shardings are pinned on the way out.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def step(state: TrainState, batch: Batch, num_micro: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, sums = _accumulate(state.model, batch, num_micro, config, num_sources)
        rows = batch.tokens.shape[1] * batch.tokens.shape[2]
        scale = rows / jnp.maximum(sums["targets"].sum(), 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        if config.moe is not None:
            model = rebalance(model, sums["expert_load"])
            means = ("expert_balance_loss", "router_z_loss")
            sums |= {name: sums[name] / jnp.maximum(sums["targets"].sum(), 1.0) for name in means}
        metrics = {
            "loss": sums["nll"].sum() / jnp.maximum(sums["targets"].sum(), 1.0),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(model),
            **sums,
        }
        return dataclasses.replace(state, step=state.step + 1, model=model, opt_state=opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _accumulate(
    model: Decoder, batch: Batch, num_micro: jax.Array, config: ModelConfig, num_sources: int
) -> tuple[Decoder, dict[str, jax.Array]]:
    """Returns the summed gradients and per-source sums of the first `num_micro` micro-batches.

    The loss of a micro-batch is divided by its number of positions, a constant, so that gradients stay of order one
    in the compute dtype; the caller turns the sum into the mean over the targets that there were. The losses of the
    experts are means over a micro-batch already, and weigh as many targets as it has.
    """
    positions = batch.tokens.shape[1] * batch.tokens.shape[2]

    def loss(model: Decoder, micro: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        arrays = (micro.tokens, micro.labels, micro.segment_ids, micro.positions)
        total, nll, load = training_loss(model, *arrays)
        sums = _source_sums(nll, micro, num_sources)
        if load is not None:
            sums |= _expert_sums(load, sums["targets"].sum())
            total += config.moe.aux_loss * sums["expert_balance_loss"].sum()
            total += config.moe.router_z_loss * sums["router_z_loss"].sum()
        return total / positions, sums

    def body(n: jax.Array, carry: tuple[Decoder, dict]) -> tuple[Decoder, dict]:
        micro = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, n, keepdims=False), batch)
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(model, micro)
        return jax.tree.map(jnp.add, carry, (grads, sums))

    zeros = {name: jnp.zeros(num_sources, jnp.float32) for name in ("nll", "targets", "rows")}
    if config.moe is not None:
        layers, experts = model.blocks.mlp.router.shape[0], config.moe.experts
        none, zero = jnp.zeros(layers, jnp.int32), jnp.float32(0.0)
        zeros |= _expert_sums(Load(jnp.zeros((layers, experts), jnp.int32), none, none * zero, none * zero), zero)
    return jax.lax.fori_loop(0, num_micro, body, (jax.tree.map(jnp.zeros_like, model), zeros))


def _source_sums(nll: jax.Array, micro: Batch, num_sources: int) -> dict[str, jax.Array]:
    """Returns float32 [num_sources] sums of nll [B, L], targets and rows; a row belongs to one source."""
    member = jax.nn.one_hot(micro.sources, num_sources, dtype=jnp.float32)
    targets = (micro.labels >= 0).sum(axis=-1).astype(jnp.float32)
    rows = {"nll": nll.sum(axis=-1), "targets": targets, "rows": jnp.ones_like(targets)}
    return {name: jnp.einsum("bs,b->s", member, value, out_sharding=P(None)) for name, value in rows.items()}


def _expert_sums(load: Load, targets: jax.Array) -> dict[str, jax.Array]:
    """Returns what a micro-batch of so many targets adds to the sums of a step; arrays have the layers on axis 0."""
    return {
        "expert_load": load.counts,
        "expert_dropped": load.dropped,
        "expert_balance_loss": load.balance_loss * targets,
        "router_z_loss": load.z_loss * targets,
    }
