"""What `pallas_kernels.tune` needs to choose the sizes of the TPU kernels, and how often their branches run."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import target
from pallas_kernels.kernels.attention import block_lists, tpu, tpu_heads
from pallas_kernels.kernels.attention.spec import AttentionSpec

OPERATION = tpu.TABLE
TARGETS = {"v5e": target.TPU_V5E, "v5p": target.TPU_V5P, "v6e": target.TPU_V6E, "tpu7x": target.TPU_7X}
FAMILIES = tuple(TARGETS)
MATMUL_CYCLES = 4  # a core's matrix units finish one of the instructions that are counted every 4 cycles, at best


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call worth tuning for.

    Attributes:
      backward: the backward kernel.
      batch, length: of the sequences; queries are keys.
      heads, kv_heads, size: query heads, key heads, head size.
      causal: with a causal mask.
      documents: of equal length in a row; 1: no segment ids.
      dtype: of the arrays.
    """

    backward: bool
    batch: int = 1
    length: int = 4096
    heads: int = 16
    kv_heads: int = 2
    size: int = 128
    causal: bool = True
    documents: int = 1
    dtype: str = "bfloat16"

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.causal, None, None, self.size**-0.5)

    @property
    def kind(self) -> type[tpu.Config]:
        return tpu.BackwardConfig if self.backward else tpu.ForwardConfig


def shapes() -> dict[str, Shape]:
    """Shapes worth tuning for, by name."""
    found = {}
    for backward in (False, True):
        name = "bwd" if backward else "fwd"
        found[name] = Shape(backward)
        found[f"{name}-packed"] = Shape(backward, documents=8)
        found[f"{name}-full"] = Shape(backward, causal=False)
        found[f"{name}-16k"] = Shape(backward, length=16384)
        found[f"{name}-head64"] = Shape(backward, size=64)
        found[f"{name}-head256"] = Shape(backward, size=256)
    return found


def shape_class(shape: Shape) -> str:
    """The key of the table that `shape` fills."""
    packed = shape.documents > 1
    return tpu.shape_class(shape.kind, shape.size, shape.length, shape.spec, packed, jnp.dtype(shape.dtype))


def candidates(family: str, shape: Shape) -> list[tpu.Config]:
    """Configs that may be best: larger tiles spill more and leave out less above the diagonal.

    Blocks smaller than 1024 pay where documents are short; 16 heads to a step would leave a core of v5p idle, and
    gain nothing elsewhere.
    """
    q, k, *_ = _structs(shape)
    blocks = (512, 1024) if shape.documents > 1 else (1024,)
    tiles = [(128, 128), (128, 256), (256, 128), (256, 256)]
    found = []
    for block, (tile_q, tile_kv) in itertools.product(blocks, tiles):
        config = shape.kind(block, block, tile_q, tile_kv, heads=8, unroll=2)
        with target.compiling_for(TARGETS[family]):
            fits = tpu.fitted(config, q, k)
        if fits not in found:
            found.append(fits)
    return found


def build(family: str, shape: Shape, config: tpu.Config) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The call, and the shapes of its arguments."""
    q, k, *statistics = _structs(shape)
    masks = [jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32)] * (shape.documents > 1)
    direction = tpu.backward if shape.backward else tpu.forward
    arrays = [q, k, k, *([*statistics, q] if shape.backward else [])]

    def call(*given):
        ids = given[len(arrays)] if masks else None
        return direction(*given[: len(arrays)], spec=shape.spec, q_segments=ids, kv_segments=ids, config=config)

    return call, arrays + masks


def arguments(family: str, shape: Shape, config: tpu.Config) -> list[jax.Array]:
    """Arrays to time the call with."""
    _, structs = build(family, shape, config)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype) for x in structs if x.dtype != jnp.int32]
    return [*arrays, *(jnp.asarray(ids) for ids in _ids(shape))]


def cycles(compiled: Any, shape: Shape, config: tpu.Config) -> float:
    """Cycles on one core of the compiled `build(...)`, from how often each branch of the kernel runs.

    Args:
      compiled: what `pallas_kernels.compiler.aot.compile_for` gives.
      shape, config: as in `build`.

    Raises:
      LookupError: the schedule does not show the branches that the kernel is made of.
    """
    kernel = compiled.kernel("attention_")
    units = tpu_heads.units(shape.heads, shape.kv_heads, shape.size, jnp.dtype(shape.dtype), config.heads)
    blocks, kinds = _blocks(shape, config)
    rounds = -(-units.count // kernel.cores)  # units that one core works on
    steps = rounds * len(kinds)
    computed = [kind for kind in (block_lists.FULL, block_lists.DIAGONAL, block_lists.PARTIAL) if kind in blocks.kinds]
    first = int((np.asarray(blocks.flags)[: len(kinds)] & block_lists.FIRST != 0).sum())
    loads = sum(kind in computed for kind in kinds)
    body = kernel.body or kernel.grid
    parts = [region for region in kernel.branches(body, share=0) if region.cycles >= 100]
    products = [index for index, part in enumerate(parts) if part.matmuls]
    if len(products) != len(computed):
        raise LookupError(f"{kernel.name}: {len(products)} branches have products, not {len(computed)}")
    before, after = parts[: products[0]], parts[products[-1] + 1 :]
    # Before the products: clear, start, load; one that the schedule does not show is counted in each step.
    often = list(zip(reversed(before), (loads, first, shape.batch), strict=False))
    often += [(parts[index], kinds.count(kind)) for index, kind in zip(products, computed, strict=True)]
    often += list(zip(after, (first, kinds.count(block_lists.FLUSH)), strict=False))

    runs = {kernel.grid.ordinal: steps + 2.0, body.ordinal: float(steps)}
    waiting = 0.0
    for part, count in often:
        runs[part.ordinal] = float(rounds * count)
        alternatives = [] if part.matmuls else kernel.branches(part, share=0.2)
        runs |= {one.ordinal: rounds * count / len(alternatives) for one in alternatives}
        for loop in kernel.loops(part):
            trips = loop.trips or 1
            waiting += rounds * count * trips * max(0, MATMUL_CYCLES * loop.matmuls - loop.cycles)
    return kernel.model(runs) + waiting


def _structs(shape: Shape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k and the two statistics of the rows of scores."""
    rows = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.length), jnp.float32)
    q = jax.ShapeDtypeStruct((shape.batch, shape.length, shape.heads, shape.size), shape.dtype)
    return q, jax.ShapeDtypeStruct((*q.shape[:2], shape.kv_heads, shape.size), shape.dtype), rows, rows


def _ids(shape: Shape) -> list[np.ndarray]:
    if shape.documents == 1:
        return []
    return [np.tile(np.arange(shape.length) * shape.documents // shape.length, (shape.batch, 1)).astype(np.int32)]


def _blocks(shape: Shape, config: tpu.Config) -> tuple[block_lists.BlockList, list[int]]:
    """The list of blocks and the kinds of its entries."""
    ids = (_ids(shape) or [None])[0]
    first, last = block_lists.intervals(shape.spec, shape.batch, shape.length, shape.length, ids, None, False)
    blocks = block_lists.block_list(
        shape.spec, first, last, shape.length, config.block_q, config.block_kv, flush=shape.backward
    )
    kinds = np.asarray(blocks.flags)[: int(blocks.count)] & (2**block_lists.KIND_BITS - 1)
    return blocks, kinds.tolist()
