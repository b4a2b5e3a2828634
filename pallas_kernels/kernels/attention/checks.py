"""What the arguments of attention may be: each is checked when a call is traced, and put into one form."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import arguments, partition
from pallas_kernels.errors import ArgumentError
from pallas_kernels.kernels.attention.spec import AttentionSpec, Masks

_FARTHEST = 2**30


def arrays(q, k, v) -> None:
    """Refuses shapes and dtypes that do not fit together."""
    arguments.check_arrays("attention", q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise _error(name, f"has shape {x.shape}", "give (batch, sequence, heads, head size)")
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64) or x.dtype != q.dtype:
            raise _error(name, f"is {x.dtype}", "give q, k and v in one floating dtype")
    if k.shape != v.shape:
        raise _error("v", f"has shape {v.shape}, k has {k.shape}", "give both the same")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        problem = f"has shape {k.shape}, which does not fit q {q.shape}"
        raise _error("k", problem, "batch and head size must be equal")
    if not q.shape[3]:
        raise _error("q", f"has shape {q.shape}", "give heads of at least one feature")
    _check_heads(q, k)


def _check_heads(q, k) -> None:
    heads, groups = q.shape[2], k.shape[2]
    if groups == 0 or heads % groups:
        raise _error(
            "k", f"has {groups} heads, which do not divide the {heads} of q", "give a divisor of the query heads"
        )
    parts = partition.explicit_parts(q, 2)
    if groups > 1 and groups % parts:
        problem = f"has {groups} heads, which do not divide over the {parts} devices that share the heads of q"
        times = math.lcm(groups, parts) // groups
        raise _error("k", problem, f"repeat the heads of k and v: jnp.repeat(k, {times}, axis=2)")


def spec(size: int, causal, window, soft_cap, scale) -> AttentionSpec:
    """The static arguments for heads of `size`, in Python's own types: a kernel is compiled for them."""
    arguments.check_flag("attention", "causal", causal)
    scale = size**-0.5 if scale is None else arguments.as_number("attention", "scale", scale)
    if soft_cap is not None:
        soft_cap = arguments.as_number("attention", "soft_cap", soft_cap)
        if soft_cap <= 0:
            raise _error("soft_cap", f"is {soft_cap}", "give a positive number or None")
    return AttentionSpec(bool(causal), _window(window, causal), soft_cap, scale)


def _window(window, causal) -> tuple[int, int] | None:
    if window is None:
        return None
    if isinstance(window, (tuple, list)):
        sides = tuple(_integer("window", side) for side in window)
        if len(sides) != 2 or min(sides) < -1:
            raise _error("window", f"is {window}", "give (left, right), each at least -1")
    else:
        own = _integer("window", window)
        if own < 1:
            raise _error("window", f"is {own}", "give at least 1, the own position")
        sides = (own - 1, -1 if causal else own - 1)
    sides = tuple(side if side < _FARTHEST else -1 for side in sides)  # int32 holds a position and what lies beside it
    return sides if max(sides) >= 0 else None


def _integer(name: str, value) -> int:
    if not arguments.is_integer(value):
        raise _error(
            name, f"is {arguments.said(value)}", "give integers of Python or NumPy, known when the call is traced"
        )
    return int(value)


def masks(q, k, spec: AttentionSpec, segment_ids, positions) -> Masks:
    """Segments and positions of queries and of keys, in int32."""
    found = []
    for name, given in (("segment_ids", segment_ids), ("positions", positions)):
        if given is None:
            found += [None, None]
            continue
        pair = given if isinstance(given, tuple) else (given, given)
        wanted = "give an integer array (batch, sequence), or a tuple of two: of the queries and of the keys"
        if len(pair) != 2:
            raise _error(name, f"has {len(pair)} parts", wanted)
        for x, like in zip(pair, (q, k), strict=True):
            x = arguments.as_int32("attention", name, x)
            if x.shape != like.shape[:2] or not jnp.issubdtype(x.dtype, jnp.integer):
                problem = f"has {x.dtype}{list(x.shape)} for a sequence of shape {like.shape[:2]}"
                raise _error(name, problem, wanted)
            _check_order(x) if name == "segment_ids" else _check_reach(x)
            found.append(jnp.asarray(x, jnp.int32))
        if name == "segment_ids" and not isinstance(given, tuple):
            found[-1] = None  # kernels that know keys and queries to be alike need not compare all of them
    if (spec.causal or spec.window) and positions is None and q.shape[1] != k.shape[1]:
        problem = f"is None, with {q.shape[1]} queries and {k.shape[1]} keys under a causal mask or a window"
        raise _error("positions", problem, "say where they lie: a pair ([B, T], [B, S])")
    return Masks(*found)


def _check_order(ids: jax.Array) -> None:
    """Refuses ids that decrease, or that padding interrupts, where their values are known."""
    known = arguments.values(ids)
    for row, values in enumerate(() if known is None else known):
        places = np.flatnonzero(values >= 0)
        steps = np.diff(values[places])
        if (steps < 0).any():
            raise _error("segment_ids", f"decrease in row {row}", "number the documents of a row in their order")
        if (np.diff(places)[steps == 0] > 1).any():
            raise _error("segment_ids", f"have padding within a document of row {row}", "put it between documents")


def _check_reach(positions: jax.Array) -> None:
    """Refuses positions from which a window would lead out of int32, where their values are known."""
    known = arguments.values(positions)
    if known is not None and known.size and np.abs(known.astype(np.int64)).max() >= _FARTHEST:
        raise _error(
            "positions", f"go from {known.min()} to {known.max()}", f"stay below {_FARTHEST} on both sides of 0"
        )


def sinks(given, q) -> jax.Array | None:
    """[H] float32 of anything that makes an array of numbers; None stays."""
    if given is None:
        return None
    found = arguments.as_array("attention", "sinks", given)
    remedy = f"give one for each of {q.shape[2]} heads"
    if found.shape != (q.shape[2],):
        raise _error("sinks", f"has shape {found.shape}", remedy)
    if not (jnp.issubdtype(found.dtype, jnp.floating) or jnp.issubdtype(found.dtype, jnp.integer)):
        raise _error("sinks", f"is {found.dtype}", remedy)
    return jnp.asarray(found, jnp.float32)


def config(given, backend: str, kernel) -> tuple:
    """The pair of block sizes for the module of a kernel, (None, None) where they are looked up or there are none.

    Args:
      given: None, or (forward, backward) of which either may be None.
      backend: as named by the caller.
      kernel: the module that runs, with its `ForwardConfig` and `BackwardConfig`; None for "xla" and "cudnn".
    """
    if given is None:
        return None, None
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise _error(
            "config", f"is {arguments.said(given)}", "give a pair (ForwardConfig, BackwardConfig); either may be None"
        )
    if kernel is None:
        if backend != "auto":
            raise _error("config", f'is given with backend="{backend}"', "leave it out: there are no block sizes")
        return None, None
    for one, kind in zip(given, (kernel.ForwardConfig, kernel.BackwardConfig), strict=True):
        if one is not None and not isinstance(one, kind):
            raise _error("config", f"has {type(one).__name__}", f"give pallas_kernels.{kind.__name__} or None there")
    return tuple(given)


def _error(argument: str, problem: str, remedy: str) -> ArgumentError:
    return ArgumentError("attention", argument, problem, remedy)
