"""Kernels on a GPU: ours, cuDNN through jax.nn, torch SDPA and flash-attn where they are installed, and XLA.

First every implementation is compared with float64 NumPy on small arrays, outputs and gradients; one that is wrong is
timed all the same, and marked. Then implementations take turns, so that the clock and heat of the device are the same
for all; a time is the median of the rounds. The backward pass is the time of both passes less that of the forward one.

TFLOP/s count visible pairs of queries and keys, so causal is half; two products forward, five backward. Of
cross-entropy three products of (tokens, width, vocabulary) are counted, and the memory is what the compiled program
needs beside its arguments and results.

  python benchmarks/kernels_gpu.py --output benchmarks/results/kernels_gpu        on a Hopper GPU, some minutes
  python benchmarks/kernels_gpu.py --tiny                                         anywhere: does it run, are they right
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

# torch needs a part of the memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.tune.costs import in_turns

TOLERANCE = 0.02  # of the largest number of the reference, in bfloat16
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch", "flash-attn", "numpy")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      tokens: of an attention call; its batch is tokens over length.
      heads: pairs of query and key heads.
      rows: of grouped matmuls; (groups, inner, columns) of each.
      losses: (tokens, width, vocabulary) of cross-entropy.
    """

    tokens: int = 16384
    lengths: tuple[int, ...] = (4096, 8192, 16384)
    heads: tuple[tuple[int, int], ...] = ((16, 16), (16, 2))
    head_size: int = 128
    rows: int = 131072
    experts: tuple[tuple[int, int, int], ...] = (
        (128, 2048, 768),
        (128, 4096, 1536),
        (128, 7168, 2048),
        (128, 2048, 7168),
    )
    losses: tuple[tuple[int, int, int], ...] = ((8192, 2048, 151936), (4096, 4096, 151936), (32768, 4096, 151936))


TINY = Sizes(
    tokens=256,
    lengths=(128, 256),
    heads=((4, 2),),
    head_size=64,
    rows=512,
    experts=((4, 128, 64),),
    losses=((64, 32, 1000),),
)


@dataclasses.dataclass
class Row:
    """One implementation of one case; `ms` is None where `problem` says why there is no time."""

    case: str
    implementation: str
    ms: float | None = None
    tflops: float | None = None
    temporary_mib: float | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Attention:
    """A case of attention."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    size: int
    causal: bool

    @property
    def name(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{self.batch} x {self.length}, {self.heads}/{self.kv_heads} heads of {self.size}, {mask}"

    def flops(self, backward: bool) -> float:
        """Of two products forward, or of five backward."""
        pairs = self.length**2 / (2 if self.causal else 1)
        return (10 if backward else 4) * self.batch * self.heads * self.size * pairs


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns 1 if an implementation of ours is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, help="name of the files to write, without .json or .md")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any device")
    parser.add_argument("--only", default="", help="attention, grouped or loss")
    options = parser.parse_args(arguments)
    sizes = TINY if options.tiny else Sizes()
    parts = {"attention": attention_rows, "grouped": grouped_rows, "loss": loss_rows}
    wrong = check_all(sizes)
    rows: list[Row] = []
    for name, part in parts.items():
        if options.only in name:
            rows += part(sizes)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": str(datetime.date.today()),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "wrong": wrong,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    print("\n" + markdown(record))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(markdown(record))
    return 1 if any("ours" in line for line in wrong) else 0


# Attention


def implementations(case: Attention) -> dict[str, Callable]:
    """Functions of q, k and v in (batch, sequence, heads, head size), jax's and torch's."""
    found: dict[str, Callable] = {
        "ours": functools.partial(pallas_kernels.attention, causal=case.causal, backend="pallas"),
        "cudnn": functools.partial(jax.nn.dot_product_attention, is_causal=case.causal, implementation="cudnn"),
        "xla": functools.partial(pallas_kernels.attention, causal=case.causal, backend="xla"),
    }
    if installed("torch"):
        found["torch sdpa"] = functools.partial(_torch_sdpa, case.causal)
    if installed("flash_attn"):
        flash = importlib.import_module("flash_attn").flash_attn_func
        found["flash-attn"] = functools.partial(flash, causal=case.causal)
    return found


def attention_rows(sizes: Sizes) -> list[Row]:
    """Forward and backward pass at all lengths, heads and masks."""
    rows = []
    for heads, kv_heads in sizes.heads:
        for length in sizes.lengths:
            for causal in (True, False):
                case = Attention(sizes.tokens // length, length, heads, kv_heads, sizes.head_size, causal)
                rows += _passes(case)
    return rows


def _passes(case: Attention) -> list[Row]:
    q, k, v, gradient = attention_arrays(case)
    forward: dict[str, Callable] = {}
    both: dict[str, Callable] = {}
    rows = []
    for name, function in implementations(case).items():
        library = "torch" if name in ("torch sdpa", "flash-attn") else "jax"
        try:
            calls = (_torch_calls if library == "torch" else _jax_calls)(function, q, k, v, gradient)
            for call in calls:
                jax.block_until_ready(call())
        except Exception as error:
            rows.append(Row(f"attention, {case.name}", name, problem=first_line(error)))
            continue
        forward[name], both[name] = calls
    times = dict(zip(forward, medians([*forward.values(), *both.values()]), strict=False))
    times_both = dict(zip(both, medians(list(both.values())), strict=True)) if both else {}
    for name in forward:
        alone, whole = times[name], times_both[name]
        rows.append(timed(f"attention forward, {case.name}", name, alone, case.flops(backward=False)))
        rows.append(timed(f"attention backward, {case.name}", name, whole - alone, case.flops(backward=True)))
    return show(rows)


def attention_arrays(case: Attention) -> tuple[np.ndarray, ...]:
    """q, k, v and the gradient of the output, float32."""
    rng = np.random.default_rng(0)
    shapes = [case.heads, case.kv_heads, case.kv_heads, case.heads]
    return tuple(rng.standard_normal((case.batch, case.length, n, case.size), np.float32) for n in shapes)


def _jax_calls(function: Callable, *arrays: np.ndarray) -> tuple[Callable, Callable]:
    """The forward pass, and both passes."""
    q, k, v, gradient = (jnp.asarray(array, jnp.bfloat16) for array in arrays)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> Any:
        out, vjp = jax.vjp(function, q, k, v)
        return out, vjp(gradient)

    return functools.partial(jax.jit(function), q, k, v), functools.partial(jax.jit(both), q, k, v, gradient)


class _TorchResult:
    """Lets jax wait for what torch has queued."""

    def __init__(self, value: Any):
        self.value = value

    def block_until_ready(self) -> _TorchResult:
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


def _torch_calls(function: Callable, *arrays: np.ndarray) -> tuple[Callable, Callable]:
    torch = importlib.import_module("torch")
    place = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, gradient = (torch.tensor(array, dtype=torch.bfloat16, device=place) for array in arrays)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> _TorchResult:
        with torch.no_grad():
            return _TorchResult(function(*inputs))

    def both() -> _TorchResult:
        out = function(*inputs)
        return _TorchResult((out, torch.autograd.grad(out, inputs, gradient)))

    return forward, both


def _torch_sdpa(causal: bool, q: Any, k: Any, v: Any) -> Any:
    """Scaled dot product attention of torch, which takes (batch, heads, sequence, head size)."""
    torch = importlib.import_module("torch")
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    grouped = q.shape[2] != k.shape[2]
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


# Grouped matmul


def grouped_rows(sizes: Sizes) -> list[Row]:
    """The product and the gradients of its rows and weights; group sizes as a nearly balanced router gives them."""
    rows = []
    for groups, inner, columns in sizes.experts:
        x, w, dy, group_sizes = grouped_arrays(sizes.rows, groups, inner, columns)
        flops = 2.0 * sizes.rows * inner * columns
        for kind, calls in grouped_calls(x, w, dy, group_sizes).items():
            case = f"grouped matmul {kind}, {sizes.rows} rows, {groups} x {inner} x {columns}"
            rows += compare(case, calls, flops)
    return rows


def grouped_arrays(rows: int, groups: int, inner: int, columns: int) -> tuple[jax.Array, ...]:
    """Rows, weights, gradient of the result, and sizes of groups."""
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(rows, rng.dirichlet(np.full(groups, 25.0)))
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, inner), (groups, inner, columns), (rows, columns))
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    return *arrays, jnp.asarray(sizes, jnp.int32)


def grouped_calls(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> dict[str, dict[str, Callable]]:
    """Calls by product and implementation."""
    product, weights = pallas_kernels.grouped_matmul, pallas_kernels.grouped_matmul_transposed
    calls: dict[str, dict[str, Callable]] = {"y": {}, "dx": {}, "dw": {}}
    for name, backend in (("ours", "pallas"), ("xla", "xla")):
        calls["y"][name] = jitted(functools.partial(product, backend=backend), x, w, sizes)
        calls["dx"][name] = jitted(functools.partial(product, backend=backend, transpose_w=True), dy, w, sizes)
        calls["dw"][name] = jitted(functools.partial(weights, backend=backend), x, dy, sizes)
    calls["y"]["lax.ragged_dot"] = jitted(jax.lax.ragged_dot, x, w, sizes)
    return calls


# Cross-entropy


def loss_rows(sizes: Sizes) -> list[Row]:
    """Loss and gradients, ours and with materialised logits, and the products alone."""
    rows = []
    for tokens, width, vocabulary in sizes.losses:
        x, w, labels = loss_arrays(tokens, width, vocabulary)
        functions = {
            "ours": functools.partial(_ours, "auto"),
            "ours, xla": functools.partial(_ours, "xla"),
            "materialised": _materialised,
            "products alone": _products,
        }
        calls = {
            name: jitted(function if function is _products else jax.value_and_grad(function, (0, 1)), x, w, labels)
            for name, function in functions.items()
        }
        rows += compare(f"cross-entropy, {tokens} x {width} x {vocabulary}", calls, 6.0 * tokens * width * vocabulary)
    return rows


def loss_arrays(tokens: int, width: int, vocabulary: int) -> tuple[jax.Array, ...]:
    """Hidden states, head and labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    w = jax.random.normal(keys[1], (vocabulary, width), jnp.bfloat16) * width**-0.5
    return x, w.astype(jnp.bfloat16), jax.random.randint(keys[2], (tokens,), 0, vocabulary)


def _ours(backend: str, x: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
    return pallas_kernels.linear_cross_entropy(x, w, labels, backend=backend)[0]


def _materialised(x: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jnp.matmul(x, w.T, preferred_element_type=jnp.float32)
    found = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - found)


def _products(x: jax.Array, w: jax.Array, labels: jax.Array) -> Any:
    """The three products of loss and gradients, with logits stored in bfloat16."""
    del labels
    logits = x @ w.T
    return logits @ w, logits.T @ x


# Right or wrong


def check_all(sizes: Sizes) -> list[str]:
    """Compares all implementations with float64 NumPy on small arrays; a line for each that is wrong."""
    wrong = []
    for causal in (True, False):
        case = Attention(1, 512 if sizes is not TINY else 64, 4, 2, sizes.head_size, causal)
        arrays = [np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64) for array in attention_arrays(case)]
        expected = attention_float64(causal, *arrays)
        for name, function in implementations(case).items():
            calls = _torch_calls if name in ("torch sdpa", "flash-attn") else _jax_calls
            try:
                result = calls(function, *(array.astype(np.float32) for array in arrays))[1]()
            except Exception as error:
                print(f"{name:14} not checked, {case.name}: {first_line(error)}")
                continue
            out, gradients = result.value if isinstance(result, _TorchResult) else result
            wrong += verdict(f"{name}, attention, {case.name}", (out, *gradients), expected)
    x, w, dy, group_sizes = grouped_arrays(640, 5, sizes.head_size, sizes.head_size)
    products = grouped_float64(*(np.asarray(array, np.float64) for array in (x, w, dy)), np.asarray(group_sizes))
    # The columns of the result are as wide as its inner axis, so that `w` serves both directions.
    for kind, calls in grouped_calls(x, w, dy, group_sizes).items():
        for name, call in calls.items():
            try:
                found = call()
            except Exception as error:
                print(f"{name:14} not checked, grouped matmul {kind}: {first_line(error)}")
                continue
            wrong += verdict(f"{name}, grouped matmul {kind}", (found,), (products[kind],))
    x, w, labels = loss_arrays(192, 64, 1000)
    expected = loss_float64(np.asarray(x, np.float64), np.asarray(w, np.float64), np.asarray(labels))
    loss, gradients = jax.value_and_grad(functools.partial(_ours, "auto"), (0, 1))(x, w, labels)
    return wrong + verdict("ours, cross-entropy", (loss, *gradients), expected)


def verdict(name: str, found: Sequence[Any], expected: Sequence[np.ndarray]) -> list[str]:
    """Prints the largest error over the largest number of each array; a line if one is too large."""
    errors = []
    for one, right in zip(found, expected, strict=True):
        one = one.detach().float().cpu().numpy() if hasattr(one, "detach") else np.asarray(one, np.float64)
        errors.append(float(np.max(np.abs(one - right)) / np.max(np.abs(right))))
    line = f"{name}: errors {', '.join(f'{error:.1e}' for error in errors)}"
    bad = not all(error < TOLERANCE for error in errors)
    print(f"{'WRONG' if bad else 'right'} {line}", flush=True)
    return [line] if bad else []


def attention_float64(causal: bool, q: np.ndarray, k: np.ndarray, v: np.ndarray, gradient: np.ndarray) -> tuple:
    """Output and gradients of q, k and v."""
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k_all, v_all = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("bthd,bshd->bhts", q, k_all) * scale
    if causal:
        scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("bthd,bshd->bhts", gradient, v_all)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    dk = np.einsum("bhts,bthd->bshd", d_scores, q)
    dv = np.einsum("bhts,bthd->bshd", weights, gradient)
    by_group = (*k.shape[:3], group, k.shape[3])
    return (
        np.einsum("bhts,bshd->bthd", weights, v_all),
        np.einsum("bhts,bshd->bthd", d_scores, k_all),
        dk.reshape(by_group).sum(3),
        dv.reshape(by_group).sum(3),
    )


def grouped_float64(x: np.ndarray, w: np.ndarray, dy: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """The product and its gradients."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    of_group = [group == index for index in range(len(sizes))]
    return {
        "y": np.einsum("mk,mkn->mn", x, w[group]),
        "dx": np.einsum("mn,mkn->mk", dy, w[group]),
        "dw": np.stack([x[rows].T @ dy[rows] for rows in of_group]),
    }


def loss_float64(x: np.ndarray, w: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean loss, and the gradients of x and w."""
    logits = x @ w.T
    largest = logits.max(1, keepdims=True)
    lse = np.log(np.exp(logits - largest).sum(1, keepdims=True)) + largest
    rows = np.arange(len(labels))
    d_logits = np.exp(logits - lse)
    d_logits[rows, labels] -= 1
    d_logits /= len(labels)
    return np.asarray((lse[:, 0] - logits[rows, labels]).mean()), d_logits @ w, d_logits.T @ x


# Times and tables


def compare(case: str, calls: dict[str, Callable], flops: float) -> list[Row]:
    """Rows of calls that take turns; those that fail get a row that says why."""
    rows, good = [], {}
    for name, call in calls.items():
        try:
            jax.block_until_ready(call())
            good[name] = call
        except Exception as error:
            rows.append(Row(case, name, problem=first_line(error)))
    for (name, call), seconds in zip(good.items(), medians(list(good.values())), strict=True):
        row = timed(case, name, seconds, flops)
        row.temporary_mib = temporary(call)
        rows.append(row)
    return show(rows)


def jitted(function: Callable, *arrays: jax.Array) -> Callable:
    """A call without arguments of the compiled function."""
    return functools.partial(jax.jit(function), *arrays)


def temporary(call: functools.partial) -> float:
    """MiB that the compiled program of a call needs beside arguments and results."""
    return call.func.lower(*call.args).compile().memory_analysis().temp_size_in_bytes / 2**20


def medians(calls: Sequence[Callable]) -> list[float]:
    """Seconds of each call, which take turns."""
    return [statistics.median(rounds) for rounds in in_turns(calls)]


def timed(case: str, name: str, seconds: float, flops: float) -> Row:
    """A row with its time and rate."""
    if seconds <= 0:  # a difference of two times within their noise
        return Row(case, name, problem="too short to measure")
    return Row(case, name, ms=seconds * 1e3, tflops=flops / seconds / 1e12)


def show(rows: list[Row]) -> list[Row]:
    """Prints rows as they come."""
    for row in rows:
        what = row.problem or f"{row.ms:9.3f} ms {row.tflops:8.1f} TFLOP/s"
        print(f"{row.case:64} {row.implementation:14} {what}", flush=True)
    return rows


def markdown(record: dict[str, Any]) -> str:
    """The results as a page."""
    versions_used = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Kernels on a GPU",
        "",
        f"{record['date']}, {record['device']}; {versions_used}; `{record['command']}`.",
        "",
    ]
    lines += [f"Wrong: {line}." for line in record["wrong"]] or ["All that ran agree with float64 NumPy."]
    lines += ["", "| case | implementation | ms | TFLOP/s | temporary MiB |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        if row["problem"]:
            lines.append(f"| {row['case']} | {row['implementation']} | {row['problem'].replace('|', '/')} | | |")
            continue
        memory = "" if row["temporary_mib"] is None else f"{row['temporary_mib']:.0f}"
        lines.append(f"| {row['case']} | {row['implementation']} | {row['ms']:.3f} | {row['tflops']:.1f} | {memory} |")
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        if importlib.util.find_spec(name.replace("-", "_")) or name.startswith(("jax-", "nvidia-")):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


if __name__ == "__main__":
    sys.exit(main())
