"""The public grouped matmul: checks, choice of a backend, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import ArgumentError
from pallas_kernels.kernels.grouped_matmul import dispatch
from pallas_kernels.partition import vary_alike

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


@dataclasses.dataclass(frozen=True)
class GroupedMatmulConfig:
    """Block sizes of the three kernels, each a config of the device's kernel; None looks them up."""

    forward: object | None = None
    grad_x: object | None = None
    grad_w: object | None = None


def grouped_matmul(
    x: jax.Array,
    w: jax.Array | tuple[jax.Array, jax.Array],
    group_sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    transpose_w: bool = False,
    activation: str | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: dispatch.Backend = "auto",
    config: GroupedMatmulConfig | None = None,
) -> jax.Array:
    """Multiplies each row by the matrix of its group; rows are sorted by group (Gale et al. 2022, arXiv 2211.15841).

    The first group_sizes[0] rows belong to group 0, the next group_sizes[1] to group 1, and so on; rows past the sum
    give zeros. Sums are float32. Gradients go to `x` and `w`, through two more grouped products. K and N may be divided
    over a mesh; rows may not, unless the call is inside a `shard_map` with sizes of the groups on each device.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      w: [G, K, N] of the dtype of `x`, or a pair (gate, up) of them with an activation.
      group_sizes: [G] int32; the sum is at most the number of rows, which is checked only where the values are known
        (outside of `jit`).
      rows: [M'] int32; the rows to multiply are then x[rows], with indices from 0 to M - 1.
      transpose_w: w is [G, N, K].
      activation: "swiglu" gives silu(x gate) * (x up) (Shazeer 2020, arXiv 2002.05202); None with a single `w`.
      out_dtype: of the result; that of `x` by default.
      backend: "auto" takes the Pallas kernel where there is one for the device and shape, "pallas" insists on it.
      config: block sizes of the kernels; None looks them up.

    Returns:
      [M, N], or [M', N] with `rows`.

    Raises:
      ArgumentError: shapes, dtypes or values that do not fit together; it names the argument.
      UnsupportedError: `backend` is "pallas" and there is no kernel for this case.
    """
    weights = check(x, w, group_sizes, rows, transpose_w, activation)
    group_sizes = jnp.asarray(group_sizes)
    columns = weights[0].shape[1 if transpose_w else 2]
    chosen = dispatch.choose("grouped_matmul", backend, x.shape[1], columns, x.dtype)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    x, group_sizes, rows, *weights = vary_alike(x, group_sizes, rows, *weights)
    static = (chosen, transpose_w, out_dtype, config or GroupedMatmulConfig())
    if activation is None:
        return _multiply(x, weights[0], group_sizes, rows, static)
    return _multiply_gated(x, *weights, group_sizes, rows, static)


def grouped_matmul_transposed(
    x: jax.Array,
    y: jax.Array,
    group_sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: dispatch.Backend = "auto",
    config: object | None = None,
) -> jax.Array:
    """For each group g the sum over its rows m of x[m, :, None] * y[m, None, :]: the gradient of grouped weights.

    Rows past the sum of the groups count nowhere. It is not differentiable; `grouped_matmul` is.

    Args:
      x: [M, K].
      y: [M, N] of the dtype of `x`.
      group_sizes: [G] int32, as in `grouped_matmul`.
      rows: [M'] int32, with x[rows] in place of x, and y [M', N].
      out_dtype, backend: as in `grouped_matmul`.
      config: block sizes of the kernel.

    Returns:
      [G, K, N]; zeros for an empty group.
    """
    count = check_rows("grouped_matmul_transposed", x, group_sizes, rows)
    if y.ndim != 2 or y.shape[0] != count or y.dtype != x.dtype:
        problem = f"is {y.dtype}{list(y.shape)} beside {count} rows of {x.dtype}"
        raise ArgumentError("grouped_matmul_transposed", "y", problem, "give (rows, columns) in the dtype of x")
    chosen = dispatch.choose("grouped_matmul_transposed", backend, x.shape[1], y.shape[1], x.dtype)
    x, y, group_sizes, rows = vary_alike(x, y, jnp.asarray(group_sizes), rows)
    return dispatch.transposed_product(chosen, x, y, group_sizes, rows=rows, out_dtype=out_dtype, config=config)


def check(x, w, group_sizes, rows, transpose_w: bool, activation: str | None) -> tuple[jax.Array, ...]:
    """Checks the arguments of `grouped_matmul`; the weights as a tuple."""
    name = "grouped_matmul"
    if activation not in (None, "swiglu"):
        raise ArgumentError(name, "activation", f"is {activation!r}", 'choose None or "swiglu"')
    weights = tuple(w) if isinstance(w, (tuple, list)) else (w,)
    if len(weights) != (1 if activation is None else 2):
        problem = f"holds {len(weights)} arrays, with activation {activation!r}"
        raise ArgumentError(name, "w", problem, 'give one array, or (gate, up) with activation="swiglu"')
    check_rows(name, x, group_sizes, rows)
    for each in weights:
        if each.ndim != 3 or each.shape[0] != group_sizes.shape[0] or each.shape != weights[0].shape:
            problem = f"has shape {each.shape} for {group_sizes.shape[0]} groups"
            raise ArgumentError(name, "w", problem, "give (groups, depth, columns)")
        if each.shape[2 if transpose_w else 1] != x.shape[1]:
            problem = f"has shape {each.shape}, which does not fit rows of {x.shape[1]}"
            remedy = "give (groups, columns, depth)" if transpose_w else "give (groups, depth, columns)"
            raise ArgumentError(name, "w", problem, remedy)
        if each.dtype != x.dtype:
            raise ArgumentError(name, "w", f"is {each.dtype}, x is {x.dtype}", "give both in one dtype")
    return weights


def check_rows(name: str, x, group_sizes, rows) -> int:
    """Checks the rows of a grouped product and the sizes of their groups; the number of rows."""
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ArgumentError(name, "x", f"is {x.dtype}{list(x.shape)}", "give floating numbers (rows, depth)")
    if rows is not None and (rows.ndim != 1 or rows.dtype != jnp.int32):
        raise ArgumentError(name, "rows", f"is {rows.dtype}{list(rows.shape)}", "give an int32 vector")
    count = x.shape[0] if rows is None else rows.shape[0]
    check_group_sizes(name, group_sizes, count)
    return count


def check_group_sizes(name: str, group_sizes, count: int) -> None:
    """Refuses sizes of another type; and values that do not fit `count` rows, where they are known."""
    if group_sizes.ndim != 1 or group_sizes.shape[0] == 0 or group_sizes.dtype != jnp.int32:
        problem = f"is {group_sizes.dtype}{list(group_sizes.shape)}"
        raise ArgumentError(name, "group_sizes", problem, "give an int32 vector, one size a group")
    if isinstance(group_sizes, jax.core.Tracer):
        return
    if isinstance(group_sizes, jax.Array) and not group_sizes.is_fully_addressable:
        return
    sizes = np.asarray(group_sizes).astype(np.int64)
    if sizes.min() < 0 or sizes.sum() > count:
        problem = f"has values from {sizes.min()} on that sum to {sizes.sum()}, with {count} rows"
        raise ArgumentError(
            name, "group_sizes", problem, "give sizes that are not negative and sum to at most the rows"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _multiply(x, w, group_sizes, rows, static):
    backend, transpose_w, out_dtype, config = static
    options = {"transpose_w": transpose_w, "out_dtype": out_dtype, "config": config.forward}
    return dispatch.product(backend, x, w, group_sizes, rows=rows, **options)


def _multiply_fwd(x, w, group_sizes, rows, static):
    return _multiply(x, w, group_sizes, rows, static), (x, w, group_sizes, rows)


def _multiply_bwd(static, residuals, dy):
    x, w, group_sizes, rows = residuals
    backend, transpose_w, _, config = static
    dy = dy.astype(x.dtype)
    dx = grad_x(backend, dy, w, group_sizes, transpose_w, config)
    dw = grad_w(backend, x, dy, group_sizes, rows, transpose_w, config)
    return _scatter(dx, x, rows), dw, None, None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _multiply_gated(x, gate, up, group_sizes, rows, static):
    backend, transpose_w, out_dtype, config = static
    options = {"transpose_w": transpose_w, "out_dtype": out_dtype, "config": config.forward}
    return dispatch.gated_product(backend, x, gate, up, group_sizes, rows=rows, **options)[0]


def _multiply_gated_fwd(x, gate, up, group_sizes, rows, static):
    backend, transpose_w, out_dtype, config = static
    options = {"transpose_w": transpose_w, "out_dtype": out_dtype, "config": config.forward, "keep": True}
    hidden, gated, plain = dispatch.gated_product(backend, x, gate, up, group_sizes, rows=rows, **options)
    return hidden, (x, gate, up, group_sizes, rows, gated, plain)


def _multiply_gated_bwd(static, residuals, dy):
    x, gate, up, group_sizes, rows, gated, plain = residuals
    backend, transpose_w, _, config = static
    dgated, dplain = (d.astype(x.dtype) for d in swiglu_grad(gated, plain, dy.astype(jnp.float32)))
    dx = grad_x(backend, dgated, gate, group_sizes, transpose_w, config)
    dx += grad_x(backend, dplain, up, group_sizes, transpose_w, config)
    dgate = grad_w(backend, x, dgated, group_sizes, rows, transpose_w, config)
    dup = grad_w(backend, x, dplain, group_sizes, rows, transpose_w, config)
    return _scatter(dx, x, rows), dgate, dup, None, None


_multiply_gated.defvjp(_multiply_gated_fwd, _multiply_gated_bwd)


def swiglu_grad(gated: jax.Array, plain: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of silu(gated) * plain in float32."""
    gated, plain = gated.astype(jnp.float32), plain.astype(jnp.float32)
    gate = jax.nn.sigmoid(gated)
    return dy * plain * gate * (1 + gated * (1 - gate)), dy * gated * gate


def grad_x(backend, dy, w, group_sizes, transpose_w, config: GroupedMatmulConfig) -> jax.Array:
    """Gradient of the (gathered) rows, in their dtype."""
    options = {"transpose_w": not transpose_w, "config": config.grad_x}
    return dispatch.product(backend, dy, w, group_sizes, **options)


def grad_w(backend, x, dy, group_sizes, rows, transpose_w, config: GroupedMatmulConfig) -> jax.Array:
    """Gradient of the weights, in the dtype of the rows."""
    if not transpose_w:
        return dispatch.transposed_product(backend, x, dy, group_sizes, rows=rows, config=config.grad_w)
    x = x if rows is None else x[rows]
    return dispatch.transposed_product(backend, dy, x, group_sizes, config=config.grad_w)


def _scatter(dx, x, rows):
    """The gradient of x from that of x[rows], summed in float32."""
    if rows is None:
        return dx
    total = jax.ops.segment_sum(dx.astype(jnp.float32), rows, x.shape[0])
    return total.astype(x.dtype)
