"""Orthogonalisation of stacks of matrices, divided over the devices that hold them."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

# Jordan et al. 2024 chose these for the steepest slope at zero: small singular values reach order one in five steps,
# at the price of ending near one rather than at it.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How an array is read as a stack of matrices.

    Attributes:
      stack: number of leading axes that count matrices (layers, experts).
      rows: number of axes after those that are flattened into rows; the remaining ones become columns.

    A query projection [layers, embed, heads, head_size] is `Matrix(stack=1, rows=1)`, an output projection
    [layers, heads, head_size, embed] is `Matrix(stack=1, rows=2)`.
    """

    stack: int = 0
    rows: int = 1

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape [*stack, rows, columns] of an array of the given shape."""
        middle = self.stack + self.rows
        if not self.stack < middle < len(shape):
            raise ValueError(f"an array of shape {shape} cannot be read as {self}")
        return (*shape[: self.stack], math.prod(shape[self.stack : middle]), math.prod(shape[middle:]))


def newton_schulz(
    x: jax.Array,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    eps: float = 1e-7,
) -> jax.Array:
    r"""Returns matrices with the singular vectors of `x` and singular values near one.

    With X_0 = x / max(|x|_F, eps), each step applies the odd quintic p(s) = a s + b s^3 + c s^5 to the singular values:

    .. math:: X_{k+1} = a X_k + (b A_k + c A_k^2) X_k, \qquad A_k = X_k X_k^\top.

    The Frobenius norm bounds the largest singular value, so the iteration starts inside [0, 1]. After five steps the
    values of a well-conditioned matrix lie in about [0.7, 1.2]; a zero matrix stays zero. Tall matrices are turned
    first, so the square products have the shorter side: 4 m^2 n + 2 m^3 FLOPs a step for m <= n.

    Args:
      x: float [..., m, n].
      steps: iterations.
      coefficients: (a, b, c) of the quintic.
      dtype: of the operands; products are summed and weighed in float32. The map pulls every value back towards one,
        so bfloat16 is enough, and twice as fast on accelerators (Jordan et al. 2024); float32 asks for the highest
        precision of the device.
      eps: smallest norm divided by.

    Returns:
      [..., m, n] in `dtype`.

    References:
      Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
      https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = coefficients
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    matmul = functools.partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)
    x = x.astype(jnp.float32)
    x /= jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)), eps)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).astype(dtype)
    for _ in range(steps):
        # The polynomial is weighed in float32, as bfloat16 coefficients would be off by up to 0.2 %, and both its terms
        # use the same rounded Gram matrix: near A = 1 the rounding then enters with b + 2c = -0.7, not with 2c = 4.
        gram = matmul(x, x.mT).astype(dtype)
        polynomial = b * gram.astype(jnp.float32) + c * matmul(gram, gram)
        x = (a * x.astype(jnp.float32) + matmul(polynomial.astype(dtype), x)).astype(dtype)
    return x.mT if tall else x


def orthogonalize(
    x: jax.Array,
    matrix: Matrix,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Returns `newton_schulz` of every matrix in `x`, in the shape, dtype and sharding of `x`.

    Newton-Schulz needs whole matrices, so where explicit sharding divides `x` along rows or columns, the mesh axes in
    question are moved to a stack axis: each device gathers and works on its own matrices and no work is done twice. Of
    several stack axes (layers, experts) it is the one that has to be filled up least, with zero matrices, to be divided
    evenly. Matrices without a stack axis are gathered and computed on every device. Both exchanges are made in `dtype`.

    Args:
      x: float [*stack, *rows, *columns].
      matrix: how to read it.
      steps, coefficients, dtype: as in `newton_schulz`.
    """
    sharding = jax.typeof(x).sharding
    whole, filling = _whole_matrices(sharding, matrix, x.shape)
    y = x.astype(dtype)
    if any(filling):
        y = jnp.pad(y, [(0, extra) for extra in filling])
    if whole is not None:
        y = jax.sharding.reshard(y, whole)
    y = newton_schulz(y.reshape(matrix.shape(y.shape)), steps, coefficients, dtype).reshape(y.shape)
    if whole is not None:
        y = jax.sharding.reshard(y, sharding.spec)
    return (y[tuple(slice(size) for size in x.shape)] if any(filling) else y).astype(x.dtype)


def _whole_matrices(
    sharding: jax.sharding.NamedSharding, matrix: Matrix, shape: tuple[int, ...]
) -> tuple[P | None, list[int]]:
    """Returns the spec under which every matrix lies on one device, and by how much to lengthen each axis for it.

    The spec is `None` where matrices are whole already.
    """
    filling = [0] * len(shape)
    entries = [() if e is None else e if isinstance(e, tuple) else (e,) for e in sharding.spec]
    moved = tuple(axis for axes in entries[matrix.stack :] for axis in axes)
    if not moved:
        return None, filling
    stack = entries[: matrix.stack]
    if stack:
        divided = [math.prod(sharding.mesh.shape[name] for name in (*axes, *moved)) for axes in stack]
        missing = [-size % parts for size, parts in zip(shape, divided, strict=False)]
        axis = min(range(len(stack)), key=lambda axis: missing[axis] / shape[axis])
        stack[axis], filling[axis] = (*stack[axis], *moved), missing[axis]
    return P(*(axes or None for axes in stack), *[None] * (len(shape) - matrix.stack)), filling
