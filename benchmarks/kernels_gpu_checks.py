"""Kernels on the device at hand against float64 NumPy: outputs and gradients of small cases in bfloat16."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels

TOLERANCE = 0.02  # of the largest number of the reference


@dataclasses.dataclass
class Check:
    """Errors over the largest number of each result, in order; `problem` says why there are none."""

    name: str
    implementation: str
    errors: list[float] = dataclasses.field(default_factory=list)
    right: bool | None = None
    problem: str = ""


def first_line(error: Exception) -> str:
    """Kind and first line of an error; of a case that a kernel of ours does not take, the reason."""
    if isinstance(error, pallas_kernels.UnsupportedError):
        return error.reason
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def _check(name: str, implementation: str, run: Callable[[], Sequence[Any]], expected: Sequence[np.ndarray]) -> Check:
    """Runs an implementation; one that does not take the case is reported as such."""
    try:
        found = [np.asarray(x, np.float64) for x in run()]
    except Exception as error:  # whatever a compiler, a library or a device has against a case
        check = Check(name, implementation, problem=first_line(error))
        print(f"  ?    {implementation:14} {name}: {check.problem}", flush=True)
        return check
    errors = [
        float(np.max(np.abs(one - right)) / np.max(np.abs(right))) for one, right in zip(found, expected, strict=True)
    ]
    check = Check(name, implementation, errors, all(error < TOLERANCE for error in errors))
    verdict = "right" if check.right else "WRONG"
    print(f"{verdict} {implementation:14} {name}: errors {', '.join(f'{e:.1e}' for e in errors)}", flush=True)
    return check


# Attention


def attention(length: int, others: dict[str, Callable]) -> list[Check]:
    """Checks of attention on every backend that takes a case; each is printed as it is done.

    Args:
      length: of the sequences is about this.
      others: by name, functions of (causal, q, k, v, gradient), float32 NumPy, that give the output and the gradients
        of q, k and v of an implementation that is not in this package.
    """
    length -= length // 20  # no multiple of any block
    packed = np.sort(np.random.default_rng(1).integers(0, 5, (2, length)), axis=1).astype(np.int32)
    packed[:, -length // 10 :] = -1
    here = np.tile(np.arange(length, dtype=np.int32), (2, 1))
    cases = {
        "causal": (128, {"causal": True}),
        "full": (128, {"causal": False}),
        "packed, with padding": (128, {"causal": True, "segment_ids": packed}),
        "packed, heads of 64": (64, {"causal": True, "segment_ids": packed}),
        "window, soft cap": (128, {"causal": True, "window": length // 3, "soft_cap": 5.0}),
        "keys of an earlier shard": (64, {"causal": True, "positions": (here + length // 2, here)}),
    }
    checks = []
    for name, (size, options) in cases.items():
        arrays = attention_arrays(2, length, 4, 2, size)
        expected = attention_float64(*arrays, **options)
        for backend in ("pallas", "cudnn", "xla"):
            run = functools.partial(_ours, backend, options, *arrays)
            # cuDNN gives no log-sum-exp.
            right = expected[:-1] if backend == "cudnn" else expected
            implementation = "ours" if backend == "pallas" else backend
            checks.append(_check(f"attention, {name}", implementation, run, right))
        for other, function in others.items() if name in ("causal", "full") else ():
            run = functools.partial(function, options["causal"], *arrays)
            checks.append(_check(f"attention, {name}", other, run, expected[:-1]))
    return checks


def attention_arrays(batch: int, length: int, heads: int, kv_heads: int, size: int) -> tuple[np.ndarray, ...]:
    """q, k, v and the gradient of the output, float32, of numbers that bfloat16 has."""
    rng = np.random.default_rng(0)
    shapes = [(batch, length, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    drawn = (rng.standard_normal(shape, np.float32).astype(jnp.bfloat16) for shape in shapes)
    return tuple(x.astype(np.float32) for x in drawn)


def documents(batch: int, length: int, count: int) -> np.ndarray:
    """Segment ids of `count` documents of equal length in each row."""
    return np.tile(np.arange(length, dtype=np.int32) * count // length, (batch, 1))


def _ours(backend: str, options: dict[str, Any], *arrays: np.ndarray) -> tuple:
    q, k, v, gradient = (jnp.asarray(array, jnp.bfloat16) for array in arrays)
    masks = {key: value for key, value in options.items() if key in ("segment_ids", "positions")}
    static = {key: value for key, value in options.items() if key not in masks}
    with_lse = backend != "cudnn"

    @jax.jit
    def run(q, k, v, gradient, masks):
        def call(q, k, v):
            return pallas_kernels.attention(q, k, v, **static, **masks, backend=backend, return_lse=with_lse)

        result, pullback = jax.vjp(call, q, k, v)
        if not with_lse:
            return result, *pullback(gradient)
        out, lse = result
        return out, *pullback((gradient, jnp.zeros_like(lse))), jnp.maximum(lse, -100.0)

    return run(q, k, v, gradient, jax.tree.map(jnp.asarray, masks))


def attention_float64(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    gradient: np.ndarray,
    *,
    causal: bool,
    segment_ids: np.ndarray | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    positions: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, ...]:
    """Output, gradients of q, k and v, and the log-sum-exp, -100 where a query sees nothing."""
    q, k, v, gradient = (x.astype(np.float64) for x in (q, k, v, gradient))
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k_all, v_all = np.repeat(k, group, 2), np.repeat(v, group, 2)
    here, there = positions or (np.arange(q.shape[1])[None],) * 2
    behind = here[:, :, None] - there[:, None, :]
    seen = np.ones(behind.shape, bool) if not causal else behind >= 0
    if window is not None:
        seen &= behind < window
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids >= 0)[:, :, None]
    raw = np.einsum("bthd,bshd->bhts", q, k_all) * scale
    scores = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    slope = 1.0 if soft_cap is None else 1 - np.square(scores / soft_cap)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest) * seen[:, None]
    total = weights.sum(-1, keepdims=True)
    blind = total == 0
    lse = np.where(blind, -100.0, largest + np.log(np.where(blind, 1.0, total)))
    weights /= np.where(blind, 1.0, total)
    d_weights = np.einsum("bthd,bshd->bhts", gradient, v_all)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * slope * scale
    by_group = (*k.shape[:3], group, k.shape[3])
    return (
        np.einsum("bhts,bshd->bthd", weights, v_all),
        np.einsum("bhts,bshd->bthd", d_scores, k_all),
        np.einsum("bhts,bthd->bshd", d_scores, q).reshape(by_group).sum(3),
        np.einsum("bhts,bthd->bshd", weights, gradient).reshape(by_group).sum(3),
        lse[..., 0],
    )


# Grouped matmul


def grouped_matmul() -> list[Check]:
    """Checks of the product and its gradients, an empty group and a small one among the groups."""
    sizes = np.array([203, 0, 240, 5, 192], np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((sizes.sum(), 128), (len(sizes), 128, 256), (sizes.sum(), 256))
    x, w, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    expected = grouped_float64(*(np.asarray(array, np.float64) for array in (x, w, dy)), sizes)
    checks = []
    for implementation, backend in (("ours", "pallas"), ("xla", "xla")):
        product = functools.partial(pallas_kernels.grouped_matmul, group_sizes=jnp.asarray(sizes), backend=backend)
        weights = functools.partial(pallas_kernels.grouped_matmul_transposed, x, dy, backend=backend)
        runs = {
            "y": functools.partial(product, x, w),
            "dx": functools.partial(product, dy, w, transpose_w=True),
            "dw": functools.partial(weights, jnp.asarray(sizes)),
        }
        for kind, run in runs.items():
            call = functools.partial(_alone, run)
            checks.append(_check(f"grouped matmul {kind}", implementation, call, (expected[kind],)))
    return checks


def _alone(run: Callable[[], Any]) -> tuple[Any]:
    return (run(),)


def grouped_float64(x: np.ndarray, w: np.ndarray, dy: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """The product y, and its gradients dx and dw."""
    rows = np.split(np.arange(len(x)), np.cumsum(sizes)[:-1])
    return {
        "y": np.concatenate([x[own] @ w[i] for i, own in enumerate(rows)]),
        "dx": np.concatenate([dy[own] @ w[i].T for i, own in enumerate(rows)]),
        "dw": np.stack([x[own].T @ dy[own] for own in rows]),
    }


# Routing


def routing_arrays(tokens: int, experts: int) -> tuple[jax.Array, jax.Array]:
    """Logits and bias."""
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (tokens, experts)), 0.1 * jax.random.normal(keys[1], (experts,))


def routed(
    backend: str, top_k: int, logits: jax.Array, bias: jax.Array | None, *, score: str = "sigmoid", **options: Any
) -> tuple[jax.Array, ...]:
    """Experts of each token, their weights, sizes of the groups, and the order by expert and back."""
    return pallas_kernels.route(logits, top_k=top_k, bias=bias, score=score, backend=backend, **options)[:5]


def routing() -> list[Check]:
    """Checks of the choice and the order, of tokens that are no multiple of what a block takes."""
    logits, bias = routing_arrays(1000, 72)
    cases = {
        "sigmoid, bias": (bias, {}),
        "softmax": (None, {"score": "softmax"}),
        "groups": (bias, {"groups": (9, 3)}),
        "threshold": (bias, {"threshold": 0.8}),
        "capacity": (None, {"capacity": 60}),
    }
    checks = []
    for case, (added, options) in cases.items():
        exact = (np.asarray(logits, np.float64), 0.0 if added is None else np.asarray(added, np.float64))
        expected = routing_float64(5, *exact, **options)
        for name, backend in (("ours", "pallas"), ("xla", "xla")):
            run = functools.partial(routed, backend, 5, logits, added, **options)
            checks.append(_check(f"routing, {case}", name, run, expected))
    return checks


def routing_float64(
    top_k: int,
    logits: np.ndarray,
    bias: np.ndarray | float,
    *,
    score: str = "sigmoid",
    groups: tuple[int, int] | None = None,
    threshold: float = -np.inf,
    capacity: int | None = None,
) -> tuple[np.ndarray, ...]:
    """What `routed` returns, of logits without equal ones."""
    tokens, number = logits.shape
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) if score == "softmax" else 1 / (1 + np.exp(-logits))
    biased = scores + bias
    if groups is not None:
        parts = biased.reshape(tokens, groups[0], -1)
        totals = np.sort(parts)[..., -2:].sum(-1)
        lost = totals < np.sort(totals)[:, -groups[1], None]
        biased = np.where(lost[..., None], -np.inf, parts).reshape(biased.shape)
    experts = np.argsort(-biased, axis=1)[:, :top_k]
    chosen = np.take_along_axis(biased, experts, 1) >= threshold
    mine = np.where(chosen, np.take_along_axis(scores, experts, 1), 0)
    weights = mine / np.where(chosen.any(1), mine.sum(1), 1)[:, None]
    experts = np.where(chosen, experts, number)
    if capacity is not None:
        flat = experts.reshape(-1)
        rank = np.array([np.count_nonzero(flat[:i] == expert) for i, expert in enumerate(flat)]).reshape(experts.shape)
        experts = np.where(rank < capacity, experts, number)
    order = np.argsort(experts.reshape(-1), kind="stable")
    sizes = np.bincount(experts.reshape(-1), minlength=number + 1)[:number]
    return experts, np.where(experts < number, weights, 0), sizes, order, np.argsort(order)


# Cross-entropy


def loss_arrays(tokens: int, width: int, vocabulary: int) -> tuple[jax.Array, ...]:
    """Hidden states, head and labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    w = jax.random.normal(keys[1], (vocabulary, width), jnp.bfloat16) * width**-0.5
    return x, w.astype(jnp.bfloat16), jax.random.randint(keys[2], (tokens,), 0, vocabulary)


def cross_entropy() -> list[Check]:
    """Checks of the loss and its gradients, with tokens that are not counted."""
    x, w, labels = loss_arrays(192, 64, 1000)
    labels = labels.at[::7].set(-1)
    expected = loss_float64(np.asarray(x, np.float64), np.asarray(w, np.float64), np.asarray(labels), z_loss=1e-3)

    def run(backend):
        def loss(x, w):
            return pallas_kernels.linear_cross_entropy(x, w, labels, z_loss=1e-3, backend=backend)[0]

        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)
        return value, *gradients

    runs = {"ours": functools.partial(run, "auto"), "xla": functools.partial(run, "xla")}
    return [_check("cross-entropy", implementation, call, expected) for implementation, call in runs.items()]


def loss_float64(x: np.ndarray, w: np.ndarray, labels: np.ndarray, z_loss: float) -> tuple[np.ndarray, ...]:
    """Mean loss of the tokens whose label is not negative, and the gradients of x and w."""
    logits = x @ w.T
    largest = logits.max(1, keepdims=True)
    lse = np.log(np.exp(logits - largest).sum(1, keepdims=True)) + largest
    rows, counted = np.arange(len(labels)), labels >= 0
    losses = lse[:, 0] - logits[rows, labels] + z_loss * lse[:, 0] ** 2
    d_logits = np.exp(logits - lse) * (1 + 2 * z_loss * lse)
    d_logits[rows, labels] -= 1
    d_logits *= counted[:, None] / counted.sum()
    return np.asarray((losses * counted).sum() / counted.sum()), d_logits @ w, d_logits.T @ x
