"""Muon: momentum, orthogonalised, for the matrices of a network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from davinci_jax.optimizers.newton_schulz import COEFFICIENTS, Matrix, orthogonalize

Path = tuple[Any, ...]
MatrixRule = Callable[[Path, jax.Array], Matrix | None]
DecayRule = Callable[[Path, jax.Array], bool]


class MuonState(NamedTuple):
    """State of `scale_by_muon`: the exponential average of the gradients, like the parameters in shape and sharding."""

    momentum: optax.Updates


def two_dimensional(path: Path, leaf: jax.Array) -> Matrix | None:
    """The plain rule: an array with two axes is a matrix, anything else is none."""
    del path
    return Matrix() if leaf.ndim == 2 else None


def scale_by_muon(
    momentum: float = 0.95,
    *,
    matrix: MatrixRule = two_dimensional,
    nesterov: bool = True,
    steps: int = 5,
    rms: float = 0.2,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> optax.GradientTransformation:
    r"""Replaces the gradient of every matrix by its orthogonalised momentum.

    .. math::
      M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
      N_t &= \mu M_t + (1 - \mu) G_t \quad \text{(Nesterov; else } N_t = M_t) \\
      U_t &= \rho \sqrt{\max(m, n)} \; \mathrm{NewtonSchulz}(N_t)

    An orthogonal m x n matrix has root mean square 1 / sqrt(max(m, n)), so the update has about `rms`, whatever the
    shape. AdamW's updates have 0.2 to 0.4 in practice, so the default lets one learning rate and one weight decay
    serve both (Liu et al. 2025, section 2.2).

    Args:
      momentum: decay mu of the average.
      matrix: rule (path, leaf) -> `Matrix`, how to read a leaf as matrices. Every leaf must be one; `muon` sends the
        others elsewhere.
      nesterov: look one step ahead.
      steps: Newton-Schulz iterations.
      rms: root mean square rho of an update.
      coefficients: (a, b, c) of the quintic.
      dtype: of the iteration, see `newton_schulz`; momentum and result keep the gradient's dtype.

    Raises:
      ValueError: on `update`, if a leaf cannot be read as matrices.

    References:
      Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
      https://kellerjordan.github.io/posts/muon/
      Liu et al., Muon is Scalable for LLM Training, 2025, https://arxiv.org/abs/2502.16982
    """

    def scaled(path: Path, leaf: jax.Array) -> jax.Array:
        how = matrix(path, leaf)
        if how is None:
            raise ValueError(f"{jax.tree_util.keystr(path)} of shape {leaf.shape} is no matrix to its rule")
        rows, columns = how.shape(leaf.shape)[-2:]
        return rms * math.sqrt(max(rows, columns)) * orthogonalize(leaf, how, steps, coefficients, dtype)

    def init(params: optax.Params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        average = functools.partial(jax.tree.map, lambda m, g: momentum * m + (1 - momentum) * g)
        averaged = average(state.momentum, updates)
        ahead = average(averaged, updates) if nesterov else averaged
        return jax.tree_util.tree_map_with_path(scaled, ahead), MuonState(averaged)

    return optax.GradientTransformation(init, update)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    matrix: MatrixRule = two_dimensional,
    decays: DecayRule = lambda path, leaf: leaf.ndim >= 2,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    rms: float = 0.2,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> optax.GradientTransformation:
    """Muon for the matrices, AdamW for every other leaf, one learning rate for both.

    Embeddings and output heads are matrices by shape but belong to AdamW (Jordan et al. 2024); say so with `matrix`.

    Args:
      learning_rate: a number or an optax schedule.
      matrix: rule (path, leaf) -> `Matrix`, or `None` for leaves that go to AdamW.
      decays: rule (path, leaf) -> bool: whether the leaf shrinks by learning_rate * weight_decay a step.
      momentum, nesterov, steps, rms, dtype: as in `scale_by_muon`.
      beta1, beta2, eps: of AdamW.
      weight_decay: decoupled (Loshchilov and Hutter 2019), the same for both.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from davinci_jax.optimizers import muon
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> optimizer = muon(3e-4, weight_decay=0.0)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["kernel"].shape
      (4, 8)
    """

    def labels(params: optax.Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "adam" if matrix(path, leaf) is None else "muon", params
        )

    orthogonal = scale_by_muon(momentum, matrix=matrix, nesterov=nesterov, steps=steps, rms=rms, dtype=dtype)
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps)
    return optax.chain(
        optax.partition({"muon": orthogonal, "adam": adam}, labels),
        optax.add_decayed_weights(weight_decay, functools.partial(jax.tree_util.tree_map_with_path, decays)),
        optax.scale_by_learning_rate(learning_rate),
    )
