"""A mixture of experts in place of the MLP of a block."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from davinci_jax import ops, sharding
from davinci_jax.experiment import ModelConfig
from davinci_jax.layers import parameters
from davinci_jax.layers.mlp import Mlp


class Load(NamedTuple):
    """What the experts of a layer had to do, over the tokens of all devices.

    Attributes:
      counts: [E] int32, tokens whose router chose each expert.
      dropped: int32 scalar, choices that went unheard because their expert was full.
      balance_loss: float32 scalar, `ops.load_balance_loss`; 1 where scores and loads are even.
      z_loss: float32 scalar, mean squared log-partition of the router's logits.
    """

    counts: jax.Array
    dropped: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array


class MoeMlp(nnx.Module):
    """sum_e w_e expert_e(x) over the experts chosen for each token, plus the shared expert; every one a SwiGLU MLP.

    Parameters, float32, for E experts of inner width F: router [D, E], expert_gate and expert_up [E, D, F],
    expert_down [E, F, D], and the module shared (an `Mlp`; `None` without). With `config.moe.bias_rate` also balance
    [E], which is state and no parameter: it has no gradient, and begins at zero.

    The router works in float32. Each device routes its own tokens and gathers the experts as it needs them.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        moe, d, std = config.moe, config.hidden_size, config.init_std
        e, f = moe.experts, moe.expert_size
        router_key, gate_key, up_key, down_key, shared_key = jax.random.split(key, 5)
        self.config = moe
        self.router = parameters.normal(router_key, (d, e), std, "embed", "expert")
        self.expert_gate = parameters.normal(gate_key, (e, d, f), std, "expert", "embed", "mlp")
        self.expert_up = parameters.normal(up_key, (e, d, f), std, "expert", "embed", "mlp")
        down_std = parameters.residual_std(std, config.num_layers)
        self.expert_down = parameters.normal(down_key, (e, f, d), down_std, "expert", "mlp", "embed")
        self.shared = Mlp(config, shared_key, moe.shared_size) if moe.shared_size else None
        self.balance = None if moe.bias_rate is None else parameters.state(0.0, (e,), None)

    def __call__(self, x: jax.Array, training: bool = False) -> tuple[jax.Array, Load]:
        """[B, T, D] -> ([B, T, D] in the same dtype, the load); `training` applies `config.moe.capacity`."""
        y, load = self._routed(x, self.config.capacity if training else None)
        return y if self.shared is None else y + self.shared(x), load

    def _routed(self, x: jax.Array, capacity: float | None) -> tuple[jax.Array, Load]:
        experts = (self.expert_gate[...], self.expert_up[...], self.expert_down[...])
        balance = None if self.balance is None else jax.lax.stop_gradient(self.balance[...])
        local = functools.partial(self._local, capacity=capacity)
        if jax.sharding.get_abstract_mesh().empty:
            return local(x, self.router[...], balance, *experts, axes=())
        rows, fsdp = sharding.spec("batch", "sequence", None), sharding.RULES["embed"]
        axes = ("replica", "fsdp", "context")

        def gathered(x, router, balance, *experts):
            # Every device sums its own tokens' gradients; they are reduced and divided in one step, in float32.
            router, *experts = (jax.lax.pcast(w, ("replica", "context"), to="varying") for w in (router, *experts))
            router = jax.lax.all_gather(router, fsdp, axis=0, tiled=True)
            experts = (ops.gather_weight(w, x.dtype, fsdp, axis) for w, axis in zip(experts, (1, 1, 2), strict=True))
            return local(x, router, balance, *experts, axes=axes)

        split_in, split_out = PartitionSpec(None, fsdp, None), PartitionSpec(None, None, fsdp)
        in_specs = (rows, PartitionSpec(fsdp, None), PartitionSpec(None), split_in, split_in, split_out)
        arrays = (x, self.router[...], balance, *experts)
        arrays = (a if a is None else jax.sharding.reshard(a, s) for a, s in zip(arrays, in_specs, strict=True))
        whole = Load(PartitionSpec(None), PartitionSpec(), PartitionSpec(), PartitionSpec())
        return jax.shard_map(gathered, in_specs=in_specs, out_specs=(rows, whole))(*arrays)

    def _local(self, x, router, balance, gate, up, down, *, capacity, axes) -> tuple[jax.Array, Load]:
        """This device's tokens [B, T, D] through whole experts; sums of the load go over the mesh `axes`."""
        moe, tokens = self.config, x.reshape(-1, x.shape[-1])
        # Every remat policy keeps the logits, so that backward and forward choose the same experts to the last bit.
        logits = checkpoint_name(ops.router_logits(tokens, router), "router_logits")
        limit = None if capacity is None else math.ceil(capacity * len(tokens) * moe.experts_per_token / moe.experts)
        choose = functools.partial(
            ops.route,
            logits,
            top_k=moe.experts_per_token,
            score=moe.score,
            bias=balance,
            groups=None if moe.groups == 1 else (moe.groups, moe.groups_kept),
            threshold=moe.threshold,
            normalize=moe.normalize,
            scale=moe.scale,
        )
        routing = choose(capacity=limit)
        y = ops.moe_mlp(tokens, routing, gate.astype(x.dtype), up.astype(x.dtype), down.astype(x.dtype))
        chosen = routing.group_sizes if limit is None else choose().group_sizes
        counts = ops.sum_over(chosen.astype(jnp.int32), axes)
        heard = ops.sum_over(routing.group_sizes.astype(jnp.int32), axes)
        load = Load(
            counts=counts,
            dropped=jnp.sum(counts - heard),
            balance_loss=ops.load_balance_loss(routing.scores, counts, axes),
            z_loss=ops.router_z_loss(logits, axes),
        )
        return y.reshape(x.shape), load
