"""The optimizer of a decoder: which parameter is decayed, and which rule updates it."""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from davinci_jax.experiment import OptimizerConfig
from davinci_jax.optimizers.muon import Path, muon
from davinci_jax.optimizers.newton_schulz import Matrix

# Blocks are stacked, so the number of axes says nothing: a bias [L, H, K] has as many as a matrix [L, D, F].
MATRICES = MappingProxyType(
    {
        "q_proj": Matrix(stack=1, rows=1),
        "k_proj": Matrix(stack=1, rows=1),
        "v_proj": Matrix(stack=1, rows=1),
        "o_proj": Matrix(stack=1, rows=2),
        "gate": Matrix(stack=1, rows=1),
        "up": Matrix(stack=1, rows=1),
        "down": Matrix(stack=1, rows=1),
        "router": Matrix(stack=1, rows=1),
        "expert_gate": Matrix(stack=2, rows=1),
        "expert_up": Matrix(stack=2, rows=1),
        "expert_down": Matrix(stack=2, rows=1),
    }
)
EMBEDDINGS = frozenset({"embed", "head"})
VECTORS = frozenset({"scale", "q_bias", "k_bias", "v_bias"})
STATE = frozenset({"balance"})  # moved by its own rule, see `models.decoder.rebalance`


def build(
    config: OptimizerConfig, schedule: optax.ScalarOrSchedule, decoder: Any = None
) -> optax.GradientTransformation:
    """Returns the optax chain that `config` describes, for the parameters of a decoder.

    The gradient is clipped at a global norm over all parameters, then "adamw" updates every parameter with AdamW
    (Loshchilov and Hutter 2019, arXiv 1711.05101), while "muon" updates the matrices of the blocks with Muon and the
    embedding, the head, the norm scales and the biases with AdamW. Weight decay reaches every matrix, the embedding
    and the head included, as Megatron-LM and the Qwen2 family do; norm scales and biases never decay. The moments have
    the dtype and the sharding of the parameters. State that the decoder carries along gets no moments and no update.

    Args:
      config: the numbers.
      schedule: learning rate, a number or an optax schedule of the step.
      decoder: the parameters, or their abstract form, to check now rather than on `init`.

    Raises:
      ValueError: here or on `init`, if there is a parameter that none of `MATRICES`, `EMBEDDINGS`, `VECTORS` and
        `STATE` names.
    """
    jax.tree_util.tree_map_with_path(decays, decoder)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    if config.name == "muon":
        rule = muon(
            schedule,
            matrix=block_matrix,
            decays=decays,
            momentum=config.muon_momentum,
            steps=config.muon_steps,
            rms=config.muon_rms,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    else:
        rule = optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=functools.partial(jax.tree_util.tree_map_with_path, decays),
        )
    return _without_state(optax.chain(clip, rule))


def _without_state(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` on the parameters alone; its state has no place for what is in `STATE`, whose updates are zero."""

    def is_state(path: Path) -> bool:
        return _name(path) in STATE

    def trained(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: optax.MaskedNode() if is_state(path) else leaf, tree)

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, Any]:
        new, state = rule.update(trained(updates), state, None if params is None else trained(params))
        leaves = iter(jax.tree.leaves(new))
        whole = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.zeros_like(leaf) if is_state(path) else next(leaves), updates
        )
        return whole, state

    return optax.GradientTransformation(lambda params: rule.init(trained(params)), update)


def block_matrix(path: Path, leaf: Any) -> Matrix | None:
    """Returns how a block's matrix is read, or `None` for every other parameter; raises as `build` says."""
    del leaf
    return MATRICES.get(_name(path))


def decays(path: Path, leaf: Any) -> bool:
    """Returns whether weight decay reaches the parameter: matrices and embeddings; raises as `build` says."""
    del leaf
    return _name(path) not in VECTORS


def _name(path: Path) -> str:
    """Returns the parameter's own name, the last part of the path that the tables know."""
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    for part in reversed(parts):
        if part in MATRICES or part in EMBEDDINGS or part in VECTORS or part in STATE:
            return part
    tables = "MATRICES, EMBEDDINGS, VECTORS or STATE"
    raise ValueError(f"no optimizer rule for parameter {'.'.join(parts)}: name it in {tables}")
