"""The TPU kernels that ship with jax, with a count of how often each branch of theirs runs: splash attention, megablox.

What a kernel of theirs does is in `jax.experimental.pallas.ops.tpu`; the counts below follow its grids and conditions.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from pallas_kernels.compiler import aot, static_cycles

# The package's name is taken by its function.
megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


@dataclasses.dataclass(frozen=True)
class Attention:
    """An attention call on one device.

    Attributes:
      sequence: tokens of the only row.
      documents: equal ones that share the row.
      window: keys that a query sees, itself included; None for all before it.
    """

    sequence: int = 4096
    heads: int = 16
    kv_heads: int = 2
    head_size: int = 128
    documents: int = 1
    window: int | None = None

    @property
    def pairs(self) -> float:
        """Visible pairs of a query and a key; without documents or window half of all."""
        if self.window:
            return self.sequence * self.window - self.window**2 / 2
        return self.sequence**2 / self.documents / 2

    @property
    def forward_flops(self) -> float:
        """Of the two products of the forward pass; the backward pass has five."""
        return 4 * self.heads * self.head_size * self.pairs


@dataclasses.dataclass(frozen=True)
class Product:
    """A grouped matmul of rows by (groups, inner, columns).

    Attributes:
      sizes: rows of each group.
    """

    sizes: tuple[int, ...]
    inner: int
    columns: int

    @property
    def groups(self) -> int:
        return len(self.sizes)

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @property
    def flops(self) -> float:
        """Of the product, or of either of its gradients."""
        return 2 * self.rows * self.inner * self.columns


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a case.

    Attributes:
      label: block sizes.
      function: what is compiled.
      structs: its arguments.
      runs: from a Pallas kernel of the program to how often its regions run (see `KernelReport.model`), for the
        kernels that count towards the case.
      moved: bytes that its blocks take between memory and the chip, where that is known to be more than once each.
    """

    label: str
    function: Callable
    structs: Sequence[jax.ShapeDtypeStruct]
    runs: Callable[[static_cycles.KernelReport], dict[int, float] | None]
    moved: float = 0.0


# Query block, key block, key block of a step inside: the best of a wider search on v5p and v6e.
SPLASH_FORWARD = ((1024, 1024, 256), (1024, 1024, 512))
# And whether dQ comes from the kernel that makes dK and dV.
SPLASH_BACKWARD = ((1024, 1024, 256, True), (1024, 1024, 512, True), (1024, 1024, 1024, False))
MEGABLOX = ((512, 1024, 384), (512, 1024, 768), (512, 2048, 384), (512, 512, 1024), (512, 1536, 512))


def splash_forward(shape: Attention) -> list[Candidate]:
    """The forward pass for training, with the log-sum-exp, from and to (heads, sequence, head size)."""
    candidates = []
    for q_block, kv_block, compute in SPLASH_FORWARD:
        kernel = _splash(shape, q_block, kv_block, compute, fused=True)
        # What it keeps for the gradients is part of the result.
        function = functools.partial(_first_and_residuals, kernel)
        runs = functools.partial(_splash_runs, shape, q_block, kv_block, "fwd")
        candidates.append(Candidate(f"{q_block}/{kv_block}/{compute}", function, _qkv(shape), runs))
    return candidates


def splash_backward(shape: Attention) -> list[Candidate]:
    """Forward and backward pass in one program, of which the backward kernels count."""
    candidates = []
    for q_block, kv_block, compute, fused in SPLASH_BACKWARD:
        kernel = _splash(shape, q_block, kv_block, compute, fused)
        function = functools.partial(_with_gradients, kernel)
        structs = [*_qkv(shape), _qkv(shape)[0]]
        runs = functools.partial(_splash_runs, shape, q_block, kv_block, "d")
        label = f"{q_block}/{kv_block}/{compute} {'fused' if fused else 'in two'}"
        candidates.append(Candidate(label, function, structs, runs))
    return candidates


def megablox_products(shape: Product, kind: str) -> list[Candidate]:
    """The grouped matmul ("y"), and the gradients of its rows ("dx") and its weights ("dw")."""
    x = jax.ShapeDtypeStruct((shape.rows, shape.inner), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((shape.groups, shape.inner, shape.columns), jnp.bfloat16)
    dy = jax.ShapeDtypeStruct((shape.rows, shape.columns), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((shape.groups,), jnp.int32)
    candidates = []
    for tiling in MEGABLOX:
        if kind == "dw":
            function, structs = functools.partial(_tgmm, tiling), (x, dy, sizes)
        else:
            function = functools.partial(_gmm, tiling, transposed=kind == "dx")
            structs = (dy if kind == "dx" else x, w, sizes)
        runs = functools.partial(_megablox_runs, shape, kind, tiling)
        moved = _megablox_bytes(shape, kind, tiling)
        candidates.append(Candidate("/".join(map(str, tiling)), function, structs, runs, moved))
    return candidates


def _splash(shape: Attention, q_block: int, kv_block: int, compute: int, fused: bool) -> Callable:
    """The kernel as a function of queries, which are scaled already, keys and values."""
    size = (shape.sequence, shape.sequence)
    if shape.window:
        mask = splash_attention_mask.LocalMask(size, (shape.window - 1, 0), 0)
    else:
        mask = splash_attention_mask.CausalMask(size)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * shape.heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=q_block,
            block_kv=kv_block,
            block_kv_compute=compute,
            block_q_dkv=q_block,
            block_kv_dkv=kv_block,
            block_kv_dkv_compute=compute,
            block_q_dq=None if fused else q_block,
            block_kv_dq=None if fused else kv_block,
            use_fused_bwd_kernel=fused,
        ),
    )
    segments = None
    if shape.documents > 1:
        ids = jnp.asarray(np.arange(shape.sequence) // (shape.sequence // shape.documents), jnp.int32)
        segments = splash_attention_kernel.SegmentIds(ids, ids)

    return functools.partial(kernel, segment_ids=segments)


def _qkv(shape: Attention) -> list[jax.ShapeDtypeStruct]:
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [jax.ShapeDtypeStruct((n, shape.sequence, shape.head_size), jnp.bfloat16) for n in heads]


def _first_and_residuals(kernel: Callable, *arguments: jax.Array) -> Any:
    out, vjp = jax.vjp(kernel, *arguments)
    return out, jax.tree.leaves(vjp)


def _with_gradients(kernel: Callable, q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> Any:
    out, vjp = jax.vjp(kernel, q, k, v)
    return out, vjp(gradient)


def _visible_blocks(shape: Attention, q_block: int, kv_block: int) -> int:
    """Blocks of scores that the mask of one head leaves something of; documents are masked, not skipped."""
    first = np.arange(0, shape.sequence, q_block)[:, None]
    key = np.arange(0, shape.sequence, kv_block)
    visible = key <= first + q_block - 1
    if shape.window:
        visible &= key + kv_block - 1 > first - shape.window
    return int(visible.sum())


def _splash_runs(
    shape: Attention, q_block: int, kv_block: int, kind: str, kernel: static_cycles.KernelReport
) -> dict[int, float] | None:
    if not kernel.name.startswith(f"splash_mha_{kind}"):
        return None
    if kernel.name.startswith("splash_mha_dkv"):
        rows = shape.sequence // kv_block * shape.kv_heads
    else:
        rows = shape.sequence // q_block * shape.heads
    blocks = shape.heads * _visible_blocks(shape, q_block, kv_block)
    return _first_work_last(kernel, rows / kernel.cores, blocks / kernel.cores)


def _first_work_last(kernel: static_cycles.KernelReport, rows: float, blocks: float) -> dict[int, float]:
    """Runs of a body that zeroes its sums, multiplies where there is something to, and writes its sums."""
    branches = kernel.branches(kernel.body or kernel.grid, share=0.005)
    work = next(branch for branch in branches if branch.matmuls)
    return {branch.ordinal: blocks if branch == work else rows for branch in branches}


def _gmm(tiling: tuple[int, int, int], x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool) -> jax.Array:
    return megablox.gmm(x, w, sizes, jnp.bfloat16, tiling, transpose_rhs=transposed)


def _tgmm(tiling: tuple[int, int, int], x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    return megablox.tgmm(x.T, dy, sizes, jnp.bfloat16, tiling)


def _visits(shape: Product, tile: int) -> int:
    """Pairs of a tile of rows and a group that has rows in it."""
    ends = np.cumsum(shape.sizes)
    starts = ends - np.asarray(shape.sizes)
    return int(np.where(ends > starts, -(-ends // tile) - starts // tile, 0).sum())


def _megablox_tiles(shape: Product, kind: str, tiling: tuple[int, int, int]) -> tuple[int, int]:
    """Tiles along the inner axis, and along the columns of the result."""
    inner, columns = (shape.columns, shape.inner) if kind == "dx" else (shape.inner, shape.columns)
    return math.ceil(inner / tiling[1]), math.ceil(columns / tiling[2])


def _megablox_runs(
    shape: Product, kind: str, tiling: tuple[int, int, int], kernel: static_cycles.KernelReport
) -> dict[int, float]:
    visits = _visits(shape, tiling[0])
    inner_tiles, column_tiles = _megablox_tiles(shape, kind, tiling)
    outer = math.ceil(column_tiles / kernel.cores)
    grid = {kernel.grid.ordinal: outer * inner_tiles * visits}
    if kind == "dw":
        return grid | _first_work_last(kernel, outer * inner_tiles * shape.groups, outer * inner_tiles * visits)
    branches = kernel.branches(kernel.body or kernel.grid, share=0.005)
    work = sorted((branch for branch in branches if branch.matmuls), key=lambda branch: branch.cycles)
    # The first tile along the inner axis zeroes the sums; the last, the longer branch, also writes them.
    runs = {branch.ordinal: outer * visits for branch in branches}
    if len(work) == 2:
        runs[work[0].ordinal] = outer * visits * (inner_tiles - 1)
    return grid | runs


def _megablox_bytes(shape: Product, kind: str, tiling: tuple[int, int, int]) -> float:
    """Bytes of the blocks that its index maps ask for; a block that stays is not moved again."""
    inner_tiles, column_tiles = _megablox_tiles(shape, kind, tiling)
    weights, visits = shape.inner * shape.columns, _visits(shape, tiling[0])
    if kind == "dw":
        rows = column_tiles * shape.inner + inner_tiles * shape.columns
        return 2.0 * (visits * tiling[0] * rows + shape.groups * weights)
    inner, columns = (shape.columns, shape.inner) if kind == "dx" else (shape.inner, shape.columns)
    weight_loads = shape.groups if inner_tiles == 1 else visits
    return 2.0 * (column_tiles * visits * tiling[0] * inner + weight_loads * weights + shape.rows * columns)


def best(
    device: str, candidates: Sequence[Candidate], report: Callable[[Candidate, str], None] = lambda *_: None
) -> tuple[Candidate, aot.Compiled, float] | None:
    """The candidate of fewest cycles, its program and the cycles on one core; None if none compiles."""
    chip = static_cycles.CHIPS[device]
    found = []
    for candidate in candidates:
        try:
            compiled = aot.compile_for(device, candidate.function, *candidate.structs)
        except Exception as error:  # a block size that does not fit
            report(candidate, str(error).splitlines()[0])
            continue
        counted = [(kernel, candidate.runs(kernel)) for kernel in compiled.kernels if kernel.pallas]
        cycles = sum(kernel.model(runs) for kernel, runs in counted if runs is not None)
        found.append((max(cycles, candidate.moved / chip.bandwidth * chip.clock), len(found), candidate, compiled))
    if not found:
        return None
    cycles, _, candidate, compiled = min(found, key=lambda item: item[:2])
    return candidate, compiled, cycles
