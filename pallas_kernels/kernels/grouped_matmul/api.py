"""The public grouped matmul: checks, choice of a backend, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import layout
from pallas_kernels.arguments import Backend, as_floating, as_int32, check_arrays, check_config, check_flag, values
from pallas_kernels.errors import ArgumentError
from pallas_kernels.kernels.elementwise.swiglu import gradients as swiglu_gradients
from pallas_kernels.kernels.grouped_matmul import dispatch
from pallas_kernels.kernels.grouped_matmul.config import GroupedMatmulConfig, TransposedConfig
from pallas_kernels.partition import vary_alike

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
OUT, GATE, UP = "grouped_matmul_out", "grouped_matmul_gate", "grouped_matmul_up"  # names for remat policies


def grouped_matmul(
    x: jax.Array,
    w: jax.Array | tuple[jax.Array, jax.Array],
    group_sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    transpose_w: bool = False,
    activation: str | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: Backend = "auto",
    config: GroupedMatmulConfig | None = None,
) -> jax.Array:
    """Multiplies each row by the matrix of its group; rows are sorted by group (Gale et al. 2022, arXiv 2211.15841).

    The first group_sizes[0] rows belong to group 0, the next group_sizes[1] to group 1, and so on; rows past the sum
    give zeros. Sums are float32. Gradients go to `x` and `w`, through two more grouped products. They keep the
    arguments and, with an activation, x gate and x up, which carry the names "grouped_matmul_gate" and
    "grouped_matmul_up" for remat policies; the result is "grouped_matmul_out".

    N may be divided over a mesh, without an activation K too. Rows and groups that are divided over automatic or
    explicit axes are put together on every device first, and the rows of the result divided again like those of `x`
    (or like `rows`) on explicit axes. The fast way is to divide rows inside a `shard_map`, where `group_sizes` are
    those of the rows at hand.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      w: [G, K, N] of the dtype of `x`, or a pair (gate, up) of them with an activation.
      group_sizes: [G] int32, a list, or integers of NumPy; the sum is at most the number of rows, which is checked only
        where the values are known (outside of `jit`).
      rows: [M'] int32; the rows to multiply are then x[rows]. Those in a group are from 0 to M - 1, which is checked
        where the values are known.
      transpose_w: w is [G, N, K].
      activation: "swiglu" gives silu(x gate) * (x up) (Shazeer 2020, arXiv 2002.05202); None with a single `w`.
      out_dtype: of the result; that of `x` by default.
      backend: "auto" takes the Pallas kernel where there is one for the device and shape, "pallas" insists on it.
      config: block sizes of the kernels, of type `TpuGroupedMatmulConfig` and `TpuGroupedMatmulTransposedConfig` or
        `HopperGroupedMatmulConfig` and `HopperGroupedMatmulTransposedConfig`; None looks them up.

    Returns:
      [M, N], or [M', N] with `rows`.

    Raises:
      ArgumentError: shapes, dtypes or values that do not fit together; it names the argument.
      UnsupportedError: `backend` is "pallas" and there is no kernel for this case.
    """
    name = "grouped_matmul"
    group_sizes = as_int32(name, "group_sizes", group_sizes)
    rows = None if rows is None else as_int32(name, "rows", rows)
    weights = check(x, w, group_sizes, rows, transpose_w, activation)
    out_dtype = as_floating(name, "out_dtype", out_dtype, x.dtype)
    chosen = dispatch.choose(name, backend, x.shape[1], weights[0].shape[1 if transpose_w else 2], x.dtype)
    config = dispatch.configured(name, config, chosen)
    arrays = [None if array is None else jnp.asarray(array) for array in (x, group_sizes, rows, *weights)]
    divided = layout.entries(arrays[0] if rows is None else arrays[2])[0]
    x, group_sizes, rows, *weights = vary_alike(*_together(*arrays, transpose_w=transpose_w))
    product = Product(chosen, config, bool(transpose_w), out_dtype)
    multiply = _multiply if activation is None else _multiply_gated
    out = multiply(x, *weights, group_sizes, rows, product)
    return layout.divide(out, divided, layout.entries(out)[1])


def grouped_matmul_transposed(
    x: jax.Array,
    y: jax.Array,
    group_sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: Backend = "auto",
    config: TransposedConfig | None = None,
) -> jax.Array:
    """For each group g the sum over its rows m of x[m, :, None] * y[m, None, :]: the gradient of grouped weights.

    Rows past the sum of the groups count nowhere. Gradients go to `x` and `y`, through two grouped products that keep
    nothing but the arguments; the result carries the name "grouped_matmul_out" for remat policies. K and N may be
    divided over a mesh, rows as in `grouped_matmul`.

    Args:
      x: [M, K].
      y: [M, N] of the dtype of `x`.
      group_sizes: [G] int32, as in `grouped_matmul`.
      rows: [M'] int32, with x[rows] in place of x, and y [M', N].
      out_dtype, backend: as in `grouped_matmul`.
      config: block sizes of the kernel, a `TpuGroupedMatmulTransposedConfig` or `HopperGroupedMatmulTransposedConfig`;
        None looks them up, as is always done for the gradients.

    Returns:
      [G, K, N]; zeros for an empty group.

    Raises:
      ArgumentError: shapes, dtypes or values that do not fit together; it names the argument.
      UnsupportedError: `backend` is "pallas" and there is no kernel for this case.
    """
    name = "grouped_matmul_transposed"
    group_sizes = as_int32(name, "group_sizes", group_sizes)
    rows = None if rows is None else as_int32(name, "rows", rows)
    check_arrays(name, x=x, y=y)
    out_dtype = as_floating(name, "out_dtype", out_dtype, x.dtype)
    count = check_rows(name, x, group_sizes, rows)
    if y.ndim != 2 or y.shape[0] != count or y.dtype != x.dtype:
        problem = f"is {y.dtype}{list(y.shape)} beside {count} rows of {x.dtype}"
        raise ArgumentError(name, "y", problem, "give (rows, columns) in the dtype of x")
    chosen = dispatch.choose(name, backend, x.shape[1], y.shape[1], x.dtype)
    check_config(name, config, *dispatch.CONFIGS[chosen][1])
    x, y, group_sizes, rows = (None if array is None else jnp.asarray(array) for array in (x, y, group_sizes, rows))
    x, group_sizes, rows = _together(x, group_sizes, rows)
    y = layout.divide(y, None, layout.distinct(layout.entries(x)[1], layout.entries(y)[1])[1])
    x, y, group_sizes, rows = vary_alike(x, y, group_sizes, rows)
    return _multiply_transposed(x, y, group_sizes, rows, TransposedProduct(chosen, config, out_dtype))


def _together(x, group_sizes, rows, *weights, transpose_w: bool = False) -> tuple[jax.Array | None, ...]:
    """The arguments in a layout over explicit mesh axes that the products take: that of the first of the weights.

    Without weights the depth of the rows may stay divided.
    """
    if x.shape[0] == 0 and rows is not None and rows.shape[0]:  # none of them is in a group, but each is looked up
        x = jnp.pad(x, ((0, 1), (0, 0)))
    depth = layout.entries(x)[1]
    if weights:
        depth, columns = layout.entries(weights[0])[1:][:: -1 if transpose_w else 1]
        depth = depth if len(weights) == 1 else None
        weights = [layout.divide(w, None, *((columns, depth) if transpose_w else (depth, columns))) for w in weights]
    indices = None if rows is None else layout.whole(rows)
    return layout.divide(x, None, depth), layout.whole(group_sizes), indices, *weights


def check(x, w, group_sizes, rows, transpose_w: bool, activation: str | None) -> tuple[jax.Array, ...]:
    """Checks the arguments of `grouped_matmul`; the weights as a tuple."""
    name = "grouped_matmul"
    if activation not in (None, "swiglu"):
        raise ArgumentError(name, "activation", f"is {activation!r}", 'choose None or "swiglu"')
    weights = tuple(w) if isinstance(w, (tuple, list)) else (w,)
    if len(weights) != (1 if activation is None else 2):
        problem = f"holds {len(weights)} arrays, with activation {activation!r}"
        raise ArgumentError(name, "w", problem, 'give one array, or (gate, up) with activation="swiglu"')
    check_arrays(name, x=x)
    check_flag(name, "transpose_w", transpose_w)
    check_rows(name, x, group_sizes, rows)
    for each in weights:
        check_arrays(name, w=each)
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
    indices, sizes = (None if each is None else values(each) for each in (rows, group_sizes))
    if indices is not None and sizes is not None:
        grouped = indices[: sizes.sum()]
        if grouped.size and (grouped.min() < 0 or grouped.max() >= x.shape[0]):
            problem = f"has values from {grouped.min()} to {grouped.max()}, with {x.shape[0]} rows in x"
            raise ArgumentError(name, "rows", problem, "give indices of rows")
    return count


def check_group_sizes(name: str, group_sizes, count: int) -> None:
    """Refuses sizes of another type; and values that do not fit `count` rows, where they are known."""
    if group_sizes.ndim != 1 or group_sizes.shape[0] == 0 or group_sizes.dtype != jnp.int32:
        problem = f"is {group_sizes.dtype}{list(group_sizes.shape)}"
        raise ArgumentError(name, "group_sizes", problem, "give an int32 vector, one size a group")
    sizes = values(group_sizes)
    if sizes is None:
        return
    sizes = sizes.astype(np.int64)
    if sizes.min() < 0 or sizes.sum() > count:
        problem = f"has values from {sizes.min()} on that sum to {sizes.sum()}, with {count} rows"
        raise ArgumentError(
            name, "group_sizes", problem, "give sizes that are not negative and sum to at most the rows"
        )


@dataclasses.dataclass(frozen=True)
class Product:
    """What a grouped product and its two gradients are compiled for.

    Attributes:
      choice: what runs the three.
      config: block sizes of each.
      transpose_w: weights are [G, N, K].
      out_dtype: of the product, by default that of the rows; gradients have the dtype of the rows.
    """

    choice: dispatch.Choice
    config: GroupedMatmulConfig
    transpose_w: bool = False
    out_dtype: jax.typing.DTypeLike | None = None

    def forward(self, x, w, group_sizes, rows=None) -> jax.Array:
        return dispatch.product(self.choice, x, w, group_sizes, rows=rows, **self._forward_options())

    def gated_forward(self, x, gate, up, group_sizes, rows, *, keep: bool = False) -> tuple[jax.Array, ...]:
        """(hidden,), and with `keep` (hidden, x gate, x up)."""
        options = {"keep": keep, **self._forward_options()}
        return dispatch.gated_product(self.choice, x, gate, up, group_sizes, rows=rows, **options)

    def grad_x(self, dy, w, group_sizes) -> jax.Array:
        """Gradient of the (gathered) rows."""
        options = {"transpose_w": not self.transpose_w, "config": self.config.grad_x}
        return dispatch.product(self.choice, dy, w, group_sizes, **options)

    def grad_w(self, x, dy, group_sizes, rows=None) -> jax.Array:
        """Gradient of the weights."""
        config = self.config.grad_w
        if not self.transpose_w:
            return dispatch.transposed_product(self.choice, x, dy, group_sizes, rows=rows, config=config)
        x = x if rows is None else x[rows]
        return dispatch.transposed_product(self.choice, dy, x, group_sizes, config=config)

    def _forward_options(self) -> dict:
        return {"transpose_w": self.transpose_w, "out_dtype": self.out_dtype, "config": self.config.forward}


@dataclasses.dataclass(frozen=True)
class TransposedProduct:
    """What a transposed product is compiled for; its gradients leave block sizes to the tables."""

    choice: dispatch.Choice
    config: TransposedConfig | None
    out_dtype: jax.typing.DTypeLike


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _multiply(x, w, group_sizes, rows, product: Product):
    return product.forward(x, w, group_sizes, rows)


def _multiply_fwd(x, w, group_sizes, rows, product: Product):
    return checkpoint_name(_multiply(x, w, group_sizes, rows, product), OUT), (x, w, group_sizes, rows)


def _multiply_bwd(product: Product, residuals, dy):
    x, w, group_sizes, rows = residuals
    dy = dy.astype(x.dtype)
    dx = product.grad_x(dy, w, group_sizes)
    dw = product.grad_w(x, dy, group_sizes, rows)
    return _scatter(dx, x, rows), dw, None, None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _multiply_gated(x, gate, up, group_sizes, rows, product: Product):
    return product.gated_forward(x, gate, up, group_sizes, rows)[0]


def _multiply_gated_fwd(x, gate, up, group_sizes, rows, product: Product):
    hidden, gated, plain = product.gated_forward(x, gate, up, group_sizes, rows, keep=True)
    gated, plain = checkpoint_name(gated, GATE), checkpoint_name(plain, UP)
    return checkpoint_name(hidden, OUT), (x, gate, up, group_sizes, rows, gated, plain)


def _multiply_gated_bwd(product: Product, residuals, dy):
    x, gate, up, group_sizes, rows, gated, plain = residuals
    dgated, dplain = (d.astype(x.dtype) for d in swiglu_gradients(gated, plain, dy))
    dx = product.grad_x(dgated, gate, group_sizes)
    dx += product.grad_x(dplain, up, group_sizes)
    dgate = product.grad_w(x, dgated, group_sizes, rows)
    dup = product.grad_w(x, dplain, group_sizes, rows)
    return _scatter(dx, x, rows), dgate, dup, None, None


_multiply_gated.defvjp(_multiply_gated_fwd, _multiply_gated_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _multiply_transposed(x, y, group_sizes, rows, product: TransposedProduct):
    options = {"out_dtype": product.out_dtype, "config": product.config}
    return dispatch.transposed_product(product.choice, x, y, group_sizes, rows=rows, **options)


def _multiply_transposed_fwd(x, y, group_sizes, rows, product: TransposedProduct):
    return checkpoint_name(_multiply_transposed(x, y, group_sizes, rows, product), OUT), (x, y, group_sizes, rows)


def _multiply_transposed_bwd(product: TransposedProduct, residuals, dout):
    x, y, group_sizes, rows = residuals
    dout = dout.astype(x.dtype)
    dx = dispatch.product(product.choice, y, dout, group_sizes, transpose_w=True)
    return _scatter(dx, x, rows), dispatch.product(product.choice, x, dout, group_sizes, rows=rows), None, None


_multiply_transposed.defvjp(_multiply_transposed_fwd, _multiply_transposed_bwd)


def _scatter(dx, x, rows):
    """The gradient of x from that of x[rows], summed in float32."""
    if rows is None:
        return dx
    return jnp.zeros_like(x, jnp.float32).at[rows].add(dx.astype(jnp.float32)).astype(x.dtype)
