"""The public attention function: checks, choice of a backend, gradients."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import partition, tables, target
from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.attention import xla
from pallas_kernels.kernels.attention.spec import AttentionSpec

RESIDUAL = "attention_out"  # the name under which output and log-sum-exp can be kept by a remat policy

Backend = Literal["auto", "pallas", "cudnn", "xla"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    positions: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    window: int | tuple[int, int] | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    config: object | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention softmax(scale q k^T) v with grouped queries, over packed documents, in a window.

    Scores, softmax and sums are float32 (Dao et al. 2022, arXiv 2205.14135). Query head h reads key head
    h // (H / G) (Ainslie et al. 2023, arXiv 2305.13245). Batch and heads may be divided over a mesh. Output and
    log-sum-exp carry the name "attention_out" for remat policies.

    Args:
      q: [B, T, H, K], float32, bfloat16 or float16.
      k: [B, S, G, K], G divides H.
      v: [B, S, G, K].
      causal: a query sees no key of a later position.
      segment_ids: [B, T] int, or a pair ([B, T], [B, S]): a query sees keys of its own id; ids do not decrease
        along a row, negative ones are padding. Blocks that share no id are skipped.
      positions: [B, T] int, or a pair ([B, T], [B, S]); None counts from 0. Shards of a longer sequence, as in ring
        attention, say here where they lie.
      window: the `window` last positions, the own included (and as many next ones, if not causal), or a pair
        (left, right) of neighbours seen beside the own position, -1 for no bound.
      soft_cap: c bends scores to c tanh(score / c).
      sinks: [H], a score for each head that takes part in the softmax and has no value (arXiv 2309.17453).
      scale: of the scores; None is K ** -0.5.
      return_lse: also return the log-sum-exp of the scores, sinks included; it has a gradient, too, so partial
        attentions over parts of the keys can be merged.
      backend: "auto" takes a Pallas kernel on TPU, on Hopper what is recorded as fastest, elsewhere "xla"; "pallas" or
        "cudnn" insist.
      config: block sizes (`ForwardConfig`, `BackwardConfig`), a pair of the kernel at hand; None looks them up.

    Returns:
      [B, T, H, K] in the dtype of `q`; with `return_lse` also [B, H, T] float32. A query that sees no key gives 0
      and -inf.

    Raises:
      ArgumentError: shapes, dtypes or values that do not fit together; it names the argument.
      UnsupportedError: a backend that was named does not take this case.
    """
    spec = _spec(q, k, v, causal, window, soft_cap, scale)
    masks = _masks(q, k, spec, segment_ids, positions)
    _check_sinks(sinks, q)
    chosen = _choose(backend, q, k, spec, masks, needs_lse=return_lse or sinks is not None)
    q, k, v, *masks = partition.vary_alike(q, k, v, *masks)
    if chosen == "cudnn":
        return _cudnn(q, k, v, masks, spec)
    out, lse = _attend(q, k, v, tuple(masks), spec, chosen, config or (None, None))
    if sinks is not None:
        total = jnp.logaddexp(lse, sinks.astype(jnp.float32)[:, None])
        out = (out * jnp.exp(lse - total).transpose(0, 2, 1)[..., None]).astype(q.dtype)
        lse = total
    return (out, lse) if return_lse else out


def _spec(q, k, v, causal, window, soft_cap, scale) -> AttentionSpec:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ArgumentError("attention", name, f"has shape {x.shape}", "give (batch, sequence, heads, head size)")
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64) or x.dtype != q.dtype:
            raise ArgumentError("attention", name, f"is {x.dtype}", "give q, k and v in one floating dtype")
    if k.shape != v.shape:
        raise ArgumentError("attention", "v", f"has shape {v.shape}, k has {k.shape}", "give both the same")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        problem = f"has shape {k.shape}, which does not fit q {q.shape}"
        raise ArgumentError("attention", "k", problem, "batch and head size must be equal")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        problem = f"has {k.shape[2]} heads, which do not divide the {q.shape[2]} of q"
        raise ArgumentError("attention", "k", problem, "give a divisor of the query heads")
    if soft_cap is not None and not soft_cap > 0:
        raise ArgumentError("attention", "soft_cap", f"is {soft_cap}", "give a positive number or None")
    return AttentionSpec(causal, _window(window, causal), soft_cap, q.shape[3] ** -0.5 if scale is None else scale)


def _window(window: int | tuple[int, int] | None, causal: bool) -> tuple[int, int] | None:
    if window is None:
        return None
    if isinstance(window, int):
        if window < 1:
            raise ArgumentError("attention", "window", f"is {window}", "give at least 1, the own position")
        return (window - 1, -1 if causal else window - 1)
    if len(window) != 2 or min(window) < -1:
        raise ArgumentError("attention", "window", f"is {window}", "give (left, right), each at least -1")
    return tuple(window) if max(window) >= 0 else None


def _masks(q, k, spec, segment_ids, positions):
    """(q_segments, kv_segments, q_positions, kv_positions), each [B, length] int32 or None."""
    masks = []
    for name, given in (("segment_ids", segment_ids), ("positions", positions)):
        pair = given if isinstance(given, (tuple, list)) else (given, given)
        if given is None:
            masks += [None, None]
            continue
        for x, like in zip(pair, (q, k), strict=True):
            if x.shape != like.shape[:2] or not jnp.issubdtype(x.dtype, jnp.integer):
                problem = f"has {x.dtype}{list(x.shape)} for a sequence of shape {like.shape[:2]}"
                raise ArgumentError("attention", name, problem, "give integers (batch, sequence), or a pair of them")
            if name == "segment_ids":
                _check_order(x)
            masks.append(jnp.asarray(x, jnp.int32))
    if (spec.causal or spec.window) and positions is None and q.shape[1] != k.shape[1]:
        problem = f"is None, with {q.shape[1]} queries and {k.shape[1]} keys under a causal mask or a window"
        raise ArgumentError("attention", "positions", problem, "say where they lie: a pair ([B, T], [B, S])")
    return masks


def _check_order(ids: jax.Array) -> None:
    """Refuses ids that decrease, where their values are known: inside a trace they are not."""
    if isinstance(ids, jax.core.Tracer):
        return
    for row, values in enumerate(np.asarray(ids)):
        values = values[values >= 0]
        if (np.diff(values) < 0).any():
            problem = f"decrease in row {row}"
            raise ArgumentError("attention", "segment_ids", problem, "number the documents of a row in their order")


def _check_sinks(sinks, q) -> None:
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ArgumentError(
            "attention", "sinks", f"has shape {sinks.shape}", f"give one for each of {q.shape[2]} heads"
        )


def _choose(backend, q, k, spec, masks, needs_lse) -> str:
    """The backend to run: "tpu", "hopper", "cudnn" or "xla"."""
    if backend not in ("auto", "pallas", "cudnn", "xla"):
        raise ArgumentError("attention", "backend", f"is {backend!r}", "choose auto, pallas, cudnn or xla")
    platform = target.current().platform
    kernel = "tpu" if platform == "tpu" else "hopper"
    if backend in ("pallas", "cudnn"):
        reason = _reason(backend, q, k, spec, masks, needs_lse)
        if reason is not None:
            raise UnsupportedError("attention", backend, reason)
        return kernel if backend == "pallas" else backend
    if backend == "auto" and platform != "cpu":
        for name in _preferred(q, spec, masks):
            if _reason(name, q, k, spec, masks, needs_lse) is None:
                return kernel if name == "pallas" else name
    return "xla"


def _preferred(q, spec, masks) -> tuple[str, ...]:
    """Backends in the order that the table of recorded times gives; an unrecorded kernel comes after cuDNN."""
    if target.current().platform == "tpu":
        return ("pallas",)
    kind = ("causal" if spec.causal else "full") + ("/packed" if masks[0] is not None else "")
    recorded = tables.lookup("attention_backend", target.current().family, f"head{q.shape[3]}/{kind}")
    return tuple(recorded["order"]) if recorded else ("cudnn", "pallas")


def _reason(backend, q, k, spec, masks, needs_lse) -> str | None:
    """Why a backend does not take this case, or None."""
    now = target.current()
    if backend == "xla":
        return None
    if backend == "cudnn":
        return _cudnn_reason(q, k, spec, masks, needs_lse, now)
    if now.platform == "tpu":
        return _kernel("tpu").supported(q.shape, k.shape, q.dtype, spec, now)
    if now.family == "hopper":
        return _kernel("hopper").supported(q.shape, k.shape, q.dtype, spec, now)
    return f"there is no kernel for {now.device_kind}"


def _kernel(backend: str):
    """The module of a backend, imported when it is first needed: Mosaic GPU asks for absl-py, which not all have."""
    if backend == "tpu":
        from pallas_kernels.kernels.attention import tpu

        return tpu
    if backend == "hopper":
        from pallas_kernels.kernels.attention import hopper

        return hopper
    return xla


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, masks, spec, backend, config):
    return _forward(q, k, v, masks, spec, backend, config[0])


HEADS, KEYS, ROWS = "b t (g r) k", "b s g k", "b (g r) t"
MASKS = ("b t", "b s", "b t", "b s")


def _forward(q, k, v, masks, spec, backend, config):
    def local(q, k, v, *given):
        return tuple(_call(backend, "forward", (q, k, v), given, masks, spec, config))

    return _divided(local, backend, (q, k, v), (HEADS, KEYS, KEYS), masks, (HEADS, ROWS))


def _fwd(q, k, v, masks, spec, backend, config):
    out, lse = (checkpoint_name(x, RESIDUAL) for x in _forward(q, k, v, masks, spec, backend, config[0]))
    return (out, lse), (q, k, v, masks, out, lse)


def _bwd(spec, backend, config, residuals, cotangents):
    q, k, v, masks, out, lse = residuals
    dout, dlse = cotangents
    delta = jnp.einsum("bthk,bthk->bht", out.astype(jnp.float32), dout.astype(jnp.float32)) - dlse
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)  # queries that see nothing: their masked scores give weight 0

    def local(q, k, v, lse, delta, dout, *given):
        return tuple(_call(backend, "backward", (q, k, v, lse, delta, dout), given, masks, spec, config[1]))

    arrays, dims = (q, k, v, finite, delta, dout), (HEADS, KEYS, KEYS, ROWS, ROWS, HEADS)
    return *_divided(local, backend, arrays, dims, masks, (HEADS, KEYS, KEYS)), (None,) * len(masks)


_attend.defvjp(_fwd, _bwd)


def _divided(local, backend, arrays, dims, masks, out_dims):
    """Calls `local` on the parts of all arrays that each device holds; masks that are None stay away."""
    given = [(mask, labels) for mask, labels in zip(masks, MASKS, strict=True) if mask is not None]
    arrays, dims = (*arrays, *(mask for mask, _ in given)), (*dims, *(labels for _, labels in given))
    opaque = backend != "xla"
    options = {"divisible": "b g", "batch": "b", "name": "attention", "opaque": opaque}
    return partition.divided(local, arrays, dims, out_dims, **options)


def _call(backend, direction, arrays, given, masks, spec, config):
    """Runs one direction of a kernel, the masks that are given back in their places."""
    given = iter(given)
    names = ("q_segments", "kv_segments", "q_positions", "kv_positions")
    options = {name: None if mask is None else next(given) for name, mask in zip(names, masks, strict=True)}
    if backend != "xla":
        options["config"] = config
    return getattr(_kernel(backend), direction)(*arrays, spec=spec, **options)


def _cudnn_reason(q, k, spec, masks, needs_lse, now) -> str | None:
    if now.platform != "gpu":
        return f"cuDNN does not run on {now.device_kind}"
    if not _cudnn_found():
        return "jax finds no cuDNN"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's fused attention takes bfloat16 and float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"cuDNN's fused attention takes head sizes up to 128 in steps of 8, not {q.shape[3]}"
    if spec.soft_cap is not None:
        return "cuDNN has no soft cap here"
    if needs_lse:
        return "cuDNN's log-sum-exp has no gradient"
    if masks[2] is not None:
        return "cuDNN takes no positions"
    if spec.window is not None and not (spec.causal and spec.window[1] == -1):
        return "cuDNN takes a window to the left of a causal mask only"
    return None


def _cudnn_found() -> bool:
    """jax raises where cuDNN is missing and has no public way to ask; a name that moved counts as found."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo

        return bool(fused_attention_stablehlo.check_cudnn_version())
    except RuntimeError:
        return False
    except (ImportError, AttributeError):
        return True


def _cudnn(q, k, v, masks, spec):
    """jax.nn's cuDNN attention; documents become a mask, which costs memory of T x S for each row of the batch."""

    def local(q, k, v, *segments):
        mask = (segments[0][:, :, None] == segments[1][:, None, :])[:, None] if segments else None
        window = None if spec.window is None else (spec.window[0], 0)
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            scale=spec.scale,
            is_causal=spec.causal,
            local_window_size=window,
            implementation="cudnn",
        )
        if segments:
            out = jnp.where(segments[0][:, :, None, None] >= 0, out, 0)
        return (out,)

    out = _divided(local, "xla", (q, k, v), (HEADS, KEYS, KEYS), masks, (HEADS,))[0]
    return checkpoint_name(out, RESIDUAL)
