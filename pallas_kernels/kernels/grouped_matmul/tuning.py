"""What the tuner needs to know of the TPU kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiler import aot, static_cycles
from pallas_kernels.kernels.grouped_matmul import products, tpu, tpu_schedule

OPERATION = tpu.OPERATION
FAMILIES = tuple(tpu.VMEM)
STEP_CYCLES = 120  # of a step's bookkeeping, beside its product
MATMUL_CYCLES = 4  # a core's matrix units finish one of the instructions that are counted every 4 cycles, at best


@dataclasses.dataclass(frozen=True)
class Shape:
    """One grouped product, of bfloat16.

    Attributes:
      kind: "gated" (with the products kept), "product", "product_t" (weights [G, N, K]) or "dw".
      groups: G.
      depth: K.
      columns: N.
      rows: M.
    """

    kind: str
    groups: int
    depth: int
    columns: int
    rows: int = 131072


def shapes() -> dict[str, Shape]:
    """The products of expert MLPs: forward, gradients of the rows, gradients of the weights."""
    found = {}
    for groups, width, inner in ((64, 2048, 512), (64, 2048, 1024), (128, 2048, 768), (128, 4096, 1536)):
        for kind, depth, columns in (
            ("gated", width, inner),
            ("product", width, inner),
            ("product", inner, width),
            ("product_t", inner, width),
            ("product_t", width, inner),
            ("dw", width, inner),
            ("dw", inner, width),
        ):
            shape = Shape(kind, groups, depth, columns)
            found[shape_class(shape)] = shape
    return found


def shape_class(shape: Shape) -> str:
    """The key of the table."""
    return products.shape_class(shape.kind, shape.groups, shape.depth, shape.columns)


def candidates(family: str, shape: Shape) -> list[tpu.Config] | list[tpu.TransposedConfig]:
    """The widest blocks that fit into the memory of a core, with a share of the work for each core."""
    cores = static_cycles.CHIPS[family].cores
    if shape.kind == "dw":
        found = [
            tpu.TransposedConfig(rows, part, min(depth, shape.depth // cores), min(width, shape.columns))
            for width in (1024, 2048)
            for rows, part, depth in ((512, 256, 2048), (1024, 128, 2048), (1024, 256, 2048), (1024, 128, 1024))
        ]
        sizes = [config.vmem(shape.depth, shape.columns, jnp.bfloat16) for config in found]
    else:
        found = [
            tpu.Config(rows, 128, min(width, shape.columns // cores))
            for width in (512, 1024, 2048)
            for rows in (512, 1024)
        ]
        weights, outs = (2, 3) if shape.kind == "gated" else (1, 1)
        sizes = [config.vmem(shape.depth, shape.columns, jnp.bfloat16, weights, outs) for config in found]
    fitting = [config for config, size in zip(found, sizes, strict=True) if size <= tpu.VMEM[family]]
    widest = max(config.columns for config in fitting)
    return list(dict.fromkeys(config for config in fitting if config.columns == widest))


def build(family: str, shape: Shape, config: tpu.Config | tpu.TransposedConfig):
    """The function and its arguments."""
    del family
    rows = jax.ShapeDtypeStruct((shape.rows, shape.depth), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((shape.groups,), jnp.int32)
    options = {"out_dtype": jnp.bfloat16, "config": config}
    if shape.kind == "dw":
        columns = jax.ShapeDtypeStruct((shape.rows, shape.columns), jnp.bfloat16)
        return functools.partial(tpu.transposed_product, **options), [rows, columns, sizes]
    last = (shape.columns, shape.depth) if shape.kind == "product_t" else (shape.depth, shape.columns)
    weight = jax.ShapeDtypeStruct((shape.groups, *last), jnp.bfloat16)
    if shape.kind == "gated":
        return functools.partial(tpu.gated_product, keep=True, **options), [rows, weight, weight, sizes]
    function = functools.partial(tpu.product, transpose_w=shape.kind == "product_t", **options)
    return function, [rows, weight, sizes]


def arguments(family: str, shape: Shape, config: tpu.Config | tpu.TransposedConfig) -> list[jax.Array]:
    """Random numbers, and the sizes of groups that `cycles` assumes."""
    structs = build(family, shape, config)[1]
    keys = jax.random.split(jax.random.key(0), len(structs))
    arrays = [jax.random.normal(key, s.shape, s.dtype) for key, s in zip(keys[:-1], structs[:-1], strict=True)]
    return [*arrays, jnp.asarray(group_sizes(shape))]


def group_sizes(shape: Shape) -> np.ndarray:
    """Sizes as a nearly balanced router gives them: they vary by a fifth or so, and end anywhere in a block."""
    rng = np.random.default_rng(0)
    return rng.multinomial(shape.rows, rng.dirichlet(np.full(shape.groups, 25.0))).astype(np.int32)


def cycles(compiled, shape: Shape, config: tpu.Config | tpu.TransposedConfig) -> float:
    """Cycles on one core, or those that moving the blocks takes where they are more.

    Every step multiplies a whole block, or the parts of it in which its group has rows.
    """
    (kernel,) = (kernel for kernel in compiled.kernels if kernel.pallas)
    whole, parts, steps = work(shape, config.rows, config.part)
    of_block, of_part, of_group = branch_cycles(kernel)
    slices = -(-shape.columns // config.columns)
    heights, visits = (-(-shape.depth // config.depth), shape.groups) if shape.kind == "dw" else (1, 0)
    passes = slices * heights
    compute = passes * (whole * of_block + parts * of_part + visits * of_group + steps * STEP_CYCLES)
    chip = static_cycles.CHIPS[aot.DEVICES[compiled.device].target.family]
    divided = heights if shape.kind == "dw" else slices  # between the cores
    share = -(-divided // chip.cores) / divided
    moved = bytes_moved(shape, slices, heights)
    return max(compute * share, moved / chip.bandwidth * chip.clock)


def branch_cycles(kernel) -> tuple[float, float, float]:
    """Cycles of the product of a block, of that of a part, and of what is done once for a group.

    libtpu gives the bundles of these branches, and cycles only of a step that takes all of them. Waiting for the matrix
    units is not in the bundles, but in the time that their instructions take at least: by the larger of both the
    cycles of the step are divided between block and part.
    """
    part = min(
        (region for region in kernel.regions if region.loop and region.matmuls), key=lambda region: region.cycles
    )
    rest = kernel.regions[0].matmuls - part.matmuls
    branches = [region for region in kernel.regions if region.conditional and part.matmuls < region.matmuls <= rest]
    block = max(branches, key=lambda region: (region.matmuls, -region.cycles))
    of_group = sum(region.cycles for region in kernel.branches(kernel.body or kernel.grid) if not region.matmuls)
    of_block, of_part = (max(region.cycles, MATMUL_CYCLES * region.matmuls) for region in (block, part))
    scale = (kernel.regions[0].cycles - of_group - STEP_CYCLES) / (of_block + of_part)
    return of_block * scale, of_part * scale, of_group


def work(shape: Shape, rows: int, part: int) -> tuple[int, int, int]:
    """How many whole blocks, parts and steps one pass over the rows takes, for `group_sizes`."""
    sizes = jnp.asarray(group_sizes(shape))
    steps = tpu_schedule.steps(sizes, shape.rows, rows, visit_empty=shape.kind == "dw")
    start, end = map(np.asarray, steps[2:])
    start, end = np.maximum(start, 0), np.minimum(end, rows)
    whole = end - start == rows
    parts = np.where(whole | (end <= start), 0, -(-end // part) - start // part)
    return int(whole.sum()), int(parts.sum()), int((end > start).sum())


def bytes_moved(shape: Shape, slices: int, heights: int) -> float:
    """Between memory and the chip: rows for each slice of columns, weights and results once."""
    if shape.kind == "dw":
        return 2.0 * (
            shape.rows * (slices * shape.depth + heights * shape.columns) + shape.groups * shape.depth * shape.columns
        )
    weights, outs = (2, 3) if shape.kind == "gated" else (1, 1)
    results = outs * shape.rows * shape.columns
    return 2.0 * (slices * shape.rows * shape.depth + weights * shape.groups * shape.depth * shape.columns + results)
