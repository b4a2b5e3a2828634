"""Kernels on a GPU: ours, cuDNN through jax.nn, torch SDPA and flash-attn where they are installed, and XLA.

First every implementation is compared with float64 NumPy on small arrays, outputs and gradients; one that is wrong is
timed all the same, and marked. Then implementations take turns, so that the clock and heat of the device are the same
for all; a time is the median of the rounds. The backward pass is the time of both passes less that of the forward one.

TFLOP/s count visible pairs of queries and keys, so causal is half; two products forward, five backward. Of
cross-entropy three products of (tokens, width, vocabulary) are counted, and the memory is what the compiled program
needs beside its arguments and results.

  python benchmarks/kernels_gpu.py --output benchmarks/results/kernels_gpu        on a Hopper GPU, some minutes
  python benchmarks/kernels_gpu.py --tiny                                         anywhere: does it run, are they right

With --record the order of the backends of attention and of routing, by time, goes into the tables that
`backend="auto"` reads.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

# torch needs a part of the memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import kernels_gpu_checks as checks
import numpy as np

import pallas_kernels
from pallas_kernels import tables, target
from pallas_kernels.tune.costs import in_turns

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch", "flash-attn", "flash-attn-3", "numpy")
FORWARD, BACKWARD = "attention forward", "attention backward"
# TFLOP/s to reach, of ours, on one H200.
AIMS = {FORWARD: 600, BACKWARD: 500, "grouped matmul": 500}
SLOWER, SMALLER = 1.05, 0.1  # cross-entropy: the most time, and memory, of materialised logits
OURS, CUDNN = "ours", "cudnn"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      tokens: of an attention call; its batch is tokens over length.
      heads: pairs of query and key heads.
      documents: of equal length in each row of the packed case.
      rows: of grouped matmuls; (groups, inner, columns) of each.
      routed: (tokens, experts, experts of a token) of routing.
      losses: (tokens, width, vocabulary) of cross-entropy.
      rounds: of taking turns, each of `seconds`.
      checked: length of the sequences that are compared with float64.
    """

    tokens: int = 16384
    lengths: tuple[int, ...] = (4096, 8192, 16384)
    heads: tuple[tuple[int, int], ...] = ((16, 16), (16, 2))
    head_size: int = 128
    documents: int = 8
    rows: int = 131072
    experts: tuple[tuple[int, int, int], ...] = (
        (128, 2048, 768),
        (128, 4096, 1536),
        (128, 7168, 2048),
        (128, 2048, 7168),
    )
    routed: tuple[tuple[int, int, int], ...] = ((16384, 128, 8), (16384, 64, 8), (16384, 256, 8))
    losses: tuple[tuple[int, int, int], ...] = ((8192, 2048, 151936), (4096, 4096, 151936), (32768, 4096, 151936))
    rounds: int = 7
    seconds: float = 0.05
    checked: int = 512


TINY = Sizes(
    tokens=128,
    lengths=(64,),
    heads=((4, 2),),
    head_size=64,
    documents=2,
    rows=256,
    experts=((4, 128, 64),),
    routed=((96, 16, 2),),
    losses=((64, 32, 1000),),
    rounds=2,
    seconds=0.0,
    checked=64,
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
    aim: str = ""
    met: bool | None = None


@dataclasses.dataclass(frozen=True)
class Attention:
    """A case of attention."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    size: int
    causal: bool
    documents: int = 1

    @property
    def name(self) -> str:
        mask = "causal" if self.causal else "full"
        packed = f", {self.documents} documents a row" if self.documents > 1 else ""
        return f"{self.batch} x {self.length}, {self.heads}/{self.kv_heads} heads of {self.size}, {mask}{packed}"

    @property
    def aimed(self) -> bool:
        """Whether the aims are for this case."""
        return self.causal and self.length == 4096 and self.documents == 1 and self.size == 128

    def flops(self, backward: bool) -> float:
        """Of two products forward, or of five backward."""
        pairs = self.length**2 / self.documents / (2 if self.causal else 1)
        return (10 if backward else 4) * self.batch * self.heads * self.size * pairs


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to time, and the MiB it needs beside arguments and results, where known."""

    call: Callable[[], Any]
    temporary_mib: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns 1 if an implementation of ours is wrong, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, help="name of the files to write, without .json or .md")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any device")
    parser.add_argument("--only", choices=("attention", "grouped", "routing", "loss"), help="one operation alone")
    parser.add_argument(
        "--record", action="store_true", help="write the order of the backends of attention and routing"
    )
    options = parser.parse_args(arguments)
    if options.record and options.tiny:
        parser.error("--record: times of tiny shapes say nothing")
    if jax.default_backend() != "gpu" and not options.tiny:
        print(f"kernels_gpu: no GPU here, jax runs on {jax.default_backend()}; --tiny runs anywhere", file=sys.stderr)
        return 2
    sizes = TINY if options.tiny else Sizes()
    parts = {
        "attention": (functools.partial(checks.attention, sizes.checked, foreign()), attention_rows),
        "grouped": (checks.grouped_matmul, grouped_rows),
        "routing": (checks.routing, routing_rows),
        "loss": (checks.cross_entropy, loss_rows),
    }
    chosen = [part for name, part in parts.items() if options.only in (None, name)]
    checked = [check for check_all, _ in chosen for check in check_all()]
    rows = [row for _, measure in chosen for row in measure(sizes)]
    record = describe(arguments, checked, rows)
    print("\n" + markdown(record))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(markdown(record))
    if options.record:
        write_tables(rows, pathlib.Path(str(importlib.resources.files(tables))))
    return 1 if any(check.right is False and check.implementation == OURS for check in checked) else 0


# Attention


def implementations(case: Attention) -> dict[str, Callable]:
    """By name, what compiles the forward pass, and both passes, for float32 NumPy q, k, v and gradient."""
    packed = case.documents > 1
    masks = {"segment_ids": checks.documents(case.batch, case.length, case.documents)} if packed else {}
    of_backend = {
        name: functools.partial(pallas_kernels.attention, causal=case.causal, backend=backend)
        for name, backend in ((OURS, "pallas"), (CUDNN, "cudnn"), ("xla", "xla"))
    }
    if not packed:  # jax.nn has no segments: ours makes a mask of them
        of_backend[CUDNN] = _cudnn(case.causal)
    makers = {name: functools.partial(_jax_programs, function, masks) for name, function in of_backend.items()}
    if not packed:
        others = torch_functions()
        makers |= {name: functools.partial(_torch_programs, f, case.causal) for name, f in others.items()}
    return makers


def _cudnn(causal: bool) -> Callable:
    return functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")


def attention_rows(sizes: Sizes) -> list[Row]:
    """Forward and backward pass at all lengths, heads and masks, and of packed documents."""
    cases = []
    for heads, kv_heads in sizes.heads:
        for length in sizes.lengths:
            batch = sizes.tokens // length
            cases += [Attention(batch, length, heads, kv_heads, sizes.head_size, causal) for causal in (True, False)]
        shortest = Attention(sizes.tokens // sizes.lengths[0], sizes.lengths[0], heads, kv_heads, sizes.head_size, True)
        cases.append(dataclasses.replace(shortest, documents=sizes.documents))
    return [row for case in cases for row in _passes(case, sizes)]


def _passes(case: Attention, sizes: Sizes) -> list[Row]:
    arrays = checks.attention_arrays(case.batch, case.length, case.heads, case.kv_heads, case.size)
    makers = {name: functools.partial(make, *arrays) for name, make in implementations(case).items()}
    programs, failed = compiled(f"attention, {case.name}", makers)
    forward, both = ([pair[i] for pair in programs.values()] for i in (0, 1))
    times = medians([program.call for program in [*forward, *both]], sizes)
    rows = []
    for i, name in enumerate(programs):
        alone, whole = times[i], times[len(forward) + i]
        for kind, seconds, program in ((FORWARD, alone, forward[i]), (BACKWARD, whole - alone, both[i])):
            row = timed(f"{kind}, {case.name}", name, seconds, case.flops(kind == BACKWARD), program)
            rows.append(aimed(row, AIMS[kind]) if case.aimed else row)
    return show(rows + failed)


def _jax_programs(function: Callable, masks: dict[str, np.ndarray], *arrays: np.ndarray) -> tuple[Program, Program]:
    """Masks are arguments, too: what is made of them belongs to the time."""
    q, k, v, gradient = (jnp.asarray(array, jnp.bfloat16) for array in arrays)
    masks = jax.tree.map(jnp.asarray, masks)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, masks: dict[str, jax.Array]) -> jax.Array:
        return function(q, k, v, **masks)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array, masks: dict[str, jax.Array]) -> Any:
        out, pullback = jax.vjp(lambda *x: forward(*x, masks), q, k, v)
        return out, pullback(gradient)

    return program(forward, q, k, v, masks), program(both, q, k, v, gradient, masks)


def torch_functions() -> dict[str, Callable]:
    """Attention of torch and of packages for it, where installed: functions of causal, q, k and v."""
    found: dict[str, Callable] = {}
    if installed("torch"):
        found["torch sdpa"] = _torch_sdpa
    for name, module in (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
        if installed(module):
            found[name] = functools.partial(_flash, module)
    return found


def _torch_sdpa(causal: bool, q: Any, k: Any, v: Any) -> Any:
    """Scaled dot product attention of torch, which takes (batch, heads, sequence, head size)."""
    torch = importlib.import_module("torch")
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    grouped = q.shape[2] != k.shape[2]
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _flash(module: str, causal: bool, q: Any, k: Any, v: Any) -> Any:
    out = importlib.import_module(module).flash_attn_func(q, k, v, causal=causal)
    return out[0] if isinstance(out, tuple) else out


class _TorchResult:
    """Lets jax wait for what torch has queued."""

    def __init__(self, value: Any):
        self.value = value

    def block_until_ready(self) -> _TorchResult:
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


def _torch_programs(function: Callable, causal: bool, *arrays: np.ndarray) -> tuple[Program, Program]:
    torch = importlib.import_module("torch")
    place = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, gradient = (torch.tensor(array, dtype=torch.bfloat16, device=place) for array in arrays)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> _TorchResult:
        with torch.no_grad():
            return _TorchResult(function(causal, *inputs))

    def both() -> _TorchResult:
        out = function(causal, *inputs)
        return _TorchResult((out, *torch.autograd.grad(out, inputs, gradient)))

    return Program(forward), Program(both)


def foreign() -> dict[str, Callable]:
    """What the checks compare beside our own: functions of causal, q, k, v and gradient."""

    def run(maker: Callable, *arrays: Any) -> list[Any]:
        result = maker(*arrays)[1].call()
        if isinstance(result, _TorchResult):
            return [x.detach().float().cpu().numpy() for x in result.block_until_ready().value]
        return jax.tree.leaves(result)

    def cudnn(causal: bool, *arrays: np.ndarray) -> tuple[Program, Program]:
        return _jax_programs(_cudnn(causal), {}, *arrays)

    others = {name: functools.partial(_torch_programs, function) for name, function in torch_functions().items()}
    return {name: functools.partial(run, maker) for name, maker in {"jax.nn cudnn": cudnn, **others}.items()}


# Grouped matmul


def grouped_rows(sizes: Sizes) -> list[Row]:
    """The product and the gradients of its rows and weights; group sizes as a nearly balanced router gives them."""
    rows = []
    for groups, inner, columns in sizes.experts:
        flops = 2.0 * sizes.rows * inner * columns
        for kind, makers in grouped_programs(*grouped_arrays(sizes.rows, groups, inner, columns)).items():
            case = f"grouped matmul {kind}, {sizes.rows} rows, {groups} x {inner} x {columns}"
            found = compare(case, makers, flops, sizes)
            aim = AIMS["grouped matmul"]
            rows += [aimed(row, aim) if row.ms and sizes is not TINY else row for row in found]
    return rows


def grouped_arrays(rows: int, groups: int, inner: int, columns: int) -> tuple[jax.Array, ...]:
    """Rows, weights, gradient of the result, and sizes of groups."""
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(rows, rng.dirichlet(np.full(groups, 25.0)))
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, inner), (groups, inner, columns), (rows, columns))
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    return *arrays, jnp.asarray(sizes, jnp.int32)


def grouped_programs(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> dict[str, dict[str, Callable]]:
    """What compiles each implementation, by product."""
    product, weights = pallas_kernels.grouped_matmul, pallas_kernels.grouped_matmul_transposed
    makers: dict[str, dict[str, Callable]] = {"y": {}, "dx": {}, "dw": {}}
    for name, backend in ((OURS, "pallas"), ("xla", "xla")):
        dx = functools.partial(product, backend=backend, transpose_w=True)
        makers["y"][name] = functools.partial(program, functools.partial(product, backend=backend), x, w, sizes)
        makers["dx"][name] = functools.partial(program, dx, dy, w, sizes)
        makers["dw"][name] = functools.partial(program, functools.partial(weights, backend=backend), x, dy, sizes)
    makers["y"]["lax.ragged_dot"] = functools.partial(program, jax.lax.ragged_dot, x, w, sizes)
    return makers


# Routing


def routing_rows(sizes: Sizes) -> list[Row]:
    """Choice of experts and order by expert; there are no products to count."""
    rows = []
    for tokens, experts, top_k in sizes.routed:
        arrays = checks.routing_arrays(tokens, experts)
        makers = {
            name: functools.partial(program, functools.partial(checks.routed, backend, top_k), *arrays)
            for name, backend in ((OURS, "pallas"), ("xla", "xla"))
        }
        rows += compare(f"routing, {tokens} tokens, {top_k} of {experts} experts", makers, None, sizes)
    return rows


# Cross-entropy


def loss_rows(sizes: Sizes) -> list[Row]:
    """Loss and gradients, ours and with materialised logits, and the products alone."""
    rows = []
    for tokens, width, vocabulary in sizes.losses:
        arrays = checks.loss_arrays(tokens, width, vocabulary)
        functions = {
            OURS: jax.value_and_grad(functools.partial(_ours, "auto"), (0, 1)),
            "xla": jax.value_and_grad(functools.partial(_ours, "xla"), (0, 1)),
            "materialised": jax.value_and_grad(_materialised, (0, 1)),
            "products alone": _products,
        }
        makers = {name: functools.partial(program, function, *arrays) for name, function in functions.items()}
        case = f"cross-entropy, {tokens} x {width} x {vocabulary}"
        found = compare(case, makers, 6.0 * tokens * width * vocabulary, sizes)
        rows += found if sizes is TINY else beside_materialised(found)
    return rows


def beside_materialised(rows: list[Row]) -> list[Row]:
    """Rows of one case of cross-entropy, ours with what it should reach."""
    by_name = {row.implementation: row for row in rows if row.ms}
    if {OURS, "materialised"} <= set(by_name):
        ours, whole = by_name[OURS], by_name["materialised"]
        ours.aim = f"{SLOWER} x time, {SMALLER} x memory of materialised"
        ours.met = ours.ms <= SLOWER * whole.ms and ours.temporary_mib <= SMALLER * whole.temporary_mib
    return rows


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


# Times and tables


def program(function: Callable, *arrays: Any) -> Program:
    """The function, compiled for its arguments, arrays or trees of them."""
    executable = jax.jit(function).lower(*arrays).compile()
    return Program(functools.partial(executable, *arrays), executable.memory_analysis().temp_size_in_bytes / 2**20)


def compiled(case: str, makers: dict[str, Callable]) -> tuple[dict[str, Any], list[Row]]:
    """What was made, and has run once, by name; and rows that say what failed."""
    good, failed = {}, []
    for name, make in makers.items():
        try:
            made = make()
            jax.block_until_ready([each.call() for each in (made if isinstance(made, tuple) else (made,))])
            good[name] = made
        except Exception as error:  # whatever a compiler, a library or the memory has against a case
            failed.append(Row(case, name, problem=checks.first_line(error)))
    return good, failed


def compare(case: str, makers: dict[str, Callable], flops: float | None, sizes: Sizes) -> list[Row]:
    """Rows of programs that take turns; those that fail get a row that says why."""
    good, failed = compiled(case, makers)
    times = medians([each.call for each in good.values()], sizes)
    rows = [timed(case, name, seconds, flops, good[name]) for name, seconds in zip(good, times, strict=True)]
    return show(rows + failed)


def medians(calls: Sequence[Callable], sizes: Sizes) -> list[float]:
    """Seconds of each call, which take turns."""
    return [statistics.median(rounds) for rounds in in_turns(calls, sizes.rounds, sizes.seconds)]


def timed(case: str, name: str, seconds: float, flops: float | None, made: Program) -> Row:
    """A row with its time, and rate where there are `flops`."""
    if seconds <= 0:  # a difference of two times within their noise
        return Row(case, name, problem="too short to measure")
    rate = None if flops is None else flops / seconds / 1e12
    return Row(case, name, seconds * 1e3, rate, made.temporary_mib)


def aimed(row: Row, tflops: float) -> Row:
    """The row, if it is ours with what it should reach."""
    if row.implementation != OURS or row.ms is None:
        return row
    return dataclasses.replace(row, aim=f"{tflops} TFLOP/s", met=row.tflops >= tflops)


def show(rows: list[Row]) -> list[Row]:
    """Prints rows as they come."""
    for row in rows:
        rate = "" if row.tflops is None else f"{row.tflops:8.1f} TFLOP/s"
        what = row.problem or f"{row.ms:9.3f} ms {rate}"
        print(f"{row.case:64} {row.implementation:14} {what}", flush=True)
    return rows


def describe(arguments: Sequence[str] | None, checked: list[checks.Check], rows: list[Row]) -> dict[str, Any]:
    """All that is written down."""
    device = jax.devices()[0]
    return {
        "command": " ".join(["python benchmarks/kernels_gpu.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": str(datetime.date.today()),
        "device": device.device_kind,
        "driver": device.client.platform_version.replace("\n", " "),
        "host": f"{platform.platform()}, {os.cpu_count()} processors",
        "versions": versions(),
        "checks": [dataclasses.asdict(check) for check in checked],
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def markdown(record: dict[str, Any]) -> str:
    """The results as a page."""
    used = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    wrong = [check for check in record["checks"] if check["right"] is False]
    counted = collections.Counter(check["implementation"] for check in record["checks"] if check["right"])
    right = ", ".join(f"{name} {count}" for name, count in counted.items())
    lines = [
        "# Kernels on a GPU",
        "",
        f"{record['date']}, {record['device']} ({record['driver']}; {record['host']}); {used}; `{record['command']}`.",
        "",
        f"Cases that agree with float64 NumPy, outputs and gradients: {right or 'none'}.",
    ]
    lines += [f"Wrong: {check['implementation']}, {check['name']}, errors {check['errors']}." for check in wrong]
    lines += [
        "",
        "| case | implementation | ms | TFLOP/s | temporary MiB | aim, or why not |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if row["problem"]:
            lines.append(f"| {row['case']} | {row['implementation']} | | | | {row['problem'].replace('|', '/')} |")
            continue
        memory = "" if row["temporary_mib"] is None else f"{row['temporary_mib']:.0f}"
        aim = f"{row['aim']}: {'reached' if row['met'] else 'missed'}" if row["aim"] else ""
        rate = "" if row["tflops"] is None else f"{row['tflops']:.1f}"
        numbers = f"{row['ms']:.3f} | {rate} | {memory} | {aim}"
        lines.append(f"| {row['case']} | {row['implementation']} | {numbers} |")
    return "\n".join(lines) + "\n"


def write_tables(rows: list[Row], folder: pathlib.Path) -> None:
    """Records the backends of attention for each kind of mask, and those of routing, by their time over all cases."""
    attention = [row for row in rows if row.case.startswith((FORWARD, BACKWARD))]
    _write_orders(attention, kind_of, (CUDNN, "cudnn"), folder / "attention_backend.json")
    routing = [row for row in rows if row.case.startswith("routing")]
    _write_orders(routing, experts_of, ("xla", "xla"), folder / "routing_backend.json")


def _write_orders(rows: list[Row], key: Callable, other: tuple[str, str], file: pathlib.Path) -> None:
    """The order of our kernels and of another implementation (its name here, its backend), for each key."""
    times: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for case in {row.case for row in rows}:
        of_case = {row.implementation: row.ms for row in rows if row.case == case and row.ms}
        if {OURS, other[0]} <= set(of_case):
            for name, backend in ((OURS, "pallas"), other):
                times[key(case)][backend] += of_case[name]
    if not times:
        return
    table = json.loads(file.read_text()) if file.exists() else {}
    for kind, by_backend in times.items():
        table.setdefault(target.current().family, {})[kind] = {
            "config": {"order": sorted(by_backend, key=by_backend.get)},
            "cost": min(by_backend.values()) * 1e3,
            "unit": "us",
            "source": "measured",
            "versions": versions(),
        }
    file.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def kind_of(case: str) -> str:
    """The key of the table, from the name of a case of attention."""
    size = case.split("heads of ")[1].split(",")[0]
    mask = "causal" if "causal" in case else "full"
    return f"head{size}/{mask}{'/packed' if 'documents' in case else ''}"


def experts_of(case: str) -> str:
    """The key of the table, from the name of a case of routing."""
    return f"experts{case.split(' of ')[1].split()[0]}"


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


if __name__ == "__main__":
    sys.exit(main())
