"""The MLP of a mixture of experts: gather, gate and up, SwiGLU, down, weighted combine."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import layout
from pallas_kernels.arguments import Backend, check_arrays, check_config
from pallas_kernels.errors import ArgumentError
from pallas_kernels.kernels.elementwise.swiglu import gradients as swiglu_gradients
from pallas_kernels.kernels.grouped_matmul import GroupedMatmulConfig, dispatch
from pallas_kernels.kernels.grouped_matmul import api as grouped
from pallas_kernels.kernels.routing import Routing
from pallas_kernels.partition import vary_alike

OUT, GATE, UP = "moe_out", "moe_gate", "moe_up"  # names for remat policies
_ORDERS = ("permutation", "inverse")  # of `Routing`, with a place for each expert of each token


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Block sizes of the products with gate and up [D, F], and of those with down [F, D]."""

    up: GroupedMatmulConfig = GroupedMatmulConfig()
    down: GroupedMatmulConfig = GroupedMatmulConfig()


def moe_mlp(
    x: jax.Array,
    routing: Routing,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    backend: Backend = "auto",
    config: MoeConfig | None = None,
) -> jax.Array:
    """out[n] = sum over j of weights[n, j] * (silu(x[n] gate[e]) * (x[n] up[e])) down[e] with e = experts[n, j].

    Every expert multiplies just the tokens routed to it, with no capacity (Gale et al. 2022, arXiv 2211.15841). The
    weights are applied in float32 after the last product. Gradients go to `x`, the three matrices and
    `routing.weights`; the last comes from the hidden activations, so that outputs of single experts are not kept
    (Guo et al. 2025, arXiv 2512.14080). Besides the arguments the gradient keeps x gate and x up, which carry the names
    "moe_gate" and "moe_up" for remat policies; hidden activations are made of them again. The result is "moe_out".

    F may be divided over a mesh. What is divided otherwise over automatic or explicit axes, tokens too, is put together
    on every device first; the result is divided like `x` on explicit axes. The fast way is to divide tokens inside a
    `shard_map` that also calls `route`, where permutation and group sizes are those of the tokens at hand.

    Args:
      x: [N, D], float32, bfloat16 or float16.
      routing: as `route` gives it for these N tokens and E experts.
      gate: [E, D, F] of the dtype of `x`.
      up: [E, D, F].
      down: [E, F, D].
      backend: "auto" takes the Pallas kernels where there are such for the device and shapes, "pallas" insists.
      config: block sizes of the kernels, a `MoeConfig`; None looks them up.

    Returns:
      [N, D] in the dtype of `x`; zeros for a token without an expert.

    Raises:
      ArgumentError: shapes or dtypes that do not fit together; it names the argument.
      UnsupportedError: `backend` is "pallas" and there is no kernel for this case.
    """
    _check(x, routing, gate, up, down)
    chosen = dispatch.choose("moe_mlp", backend, x.shape[1], gate.shape[2], x.dtype)
    check_config("moe_mlp", config, MoeConfig)
    config = config or MoeConfig()
    dispatch.configured("moe_mlp", config.up, chosen, "config.up")
    dispatch.configured("moe_mlp", config.down, chosen, "config.down")
    x, gate, up, down = (jnp.asarray(array) for array in (x, gate, up, down))
    inner = layout.entries(gate)[2]
    gate, up = layout.divide(gate, None, None, inner), layout.divide(up, None, None, inner)
    order = [layout.whole(array) for array in (routing.group_sizes, routing.permutation, routing.inverse)]
    arrays = (layout.whole(x), layout.whole(routing.weights), gate, up, layout.divide(down, None, inner, None), *order)
    products = _Products(grouped.Product(chosen, config.up), grouped.Product(chosen, config.down))
    return layout.divide(_mlp(*vary_alike(*arrays), products), *layout.entries(x))


def _check(x, routing, gate, up, down) -> None:
    name = "moe_mlp"
    check_arrays(name, x=x, gate=gate, up=up, down=down)
    if not isinstance(routing, Routing):
        raise ArgumentError(name, "routing", f"is {type(routing).__name__}", "give what `route` returns")
    if x.ndim != 2 or x.dtype not in grouped.DTYPES:
        raise ArgumentError(name, "x", f"is {x.dtype}{list(x.shape)}", "give floating numbers (tokens, width)")
    (tokens, width), experts = x.shape, routing.group_sizes.shape[0]
    if routing.experts.shape[0] != tokens:
        problem = f"is of {routing.experts.shape[0]} tokens, x has {tokens}"
        raise ArgumentError(name, "routing", problem, "route the same tokens")
    for field, shape in (("weights", routing.experts.shape), *((f, (routing.experts.size,)) for f in _ORDERS)):
        if getattr(routing, field).shape != shape:
            problem = f"has {field} of shape {getattr(routing, field).shape} for experts {routing.experts.shape}"
            raise ArgumentError(name, "routing", problem, "give all fields as one call of `route` returned them")
    for argument, w in (("gate", gate), ("up", up), ("down", down)):
        if w.ndim != 3 or w.shape[0] != experts or w.shape[2 if argument == "down" else 1] != width:
            problem = f"has shape {w.shape} for {experts} experts and tokens of width {width}"
            order = "(experts, inner width, width)" if argument == "down" else "(experts, width, inner width)"
            raise ArgumentError(name, argument, problem, f"give {order}")
        if w.dtype != x.dtype:
            raise ArgumentError(name, argument, f"is {w.dtype}, x is {x.dtype}", "give all in one dtype")
    for argument, inner in (("up", up.shape[2]), ("down", down.shape[1])):
        if inner != gate.shape[2]:
            problem = f"has the inner width {inner}, gate has {gate.shape[2]}"
            raise ArgumentError(name, argument, problem, "give one inner width")


class _Products(NamedTuple):
    """What the products with gate and up, and those with down, are compiled for."""

    up: grouped.Product
    down: grouped.Product


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _mlp(x, weights, gate, up, down, group_sizes, permutation, inverse, products: _Products):
    rows = permutation // weights.shape[1]
    hidden = products.up.gated_forward(x, gate, up, group_sizes, rows)[0]
    return _combine(products.down.forward(hidden, down, group_sizes), weights, inverse).astype(x.dtype)


def _mlp_fwd(x, weights, gate, up, down, group_sizes, permutation, inverse, products: _Products):
    rows = permutation // weights.shape[1]
    hidden, gated, plain = products.up.gated_forward(x, gate, up, group_sizes, rows, keep=True)
    gated, plain = checkpoint_name(gated, GATE), checkpoint_name(plain, UP)
    out = _combine(products.down.forward(hidden, down, group_sizes), weights, inverse).astype(x.dtype)
    return checkpoint_name(out, OUT), (x, weights, gate, up, down, group_sizes, permutation, inverse, gated, plain)


def _combine(outputs, weights, inverse) -> jax.Array:
    """Each token's weighted sum over its experts of `outputs`, which are sorted by expert; in float32."""
    outputs = outputs[inverse].reshape(*weights.shape, outputs.shape[1])
    return jnp.sum(outputs.astype(jnp.float32) * weights[..., None], axis=1)


def _mlp_bwd(products: _Products, residuals, dout):
    x, weights, gate, up, down, group_sizes, permutation, inverse, gated, plain = residuals
    rows = permutation // weights.shape[1]
    sorted_weights = weights.reshape(-1)[permutation][:, None]
    hidden = jax.nn.silu(gated.astype(jnp.float32)) * plain.astype(jnp.float32)

    dsorted = dout[rows]
    dhidden = products.down.grad_x(dsorted, down, group_sizes).astype(jnp.float32)
    dweights = jnp.sum(dhidden * hidden, axis=1)[inverse].reshape(weights.shape)  # <dout, hidden down> by either side
    weighted = (hidden * sorted_weights).astype(x.dtype)
    ddown = products.down.grad_w(weighted, dsorted, group_sizes)

    dgated, dplain = (d.astype(x.dtype) for d in swiglu_gradients(gated, plain, dhidden * sorted_weights))
    dx = products.up.grad_x(dgated, gate, group_sizes)
    dx += products.up.grad_x(dplain, up, group_sizes)
    dx = jnp.sum(dx[inverse].reshape(*weights.shape, x.shape[1]).astype(jnp.float32), axis=1).astype(x.dtype)
    dgate = products.up.grad_w(x, dgated, group_sizes, rows)
    dup = products.up.grad_w(x, dplain, group_sizes, rows)
    return dx, dweights, dgate, dup, ddown, None, None, None


_mlp.defvjp(_mlp_fwd, _mlp_bwd)
