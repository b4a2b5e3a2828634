"""The decoder: a pre-norm transformer of the Qwen and Llama family, dense or with experts.

Parameters, all float32 (V vocabulary, D hidden, L layers, H query heads, G key and value heads, K head size,
F MLP size); blocks are stacked on axis 0 and run by `jax.lax.scan`:

  embed                         [V, D]
  blocks.attention_norm.scale   [L, D]
  blocks.attention.q_proj       [L, D, H, K]     blocks.attention.q_bias  [L, H, K]  (None without qkv_bias)
  blocks.attention.k_proj       [L, D, G, K]     blocks.attention.k_bias  [L, G, K]  (None without qkv_bias)
  blocks.attention.v_proj       [L, D, G, K]     blocks.attention.v_bias  [L, G, K]  (None without qkv_bias)
  blocks.attention.o_proj       [L, H, K, D]
  blocks.attention.q_norm.scale, .k_norm.scale  [L, K]  (None without qk_norm)
  blocks.mlp_norm.scale         [L, D]
  blocks.mlp.gate, .up          [L, D, F]
  blocks.mlp.down               [L, F, D]
  final_norm.scale              [D]
  head                          [D, V]           (None with tied embeddings)

With `config.moe` (E experts of inner width F', a shared expert of width S) the first `first_dense` blocks are stacked
apart, as `dense_blocks` (else None), and in `blocks`, whose L is what remains, the MLP is replaced by

  blocks.mlp.router                     [L, D, E]
  blocks.mlp.expert_gate, .expert_up    [L, E, D, F']
  blocks.mlp.expert_down                [L, E, F', D]
  blocks.mlp.shared.gate, .up, .down    [L, D, S], [L, D, S], [L, S, D]  (shared is None without)
  blocks.mlp.balance                    [L, E]  (None without bias_rate; moved by `rebalance`, not by gradients)

A projection maps x to x W (W's first axis is the input); rotary embeddings use the rotate-half layout.
Initialisation: normal with `init_std`; o_proj, down and expert_down with init_std / sqrt(2 num_layers); biases 0; norm
scales 1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from davinci_jax import ops, sharding
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import ModelConfig
from davinci_jax.layers import Block, Load, RMSNorm, parameters

_SAVED = {
    "full": ("router_logits",),
    "save_attention": ("router_logits", "qkv", "attention_out"),
    "save_mlp": ("router_logits", "qkv", "attention_out", "mid", "mlp_in", "moe_gate", "moe_up"),
}


class Decoder(nnx.Module):
    """A decoder as a pytree of float32 parameters; see the module's docstring for their names and shapes."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        self.config = config
        v, d, std = config.vocab_size, config.hidden_size, config.init_std
        self.embed = parameters.normal(embed_key, (v, d), std, "vocab", "embed")
        keys, dense = jax.random.split(blocks_key, config.num_layers), config.moe.first_dense if config.moe else 0
        self.dense_blocks = jax.vmap(functools.partial(Block, config, dense=True))(keys[:dense]) if dense else None
        self.blocks = jax.vmap(functools.partial(Block, config))(keys[dense:])
        self.final_norm = RMSNorm(d, config.norm_eps)
        self.head = None if config.tied_embeddings else parameters.normal(head_key, (d, v), std, "embed", "vocab")

    def hidden(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Final hidden states after the last norm.

        Args:
          tokens: [B, T] int32 ids.
          segment_ids: [B, T] int32, the document of each token; tokens see their own document only.
          positions: [B, T] int32, position inside the document.

        Returns:
          [B, T, D] in the compute dtype.
        """
        return self.hidden_and_load(tokens, segment_ids, positions)[0]

    def hidden_and_load(
        self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, training: bool = False
    ) -> tuple[jax.Array, Load | None]:
        """`hidden`, and the load of the experts of each layer that has some, its arrays stacked on axis 0."""
        cos, sin = self.rope(sharding.constrain(positions, "batch", "sequence"))
        segment_ids = sharding.constrain(segment_ids, "batch", "sequence")

        def body(x, block):
            return block(x, segment_ids, cos, sin, training)

        if self.config.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*_SAVED[self.config.remat])
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x, load = self.embed_tokens(tokens), None
        for stack in self.stacks():
            x, load = jax.lax.scan(body, x, stack)
        return self.final_norm(x), load

    def stacks(self) -> tuple[Block, ...]:
        """The blocks in the order of the forward pass, each stack's parameters on axis 0."""
        return (self.blocks,) if self.dense_blocks is None else (self.dense_blocks, self.blocks)

    def logits(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of all tokens at once, for short inputs; arguments as in `hidden`."""
        return self.project(self.hidden(tokens, segment_ids, positions))

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Rows of the embedding, [B, T] -> [B, T, D] in the compute dtype.

        Each device looks up its own slice of the hidden axis for all tokens, and the slices are exchanged: moving
        activations is cheaper than gathering the table, and its gradient is born divided as the table is.
        """
        if jax.sharding.get_abstract_mesh().empty:
            return ops.embedding_lookup(self.embed[...], tokens).astype(self.config.compute_dtype)
        batch, sequence, embed = "replica", sharding.RULES["sequence"], sharding.RULES["embed"]
        tokens = jax.sharding.reshard(tokens, PartitionSpec(batch, sequence))
        x = ops.embedding_lookup(self.embed[...], tokens, PartitionSpec(batch, sequence, embed))
        return sharding.constrain(x.astype(self.config.compute_dtype), "batch", "sequence", None)

    def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) of `ops.rope_table` for positions [B, T]."""
        scaling = self.config.rope_scaling
        scaling = {} if scaling is None else dataclasses.asdict(scaling)
        return ops.rope_table(positions, ops.rope_frequencies(self.config.head_size, self.config.rope_base, **scaling))

    def project(self, x: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] -> float32 logits [B, T, V]."""
        out_sharding = sharding.out("batch", "sequence", "vocab")
        head = self.output_embedding().astype(x.dtype)
        return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32, out_sharding=out_sharding)

    def output_embedding(self) -> jax.Array:
        """The output head as [V, D]: the embedding when tied."""
        return self.embed[...] if self.head is None else self.head[...].T


def build(config: ModelConfig, key: jax.Array) -> Decoder:
    """Makes a decoder with fresh parameters, divided over the current mesh.

    The numbers do not depend on the mesh: bitwise with jax 0.10, to rounding of the last bits with jax 0.12.

    Raises:
      ConfigError: a parameter axis cannot be divided evenly over the mesh.
    """
    check_divides(config)
    return jax.jit(functools.partial(Decoder, config))(key)


def check_divides(config: ModelConfig) -> None:
    """Raises `ConfigError` unless the current mesh divides the axes of the parameters evenly."""
    sizes = jax.sharding.get_abstract_mesh().shape
    named = {"hidden_size": "embed", "num_heads": "heads", "num_kv_heads": "kv_heads"}
    for field, logical in {**named, "mlp_size": "mlp", "vocab_size": "vocab"}.items():
        axis, value = sharding.RULES[logical], getattr(config, field)
        if value % sizes.get(axis, 1):
            raise ConfigError(
                f"model.{field}",
                value,
                f"does not divide over {sizes[axis]} devices on mesh axis {axis!r}",
                "change the mesh, or use a multiple",
            )


def token_losses(
    decoder: Decoder, tokens: jax.Array, labels: jax.Array, segment_ids: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss of each token, in chunks of `config.loss_chunk` tokens a device.

    Args:
      decoder: the model.
      tokens: [B, T] int32 ids.
      labels: [B, T] int32 target ids, -1 where there is none.
      segment_ids: [B, T] int32, the document of each token.
      positions: [B, T] int32, position inside the document.

    Returns:
      (nll, lse_squared), both [B, T] float32, 0 where the label is -1: the negative log-likelihood in nats, and
      the squared log-partition that z-loss weighs.
    """

    def losses(x: jax.Array, head: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        nll, lse_squared = ops.cross_entropy(_flat(x), head, labels.reshape(-1), decoder.config.loss_chunk)
        return nll.reshape(labels.shape), lse_squared.reshape(labels.shape)

    each = sharding.spec("batch", "sequence")
    return _on_each_device(losses, decoder, decoder.hidden(tokens, segment_ids, positions), labels, (each, each))


def training_loss(
    decoder: Decoder, tokens: jax.Array, labels: jax.Array, segment_ids: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array, Load | None]:
    """The loss of a training step, in which experts may be full.

    Args:
      decoder, tokens, labels, segment_ids, positions: see `token_losses`.

    Returns:
      The sum over all targets of nll + z_loss lse^2, a float32 scalar, whose gradients need no logits twice; nll
      [B, T], through which no gradient flows; and the load of the experts of each layer, if it has some.
    """
    x, load = decoder.hidden_and_load(tokens, segment_ids, positions, training=True)
    each = sharding.spec("batch", "sequence")
    axes = tuple(axis for entry in each for axis in ((entry,) if isinstance(entry, str) else entry or ()))

    def losses(x: jax.Array, head: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        config = decoder.config
        total, nll = ops.cross_entropy_sum(_flat(x), head, labels.reshape(-1), config.loss_chunk, config.z_loss)
        alone = jax.sharding.get_abstract_mesh().empty
        return total if alone else jax.lax.psum(total, axes), nll.reshape(labels.shape)

    return *_on_each_device(losses, decoder, x, labels, (PartitionSpec(), each)), load


def rebalance(decoder: Decoder, counts: jax.Array) -> Decoder:
    """Moves the bias of every expert by `bias_rate` towards an even load: up where it had less than the mean.

    Args:
      decoder: the model; one whose bias does not move comes back as it is.
      counts: [L, E] int32, `Load.counts` summed over a step.

    References:
      Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, 2024, arXiv 2408.15664,
      algorithm 1.
    """
    if decoder.config.moe is None or not decoder.config.moe.bias_rate:
        return decoder
    load = counts.astype(jnp.float32)
    move = decoder.config.moe.bias_rate * jnp.sign(load.mean(axis=1, keepdims=True) - load)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + move if is_state(path) else leaf, decoder)


def is_state(path: tuple) -> bool:
    """Whether a leaf of a decoder, by its key path, is state that no gradient moves."""
    return any(getattr(key, "name", None) == "balance" for key in path)


def _on_each_device(
    losses: Callable, decoder: Decoder, x: jax.Array, labels: jax.Array, out_specs: tuple[PartitionSpec, ...]
) -> tuple[jax.Array, ...]:
    """`losses(x, head, labels)` on each device's own tokens, for the output head on hidden states [B, T, D]."""
    head = decoder.output_embedding()
    if jax.sharding.get_abstract_mesh().empty:
        return losses(x, head, labels)
    fsdp = sharding.RULES["embed"]
    tokens_spec, x_spec = sharding.spec("batch", "sequence"), sharding.spec("batch", "sequence", None)

    def local(x, head, labels):
        # Each device gathers the head once and sums its own tokens' gradient, which is then reduced and divided in
        # one step; left to the partitioner, every chunk would reduce a whole [V, D]. It travels as float32, so that
        # its gradient is reduced as float32.
        head = jax.lax.pcast(head, ("replica", "context"), to="varying")
        head = jax.lax.all_gather(head, fsdp, axis=1, tiled=True)
        return losses(x, head, labels)

    head_spec = PartitionSpec(None, fsdp)
    run = jax.shard_map(local, in_specs=(x_spec, head_spec, tokens_spec), out_specs=out_specs)
    return run(x, jax.sharding.reshard(head, head_spec), jax.sharding.reshard(labels, tokens_spec))


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])
