"""Static cycles of the TPU kernels, ours beside those that ship with jax, compiled the same way in one run.

No TPU is needed, but the compiler: `pip install -e ".[aot]"`. Times are estimates: cycles of one core's schedule at
the clock in `static_cycles.CHIPS`, which fits published timings within 3 to 15 %, or the time to move the bytes where
that is known to be longer; waiting for memory within a kernel is not in them. Rows:

- `kernels`: the Pallas kernels of the operation.
- `around`: what XLA adds for it, as bytes over bandwidth: sums over partial gradients, and for the kernels of jax the
  transposes from and to (batch, sequence, heads, head size), which ours read and write as they are.

Splash masks packed documents and does not skip them. Of the block sizes of a kernel of jax the best is taken (see
`shipped_kernels`), of ours those in the table of the package.

  python benchmarks/kernels_static.py --output benchmarks/results/kernels_static
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

# Compiled programs are for devices that are not there; what the compiler says of each is kept for the next run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PALLAS_KERNELS_AOT_CACHE", str(pathlib.Path(__file__).parents[1] / ".cache" / "aot"))

import shipped_kernels as shipped

from pallas_kernels import tables, target
from pallas_kernels.compiler import aot, static_cycles
from pallas_kernels.kernels.attention import tpu as attention_tpu
from pallas_kernels.kernels.attention import tuning as attention
from pallas_kernels.kernels.attention.spec import AttentionSpec
from pallas_kernels.kernels.grouped_matmul import tuning as grouped_matmul

WINDOW = 1024
CASES = {
    "1 x 4096 causal": shipped.Attention(),
    "8 packed documents": shipped.Attention(documents=8),
    f"window {WINDOW}": shipped.Attention(window=WINDOW),
}
# Groups, model width, expert width; 131072 rows.
EXPERTS = ((128, 2048, 768), (128, 4096, 1536))
KINDS = {"y": "product", "dx": "product_t", "dw": "dw"}


@dataclasses.dataclass(frozen=True)
class Windowed(attention.Shape):
    """A call with a sliding window."""

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(True, (WINDOW - 1, 0), None, self.size**-0.5)


@dataclasses.dataclass
class Row:
    """One implementation of one case on one device.

    Attributes:
      kernels_ms: of the Pallas kernels.
      around_ms: of what XLA adds.
      tflops: per second, of the kernels; visible pairs of queries and keys count, so causal is half.
      mxu: busy share of the matrix units, where the counts of all branches are known.
    """

    device: str
    case: str
    implementation: str
    config: str
    cycles: float
    kernels_ms: float
    around_ms: float
    tflops: float
    spills: int
    mxu: float | None


def main() -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="v5p,v6e", help="of v5e, v5p, v6e, tpu7x (default: v5p,v6e)")
    parser.add_argument("--output", type=pathlib.Path, help="name of the files to write, without .json or .md")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    rows: list[Row] = []
    for device in options.devices.split(","):
        for case, measure in cases(device):
            if options.only in case:
                for row in measure():
                    rows.append(row)
                    print(f"{device:6} {case:32} {row.implementation:9} {row.kernels_ms:8.3f} ms", flush=True)
    command = " ".join(["python", *sys.argv])
    text = markdown(rows, command)
    print("\n" + text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"command": command, "versions": aot.versions(), "rows": [dataclasses.asdict(row) for row in rows]}
        options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(text)


def cases(device: str) -> Iterable[tuple[str, Callable[[], Iterable[Row]]]]:
    """Names of cases, and what measures ours and that of jax."""
    for name, shape in CASES.items():
        for backward in (False, True):
            case = f"attention {'backward' if backward else 'forward'}, {name}"
            yield (
                case,
                lambda case=case, shape=shape, backward=backward: both(
                    our_attention(device, case, shape, backward), splash(device, case, shape, backward)
                ),
            )
    for groups, width, inner in EXPERTS:
        for kind in KINDS:
            case = f"grouped matmul {kind}, {groups} x {width} x {inner}"
            yield (
                case,
                lambda case=case, kind=kind, sizes=(groups, width, inner): both(
                    our_product(device, case, kind, *sizes), megablox(device, case, kind, *sizes)
                ),
            )


def both(*rows: Row | None) -> list[Row]:
    """The rows that there are."""
    return [row for row in rows if row is not None]


def our_attention(device: str, case: str, shape: shipped.Attention, backward: bool) -> Row | None:
    """Our kernel with the recorded config, else the default one."""
    kind = Windowed if shape.window else attention.Shape
    ours = kind(backward, 1, shape.sequence, shape.heads, shape.kv_heads, shape.head_size, documents=shape.documents)
    recorded = tables.lookup(attention.OPERATION, device, attention.shape_class(ours))
    q, k, *_ = attention.build(device, ours, ours.kind())[1]
    with target.compiling_for(aot.DEVICES[device].target):
        config = attention_tpu.fitted(ours.kind(**recorded) if recorded else ours.kind(), q, k)
    return our_row(device, case, attention, ours, config, shape.forward_flops * (2.5 if backward else 1))


def our_product(device: str, case: str, kind: str, groups: int, width: int, inner: int) -> Row | None:
    """Our grouped matmul with the recorded config, else the best of the candidates."""
    depth, columns = (inner, width) if kind == "dx" else (width, inner)
    shape = grouped_matmul.Shape(KINDS[kind], groups, depth, columns)
    recorded = tables.lookup(grouped_matmul.OPERATION, device, grouped_matmul.shape_class(shape))
    candidates = grouped_matmul.candidates(device, shape)
    config = type(candidates[0])(**recorded) if recorded else candidates[0]
    return our_row(device, case, grouped_matmul, shape, config, 2.0 * shape.rows * depth * columns)


def our_row(device: str, case: str, module: Any, shape: Any, config: Any, flops: float) -> Row | None:
    """What the compiler says of a call of ours."""
    function, structs = module.build(device, shape, config)
    try:
        compiled = aot.compile_for(device, function, *structs)
        cycles = module.cycles(compiled, shape, config)
    except Exception as error:  # a case that a kernel does not take, or a schedule that cannot be read
        print(f"{device:6} {case:32} ours fails: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return None
    label = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())
    return row(device, case, "ours", label, compiled, cycles, flops, around(device, compiled), None)


def splash(device: str, case: str, shape: shipped.Attention, backward: bool) -> Row | None:
    """The best splash kernel."""
    candidates = (shipped.splash_backward if backward else shipped.splash_forward)(shape)
    found = shipped.best(device, candidates, complain(device, case, "splash"))
    if found is None:
        return None
    candidate, compiled, cycles = found
    # q, o and in the backward pass their gradients; k, v and theirs: each read and written once more.
    arrays = shape.sequence * shape.head_size * 2 * (2 * shape.heads + 2 * shape.kv_heads)
    added = 2 * arrays / static_cycles.CHIPS[device].bandwidth * 1e3
    if backward:
        forward = shipped.best(device, shipped.splash_forward(shape))
        added += around(device, compiled) - (around(device, forward[1]) if forward else 0.0)
    else:
        added += around(device, compiled)
    flops = shape.forward_flops * (2.5 if backward else 1)
    return row(device, case, "splash", candidate.label, compiled, cycles, flops, added, candidate)


def megablox(device: str, case: str, kind: str, groups: int, width: int, inner: int) -> Row | None:
    """The best megablox kernel, for groups of the same sizes as ours."""
    sizes = grouped_matmul.group_sizes(grouped_matmul.Shape("product", groups, width, inner))
    shape = shipped.Product(tuple(sizes.tolist()), width, inner)
    found = shipped.best(device, shipped.megablox_products(shape, kind), complain(device, case, "megablox"))
    if found is None:
        return None
    candidate, compiled, cycles = found
    return row(
        device, case, "megablox", candidate.label, compiled, cycles, shape.flops, around(device, compiled), candidate
    )


def row(
    device: str,
    case: str,
    implementation: str,
    config: str,
    compiled: aot.Compiled,
    cycles: float,
    flops: float,
    around_ms: float,
    candidate: shipped.Candidate | None,
) -> Row:
    """A row of the table."""
    kernels = [kernel for kernel in compiled.kernels if kernel.pallas]
    mxu = None
    if candidate:
        kernels = [kernel for kernel in kernels if candidate.runs(kernel) is not None]
        busy = sum(kernel.mxu(candidate.runs(kernel)) * kernel.model(candidate.runs(kernel)) for kernel in kernels)
        mxu = round(busy / cycles, 3)
    chip = static_cycles.CHIPS[device]
    seconds = cycles / chip.clock
    if flops > chip.flops * seconds:
        raise ValueError(f"{device}, {case}, {implementation}: faster than the chip; a branch is counted too rarely")
    return Row(
        device=device,
        case=case,
        implementation=implementation,
        config=config,
        cycles=round(cycles),
        kernels_ms=round(seconds * 1e3, 4),
        around_ms=round(around_ms, 4),
        tflops=round(flops / seconds / 1e12, 1),
        spills=sum(kernel.spills for kernel in kernels),
        mxu=mxu,
    )


def around(device: str, compiled: aot.Compiled) -> float:
    """Milliseconds that moving the operands and results of the program's other operations takes."""
    moved = sum(kernel.bytes for kernel in compiled.kernels if not kernel.pallas)
    return moved / static_cycles.CHIPS[device].bandwidth * 1e3


def complain(device: str, case: str, implementation: str) -> Callable[[shipped.Candidate, str], None]:
    """Prints the candidates that do not compile."""

    def report(candidate: shipped.Candidate, said: str) -> None:
        print(f"{device:6} {case:32} {implementation} {candidate.label}: {said}", flush=True)

    return report


def markdown(rows: list[Row], command: str) -> str:
    """The table, ours and theirs side by side."""
    versions = ", ".join(f"{name} {version}" for name, version in aot.versions().items() if name in ("jax", "libtpu"))
    lines = [
        "# Static cycles of the TPU kernels",
        "",
        f"{datetime.date.today()}, {versions}. Estimates from the compiler's schedules, no TPU involved: `{command}`;",
        "milliseconds are of the kernels + of what XLA adds around them, as the head of that file says; "
        "`jax / ours` is of the kernels, `with around` of both.",
        "",
        "| device | case | ours: ms | TFLOP/s | spills | kernel of jax: ms | TFLOP/s | spills | MXU busy | "
        "jax / ours | with around |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for one in rows:
        by_case.setdefault((one.device, one.case), {})["ours" if one.implementation == "ours" else "jax"] = one
    for (device, case), found in by_case.items():
        ours, theirs = found.get("ours"), found.get("jax")
        lines.append(
            "| " + " | ".join([device, case, *_cells(ours), *_cells(theirs, mxu=True), *_ratios(ours, theirs)]) + " |"
        )
    lines += ["", "Configs:", ""]
    lines += [f"- {one.device}, {one.case}, {one.implementation}: {one.config}" for one in rows]
    return "\n".join(lines) + "\n"


def _cells(found: Row | None, mxu: bool = False) -> list[str]:
    if found is None:
        return ["-"] * (4 if mxu else 3)
    cells = [f"{found.kernels_ms:.3f} + {found.around_ms:.3f}", f"{found.tflops:.0f}", str(found.spills)]
    return [*cells, f"{found.mxu:.0%}"] if mxu else cells


def _ratios(ours: Row | None, theirs: Row | None) -> list[str]:
    if ours is None or theirs is None:
        return ["-", "-"]
    whole = (theirs.kernels_ms + theirs.around_ms) / (ours.kernels_ms + ours.around_ms)
    return [f"{theirs.kernels_ms / ours.kernels_ms:.2f}", f"{whole:.2f}"]


if __name__ == "__main__":
    main()
