"""The public attention function: checks, choice of a backend, gradients."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import partition, tables, target
from pallas_kernels.arguments import check_flag
from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.attention import checks, xla
from pallas_kernels.kernels.attention.spec import AttentionSpec, Masks

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
        along a row, negative ones, between documents, are padding. Blocks that share no id are skipped.
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
      config: block sizes, a pair of the kernel at hand (`TpuAttentionForwardConfig` and `TpuAttentionBackwardConfig`,
        or those of Hopper); None, or None in it, looks them up. "xla" and "cudnn" have none; where "auto" falls back
        to these, a pair is not used.

    Returns:
      [B, T, H, K] in the dtype of `q`; with `return_lse` also [B, H, T] float32. A query that sees no key gives 0
      and -inf.

    Raises:
      ArgumentError: shapes, dtypes or values that do not fit together; it names the argument.
      UnsupportedError: a backend that was named does not take this case.
    """
    checks.arrays(q, k, v)
    check_flag("attention", "return_lse", return_lse)
    spec = checks.spec(q.shape[3], causal, window, soft_cap, scale)
    masks = checks.masks(q, k, spec, segment_ids, positions)
    sinks = checks.sinks(sinks, q)
    chosen = _choose(backend, q, k, spec, masks, needs_lse=return_lse or sinks is not None)
    config = checks.config(config, backend, _kernel(chosen) if chosen in ("tpu", "hopper") else None)
    q, k, v, *marked = partition.vary_alike(q, k, v, *masks)
    masks = Masks(*marked)
    if chosen == "cudnn":
        return _cudnn(q, k, v, masks, spec)
    out, lse = _attend(q, k, v, masks, spec, chosen, config)
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks[:, None])
    return (out, lse) if return_lse else out


def _with_sinks(out, lse, sinks):
    """Output and log-sum-exp [B, H, T] with the scores `sinks` [H, 1] added to each softmax.

    Scores of -inf on both sides have no difference: a query that sees nothing has an output of 0 whatever its share,
    and the log-sum-exp of the sink alone.
    """
    blind = jnp.isneginf(lse)
    finite = jnp.where(blind, 0.0, lse)
    share = jax.nn.sigmoid(finite - sinks)
    out = (out * share.transpose(0, 2, 1)[..., None]).astype(out.dtype)
    return out, jnp.where(blind, sinks, jnp.logaddexp(finite, sinks))


def _choose(backend, q, k, spec: AttentionSpec, masks: Masks, needs_lse: bool) -> str:
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


def _preferred(q, spec: AttentionSpec, masks: Masks) -> tuple[str, ...]:
    """Backends in the order that the table of recorded times gives.

    An unrecorded kernel comes after cuDNN, but before it with documents: these are a mask of T x S there, which takes
    memory that grows with the square of the length, and no work is left out for it.
    """
    if target.current().platform == "tpu":
        return ("pallas",)
    packed = masks.q_segments is not None
    kind = ("causal" if spec.causal else "full") + ("/packed" if packed else "")
    recorded = tables.lookup("attention_backend", target.current().family, f"head{q.shape[3]}/{kind}")
    if recorded:
        return tuple(recorded["order"])
    return ("pallas", "cudnn") if packed else ("cudnn", "pallas")


def _reason(backend, q, k, spec, masks, needs_lse) -> str | None:
    """Why a backend does not take this case, or None."""
    now = target.current()
    if backend == "xla":
        return None
    if backend == "cudnn":
        return _cudnn_reason(q, k, spec, masks, needs_lse, now)
    return _kernel("tpu" if now.platform == "tpu" else "hopper").supported(q.shape, k.shape, q.dtype, spec, now)


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
def _attend(q, k, v, masks: Masks, spec: AttentionSpec, backend: str, config: tuple):
    """Output and log-sum-exp by "tpu", "hopper" or "xla"; `config` is for forward and backward."""
    return _forward(q, k, v, masks, spec, backend, config[0])


HEADS, KEYS, ROWS = "b t (g r) k", "b s g k", "b (g r) t"
OF_ONE_KEY_HEAD = {HEADS: "b t h k", ROWS: "b h t"}  # which every device then has whole
MASK_DIMS = Masks("b t", "b s", "b t", "b s")


def _forward(q, k, v, masks, spec, backend, config):
    def local(q, k, v, masks: Masks):
        return _kernel(backend).forward(q, k, v, spec=spec, config=config, **masks._asdict())

    return _divided(local, (q, k, v), (HEADS, KEYS, KEYS), masks, (HEADS, ROWS), opaque=backend != "xla")


def _fwd(q, k, v, masks, spec, backend, config):
    out, lse = (checkpoint_name(x, RESIDUAL) for x in _forward(q, k, v, masks, spec, backend, config[0]))
    return (out, lse), (q, k, v, masks, out, lse)


def _bwd(spec, backend, config, residuals, cotangents):
    q, k, v, masks, out, lse = residuals
    dout, dlse = cotangents
    delta = jnp.einsum("bthk,bthk->bht", out.astype(jnp.float32), dout.astype(jnp.float32)) - dlse
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)  # queries that see nothing: their masked scores give weight 0

    def local(q, k, v, lse, delta, dout, masks: Masks):
        kernel = _kernel(backend)
        return kernel.backward(q, k, v, lse, delta, dout, spec=spec, config=config[1], **masks._asdict())

    arrays, dims = (q, k, v, finite, delta, dout), (HEADS, KEYS, KEYS, ROWS, ROWS, HEADS)
    grads = _divided(local, arrays, dims, masks, (HEADS, KEYS, KEYS), opaque=backend != "xla")
    return *grads, None


_attend.defvjp(_fwd, _bwd)


def _divided(local, arrays, dims, masks: Masks, out_dims, *, opaque: bool):
    """Calls `local(*arrays, masks)` on the parts that each device holds; absent masks stay None.

    A kernel of ours is opaque to XLA's partitioner; it knows how to divide its own operations, and jax's cuDNN calls.
    """
    given = {name: mask for name, mask in masks._asdict().items() if mask is not None}
    mask_dims = [getattr(MASK_DIMS, name) for name in given]
    divisible = "b g"
    if arrays[1].shape[2] == 1:
        dims, out_dims = ([OF_ONE_KEY_HEAD.get(labels, labels) for labels in each] for each in (dims, out_dims))
        divisible = "b h"

    def flat(*parts):
        own, own_masks = parts[: len(arrays)], parts[len(arrays) :]
        return tuple(local(*own, Masks(**dict(zip(given, own_masks, strict=True)))))

    return partition.divided(
        flat,
        (*arrays, *given.values()),
        (*dims, *mask_dims),
        out_dims,
        divisible=divisible,
        batch="b",
        name="attention",
        opaque=opaque,
    )


def _cudnn_reason(q, k, spec: AttentionSpec, masks: Masks, needs_lse: bool, now: target.Target) -> str | None:
    if now.platform != "gpu":
        return f"cuDNN does not run on {now.device_kind}"
    if not _cudnn_found():
        return "jax finds no cuDNN"
    if not q.size or not k.size:
        return "an array without elements"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's fused attention takes bfloat16 and float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"cuDNN's fused attention takes head sizes up to 128 in steps of 8, not {q.shape[3]}"
    if spec.soft_cap is not None:
        return "cuDNN has no soft cap here"
    if needs_lse:
        return "cuDNN's log-sum-exp has no gradient"
    if masks.q_positions is not None:
        return "cuDNN takes no positions"
    if spec.window is not None and not (spec.causal and spec.window[1] == -1):
        return "cuDNN takes a window to the left of a causal mask only"
    return None


@functools.cache
def _cudnn_found() -> bool:
    """jax has no way to ask for cuDNN: it raises where a call that needs it is traced, and so says what it would do."""
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
    except RuntimeError:
        return False
    return True


def _cudnn(q, k, v, masks: Masks, spec: AttentionSpec):
    """jax.nn's cuDNN attention; documents become a mask, which costs memory of T x S for each row of the batch.

    Where the mask hides all keys of a query, cuDNN gives the mean of their values: such queries are set to 0. Without
    documents each sees a key, since causal queries are as many as keys.
    """

    def local(q, k, v, masks: Masks):
        packed = masks.q_segments is not None
        mask = _seen(masks.q_segments, masks.key_segments, spec) if packed else None
        window = None if spec.window is None else (spec.window[0], 0)
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask[:, None] if packed else None,
            scale=spec.scale,
            is_causal=spec.causal,
            local_window_size=window,
            implementation="cudnn",
        )
        if packed:
            out = jnp.where(jnp.any(mask, axis=2)[:, :, None, None], out, 0)
        return (out,)

    out = _divided(local, (q, k, v), (HEADS, KEYS, KEYS), masks, (HEADS,), opaque=False)[0]
    return checkpoint_name(out, RESIDUAL)


def _seen(q_segments, kv_segments, spec) -> jax.Array:
    """[B, T, S] bool: the keys that a query sees under a causal mask, in a window to its left, in its document."""
    seen = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] >= 0)
    ahead = jnp.arange(q_segments.shape[1])[:, None] - jnp.arange(kv_segments.shape[1])  # of the key, by the query
    if spec.causal:
        seen &= ahead >= 0
    if spec.window is not None:
        seen &= ahead <= spec.window[0]
    return seen
