"""The public function: checks, choice of a backend, gradients."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import layout, partition
from pallas_kernels.arguments import Backend, as_array, check_arrays, check_backend, check_config, is_number, values
from pallas_kernels.errors import ArgumentError
from pallas_kernels.kernels.cross_entropy import chunks, dispatch
from pallas_kernels.kernels.cross_entropy.config import CrossEntropyConfig, TpuCrossEntropyConfig, XlaCrossEntropyConfig

LSE, DX, DW = "cross_entropy_lse", "cross_entropy_dx", "cross_entropy_dw"  # names for remat policies


class CrossEntropyAux(NamedTuple):
    """What the loss of each token is made of; 0 where a token is not counted.

    Attributes:
      log_probs: [...] float32, log-probability of the label.
      lse: [...] float32, log of the sum of exp(logits).
    """

    log_probs: jax.Array
    lse: jax.Array


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The static part of a call."""

    soft_cap: float | None
    z_loss: float
    backend: str
    config: CrossEntropyConfig | None

    def steps(self, x: jax.Array, w: jax.Array) -> chunks.Steps:
        """For local x [N, D] and w [V, D]."""
        return dispatch.steps(self.backend, self.config, self.soft_cap, len(x), x.dtype, w.shape)


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    z_loss: float = 0.0,
    label_mask: jax.Array | None = None,
    soft_cap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Backend = "auto",
    config: CrossEntropyConfig | None = None,
) -> tuple[jax.Array, CrossEntropyAux]:
    """Cross-entropy of logits = x w^T that never holds the logits of all tokens.

    The loss of a token is -log_prob + z_loss lse^2 (PaLM, arXiv 2204.02311). Products accumulate in float32, and so
    do log-sum-exp and the gradient of `w`. With "mean" and "sum" the gradients are made along with the loss, in three
    matrix products, like those of materialised logits; with "none", and for a gradient through `aux`, logits are made
    again in the backward pass. Tokens may be divided over a mesh; the gradient of `w` is summed over it. Where V or D
    is divided over automatic or explicit axes, every device gets all of it first.
    Log-sum-exp and the gradients made ahead carry the names "cross_entropy_lse", "cross_entropy_dx" and
    "cross_entropy_dw" for remat policies.

    Args:
      x: [..., D] hidden states of tokens in one or more axes, float32, bfloat16 or float16.
      w: [V, D], the head, one row for each id as in an embedding table; cast to the dtype of `x`. Its gradient is
        rounded once, to its own dtype.
      labels: [...] int, less than V, which is checked where the values are known; a negative one marks a token that is
        not counted: no loss, no gradient.
      z_loss: weight of lse^2.
      label_mask: [...] bool, False where a token is not counted.
      soft_cap: c bends logits to c tanh(logits / c) (Gemma 2, arXiv 2408.00118).
      reduction: "mean" over the counted tokens (0 if there are none), "sum", or "none". Inside `shard_map` over the
        tokens at hand; otherwise over those of all devices.
      backend: "auto" takes the kernels on TPU, where they are faster, and XLA elsewhere; "pallas" insists on a kernel.
      config: None looks it up; an `XlaCrossEntropyConfig` means the XLA path, a `TpuCrossEntropyConfig` the kernels.

    Returns:
      (loss, aux): loss float32, a scalar or [...] with "none"; aux is (log_probs, lse), differentiable too.

    Raises:
      ArgumentError: shapes, dtypes or values that do not fit together; it names the argument.
      UnsupportedError: backend="pallas" does not take this case.
    """
    labels = as_array("linear_cross_entropy", "labels", labels)
    label_mask = None if label_mask is None else as_array("linear_cross_entropy", "label_mask", label_mask)
    _check(x, w, labels, z_loss, label_mask, soft_cap, reduction, backend, config)
    chosen = dispatch.choose(backend, x.dtype, x.shape[-1], w.shape[0], config)
    x, w, labels = _laid_out(x, w, labels, label_mask)
    spec = _Spec(None if soft_cap is None else float(soft_cap), float(z_loss), chosen, config)
    x, w, labels = partition.vary_alike(x, w, labels)
    if reduction == "none":
        aux = CrossEntropyAux(*_tokens(spec, x, w, labels, None))
        return _losses(spec, *aux), aux
    loss, *known = _summed(spec, x, w, labels)
    aux = CrossEntropyAux(*_tokens(spec, x, w, labels, jax.lax.stop_gradient(tuple(known))))
    if reduction == "mean":
        loss /= jnp.maximum(jnp.sum(labels >= 0), 1)
    return loss, aux


def _laid_out(x, w, labels, label_mask) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays in one layout over explicit mesh axes, that of the tokens of x; labels with their mask."""
    x, w, labels = (jnp.asarray(array) for array in (x, w, labels))
    tokens = layout.entries(x)[:-1]
    labels = layout.divide(labels, *tokens)
    if label_mask is not None:
        labels = jnp.where(layout.divide(jnp.asarray(label_mask), *tokens), labels, -1)
    return layout.divide(x, *tokens, None), layout.whole(w), labels


def _check(x, w, labels, z_loss, label_mask, soft_cap, reduction, backend, config) -> None:
    def error(argument, problem, remedy):
        raise ArgumentError("linear_cross_entropy", argument, problem, remedy)

    check_arrays("linear_cross_entropy", x=x, w=w)
    for name, array in (("x", x), ("w", w)):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            error(name, f"is {array.dtype}", "give float32, bfloat16 or float16")
    if x.ndim < 2:
        error("x", f"has shape {x.shape}", "give at least one axis of tokens before that of the hidden size")
    if w.ndim != 2 or w.shape[1] != x.shape[-1]:
        error("w", f"has shape {w.shape} with x {x.shape}", f"give [V, {x.shape[-1]}], a row for each id")
    if w.shape[0] == 0:
        error("w", "has no rows", "give at least one id")
    if labels.shape != x.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.signedinteger):
        error("labels", f"has {labels.dtype}{list(labels.shape)}", f"give signed integers {list(x.shape[:-1])}")
    if label_mask is not None and (label_mask.shape != labels.shape or label_mask.dtype != bool):
        error("label_mask", f"has {label_mask.dtype}{list(label_mask.shape)}", f"give bool {list(labels.shape)}")
    known, counted = values(labels), None if label_mask is None else values(label_mask)
    if known is not None and (label_mask is None or counted is not None):
        largest = np.max(known, initial=-1, where=True if counted is None else counted)
        if largest >= w.shape[0]:
            error("labels", f"has {largest}, with {w.shape[0]} rows in w", "give ids that w has, or -1")
    if not is_number(z_loss) or not 0 <= z_loss < float("inf"):
        error("z_loss", f"is {z_loss}", "give a finite number, not negative")
    if soft_cap is not None and not (is_number(soft_cap) and 0 < soft_cap < float("inf")):
        error("soft_cap", f"is {soft_cap}", "give a positive number or None")
    if reduction not in ("mean", "sum", "none"):
        error("reduction", f"is {reduction!r}", "choose mean, sum or none")
    check_backend("linear_cross_entropy", backend)
    check_config("linear_cross_entropy", config, XlaCrossEntropyConfig, TpuCrossEntropyConfig)
    wrong = None if config is None else config.wrong()
    if wrong is not None:
        error("config", f"is {config}", wrong)


def _losses(spec, log_probs, lse):
    return spec.z_loss * jnp.square(lse) - log_probs if spec.z_loss else -log_probs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(spec, x, w, labels):
    """(sum of the losses, log_probs, lse), of which the first alone has a gradient."""
    log_probs, lse = _forward(spec, x, w, labels)
    return jnp.sum(_losses(spec, log_probs, lse)), log_probs, lse


def _summed_fwd(spec, x, w, labels):
    def local(x, w, labels):
        flat = x.reshape(-1, x.shape[-1])
        log_probs, lse, dx, dw = chunks.forward_with_gradients(
            flat, w, labels.reshape(-1), spec.z_loss, spec.steps(flat, w)
        )
        return log_probs.reshape(labels.shape), lse.reshape(labels.shape), dx.reshape(x.shape), dw

    tokens = _tokens_of(labels)
    outputs = (tokens, tokens, f"{tokens} d", "v d")
    log_probs, lse, dx, dw = _divided(local, (x, w, labels), (f"{tokens} d", "v d", tokens), outputs)
    dx, dw = checkpoint_name(dx, DX), checkpoint_name(dw, DW)
    return (jnp.sum(_losses(spec, log_probs, lse)), log_probs, lse), (dx, dw, jnp.zeros((0,), w.dtype))


def _summed_bwd(spec, residuals, cotangents):
    dx, dw, like = residuals
    return (dx * cotangents[0]).astype(dx.dtype), (dw * cotangents[0]).astype(like.dtype), None


_summed.defvjp(_summed_fwd, _summed_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tokens(spec, x, w, labels, known):
    """(log_probs, lse); `known` are the two where they have been computed already."""
    return _forward(spec, x, w, labels) if known is None else known


def _tokens_fwd(spec, x, w, labels, known):
    logits = None
    if known is None and labels.size <= spec.steps(x.reshape(-1, x.shape[-1]), w).chunk:
        *known, logits = _forward_keeping_logits(spec, x, w, labels)
    log_probs, lse = _forward(spec, x, w, labels) if known is None else known
    lse = checkpoint_name(lse, LSE)
    return (log_probs, lse), (x, w, labels, lse, logits)


def _tokens_bwd(spec, residuals, cotangents):
    x, w, labels, lse, *logits = residuals
    logits = [part for part in logits if part is not None]

    def local(x, w, *parts):
        flat = x.reshape(-1, x.shape[-1])
        parts = [part.reshape(-1, *part.shape[labels.ndim :]) for part in parts]
        dx, dw = chunks.backward(flat, w, *parts, steps=spec.steps(flat, w))
        return dx.reshape(x.shape), dw

    tokens = _tokens_of(labels)
    dims = (f"{tokens} d", "v d", *[tokens] * 4, *[f"{tokens} v" for _ in logits])
    dx, dw = _divided(local, (x, w, labels, lse, *cotangents, *logits), dims, (f"{tokens} d", "v d"))
    return dx, dw.astype(w.dtype), None, None


_tokens.defvjp(_tokens_fwd, _tokens_bwd)


def _forward(spec, x, w, labels):
    def local(x, w, labels):
        flat = x.reshape(-1, x.shape[-1])
        parts = chunks.forward(flat, w, labels.reshape(-1), spec.steps(flat, w))
        return tuple(part.reshape(labels.shape) for part in parts)

    tokens = _tokens_of(labels)
    return _divided(local, (x, w, labels), (f"{tokens} d", "v d", tokens), (tokens, tokens))


def _forward_keeping_logits(spec, x, w, labels):
    def local(x, w, labels):
        flat = x.reshape(-1, x.shape[-1])
        parts = chunks.forward_keeping_logits(flat, w, labels.reshape(-1), spec.steps(flat, w))
        return tuple(part.reshape(*labels.shape, *part.shape[1:]) for part in parts)

    tokens = _tokens_of(labels)
    return _divided(local, (x, w, labels), (f"{tokens} d", "v d", tokens), (tokens, tokens, f"{tokens} v"))


def _tokens_of(labels) -> str:
    """A label for each axis of the tokens; the flattening happens where they are local."""
    return " ".join(f"n{i}" for i in range(labels.ndim))


def _divided(local, arrays, dims, out_dims):
    """The XLA path counts as opaque too: a partitioner that looks into it would sum dw over devices for each chunk."""
    tokens = dims[2]
    batch = tokens.split()[0]
    options = {"divisible": tokens, "batch": batch, "name": "linear_cross_entropy", "opaque": True}
    return partition.divided(local, arrays, dims, out_dims, **options)
