"""The public router: checks, selection of experts, the sort by expert, gradients of the weights."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import layout, partition, tables, target
from pallas_kernels.arguments import Backend, as_array, as_number, check_backend, check_config, check_flag, is_integer
from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.routing import xla
from pallas_kernels.kernels.routing.spec import RoutingSpec

RESIDUALS = ("routing_experts", "routing_scores")  # names for remat policies


class Routing(NamedTuple):
    """Which experts each token goes to, and the order of these assignments by expert.

    Assignment n * k + j is the j-th expert of token n; experts of a token come in the order of their scores.

    Attributes:
      experts: [N, k] int32; E where fewer than k were chosen, or the expert was full.
      weights: [N, k] float32; 0 where `experts` is E.
      group_sizes: [E] int32, assignments of each expert.
      permutation: [N * k] int32, the assignment at each place of the order by expert; those without an expert last.
      inverse: [N * k] int32, the place of each assignment.
      scores: [N, E] float32, without the bias.
    """

    experts: jax.Array
    weights: jax.Array
    group_sizes: jax.Array
    permutation: jax.Array
    inverse: jax.Array
    scores: jax.Array


def route(
    logits: jax.Array,
    *,
    top_k: int,
    score: Literal["softmax", "sigmoid"] = "softmax",
    bias: jax.Array | None = None,
    groups: tuple[int, int] | None = None,
    threshold: float | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    capacity: int | None = None,
    backend: Backend = "auto",
    config: None = None,
) -> Routing:
    """Chooses experts for each token and sorts the choices by expert.

    Scores are softmax(logits) or sigmoid(logits) in float32; the k largest of scores + bias are chosen, equal ones by
    the lower index. `bias` shifts the choice alone, never the weights: it balances experts without an auxiliary loss
    (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437). Gradients go from `weights` and `scores`
    to `logits`. Experts and their scores carry the names "routing_experts" and "routing_scores" for remat policies.

    With logits divided over a mesh, `jit` gives one order of all tokens; inside a `shard_map` each device has its own,
    which is the fast way. Experts that are divided over automatic or explicit axes are put together first.

    Args:
      logits: [N, E], any floating dtype.
      top_k: k, experts of a token at most.
      score: what makes scores of logits.
      bias: [E] float32, added to the scores for the choice.
      groups: (number, kept): experts in this many equal groups, of which a token sees the best by the sum of their two
        largest biased scores (arXiv 2412.19437).
      threshold: only experts whose biased score is at least this are chosen, k at most, perhaps none.
      normalize: weights of a token's chosen experts are divided by their sum.
      scale: multiplies the weights.
      capacity: an expert takes this many assignments at most, in the order of tokens; later ones are dropped, and the
        weights of the others stay as they are. None drops nothing.
      backend: "auto" takes the kernels on TPU, on Hopper where a table says that they were measured to be faster, and
        XLA elsewhere; "pallas" insists on the kernels. They need a multiple of 8 experts (of a group too).
      config: None; there is nothing to configure.

    Returns:
      The experts, their weights and the order by expert.

    Raises:
      ArgumentError: shapes, dtypes or values that do not fit together; it names the argument.
      UnsupportedError: backend="pallas" does not take this case.
    """
    logits = as_array("route", "logits", logits)
    bias = None if bias is None else as_array("route", "bias", bias)
    _check(logits, top_k, score, bias, groups, capacity)
    check_flag("route", "normalize", normalize)
    check_config("route", config)
    spec = RoutingSpec(
        int(top_k),
        score,
        None if groups is None or groups[0] == groups[1] else (int(groups[0]), int(groups[1])),
        None if threshold is None else as_number("route", "threshold", threshold),
        bool(normalize),
        as_number("route", "scale", scale),
        None if capacity is None else min(int(capacity), logits.shape[0]),  # a token has an expert once at most
    )
    kernels = _choose(backend, *logits.shape, spec)
    logits = jnp.asarray(logits)
    logits = layout.divide(logits, layout.entries(logits)[0], None)
    bias = None if bias is None else layout.whole(jnp.asarray(bias))
    return Routing(*_route(*partition.vary_alike(logits, bias), spec, kernels))


def _check(logits, top_k, score, bias, groups, capacity) -> None:
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ArgumentError(
            "route", "logits", f"is {logits.dtype}{list(logits.shape)}", "give floating (tokens, experts)"
        )
    experts = logits.shape[1]
    if not is_integer(top_k) or not 1 <= top_k <= experts:
        remedy = "give an integer from 1 to these"
        raise ArgumentError("route", "top_k", f"is {top_k!r}, with {experts} experts", remedy)
    if score not in ("softmax", "sigmoid"):
        raise ArgumentError("route", "score", f"is {score!r}", "choose softmax or sigmoid")
    if bias is not None and (bias.shape != (experts,) or not jnp.issubdtype(bias.dtype, jnp.floating)):
        problem = f"is {bias.dtype}{list(bias.shape)}"
        raise ArgumentError("route", "bias", problem, f"give a floating number for each of {experts} experts")
    if groups is not None:
        if not isinstance(groups, (tuple, list)) or len(groups) != 2 or not all(map(is_integer, groups)):
            raise ArgumentError("route", "groups", f"is {groups!r}", "give two integers (number, kept)")
        number, kept = groups
        if number < 1 or experts % number:
            raise ArgumentError(
                "route", "groups", f"are {number}, which do not divide {experts} experts", "give a divisor"
            )
        if not 1 <= kept <= number:
            raise ArgumentError("route", "groups", f"keep {kept} of {number}", "keep at least one, at most all")
        if kept * (experts // number) < top_k:
            problem = f"keep {kept * (experts // number)} experts, fewer than top_k = {top_k}"
            raise ArgumentError("route", "groups", problem, "keep more groups")
    if capacity is not None and not (is_integer(capacity) and capacity >= 1):
        raise ArgumentError("route", "capacity", f"is {capacity!r}", "give a positive integer, or None")


def _choose(backend, tokens, experts, spec) -> bool:
    """Whether the kernels run."""
    check_backend("route", backend)
    reason = _unsupported(tokens, experts, spec)
    if backend == "pallas" and reason is not None:
        raise UnsupportedError("route", backend, reason)
    if backend == "auto" and reason is None and target.current().platform == "gpu":
        recorded = tables.lookup("routing_backend", target.current().family, f"experts{experts}")
        return recorded is not None and recorded["order"][0] == "pallas"
    return backend != "xla" and reason is None


def _unsupported(tokens, experts, spec) -> str | None:
    missing = target.current().lacks_kernels("tpu", "gpu")
    return missing if missing is not None else _kernels().unsupported(tokens, experts, spec)


def _kernels():
    """The module of the current target's kernels. Imported late: it imports Mosaic, which on Hopper needs absl-py."""
    if target.current().platform == "tpu":
        from pallas_kernels.kernels.routing import tpu

        return tpu
    from pallas_kernels.kernels.routing import hopper

    return hopper


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _route(logits, bias, spec: RoutingSpec, kernels: bool):
    return _route_fwd(logits, bias, spec, kernels)[0]


def _route_fwd(logits, bias, spec: RoutingSpec, kernels: bool):
    scores = xla.scores(logits, spec)
    if kernels:
        chosen, mine, *sorted_ = _with_kernels(logits, bias, spec)
    else:
        chosen = xla.select(scores, bias, spec)
        mine = xla.scores_of(scores, chosen)
        sorted_ = xla.sort(chosen, logits.shape[1], spec)
    experts, group_sizes, permutation, inverse = sorted_
    experts, mine = (checkpoint_name(x, name) for x, name in zip((experts, mine), RESIDUALS, strict=True))
    weights = jnp.where(experts < logits.shape[1], xla.weights(mine, spec), 0.0)
    return (experts, weights, group_sizes, permutation, inverse, scores), (logits, bias, chosen, experts, mine)


def _with_kernels(logits, bias, spec):
    """(chosen, their scores, what `xla.sort` returns); the choice by device, the order of all tokens."""
    module = _kernels()

    def select(*arrays):
        return module.select(*arrays, spec=spec)

    arrays = (logits,) if bias is None else (logits, bias)
    options = {"name": "route", "opaque": True}
    dims = ("n e", "e")[: len(arrays)]
    chosen, mine = partition.divided(select, arrays, dims, ("n k", "n k"), divisible="n", batch="n", **options)
    order = functools.partial(module.order, experts=logits.shape[1], spec=spec)

    def of_all(chosen):
        labels = ("n k", "e", "m", "m")
        return partition.divided(order, (chosen,), ("n k",), labels, divisible="", batch="-", **options)

    return chosen, mine, *layout.on_every_device(of_all)(layout.whole(chosen))


def _route_bwd(spec: RoutingSpec, kernels: bool, residuals, gradients):
    logits, bias, chosen, experts, mine = residuals
    dweights, dscores = gradients[1], gradients[5]
    dweights = jnp.where(experts < logits.shape[1], dweights, 0.0)
    (dmine,) = jax.vjp(lambda mine: xla.weights(mine, spec), mine)[1](dweights)
    dscores += xla.spread(dmine, chosen, logits.shape[1])
    (dlogits,) = jax.vjp(lambda logits: xla.scores(logits, spec), logits)[1](dscores)
    return dlogits, None if bias is None else jnp.zeros_like(bias)


_route.defvjp(_route_fwd, _route_bwd)
