"""What the tuner needs to know of the TPU kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import target
from pallas_kernels.compiler import aot, static_cycles
from pallas_kernels.kernels.cross_entropy import dispatch, tpu
from pallas_kernels.kernels.cross_entropy.config import TpuCrossEntropyConfig

OPERATION = "cross_entropy"
FAMILIES = tuple(target.VMEM)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Loss and gradients of bfloat16 tokens.

    Attributes:
      hidden: D.
      vocabulary: V.
      tokens: N, for which costs are given whatever the chunk is.
    """

    hidden: int
    vocabulary: int = 151936
    tokens: int = 4096


def shapes() -> dict[str, Shape]:
    """Models of about 3 and 8 billion parameters with the vocabulary of Qwen."""
    return {shape_class(shape): shape for shape in (Shape(2048), Shape(4096))}


def shape_class(shape: Shape) -> str:
    """The key of the table."""
    return dispatch.shape_class(shape.hidden)


def candidates(family: str, shape: Shape) -> list[TpuCrossEntropyConfig]:
    """Blocks of which two of each kind fit into VMEM."""
    found = [
        TpuCrossEntropyConfig(chunk, tokens, vocabulary, 512, columns)
        for chunk, columns in ((2048, 512), (2048, 256), (1024, 512))
        for tokens, vocabulary in ((1024, 512), (1024, 1024))
    ]
    with target.compiling_for(aot.DEVICES[family].target):
        fitting = [config for config in found if tpu.fit(config, shape.hidden, 2) == config]
    return list(dict.fromkeys(fitting))


def build(family: str, shape: Shape, config: TpuCrossEntropyConfig):
    """One chunk of tokens after another chunk: the gradient of the head is added to what is there."""
    cores = static_cycles.CHIPS[family].cores

    def chunk(x, w, labels, dw):
        picked, lse, logits = tpu.logits_and_sums(x, w, labels, soft_cap=None, keep=True, config=config)
        ones = jnp.ones_like(lse)
        grads = tpu.gradients(logits, x, w, labels, lse, -ones, 0 * ones, dw, soft_cap=None, cores=cores, config=config)
        return picked - lse, *grads

    return chunk, [
        jax.ShapeDtypeStruct((config.chunk, shape.hidden), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.vocabulary, shape.hidden), jnp.bfloat16),
        jax.ShapeDtypeStruct((config.chunk,), jnp.int32),
        jax.ShapeDtypeStruct((shape.vocabulary, shape.hidden), jnp.float32),
    ]


def arguments(family: str, shape: Shape, config: TpuCrossEntropyConfig) -> list[jax.Array]:
    """Random numbers, and labels that exist."""
    rng = np.random.default_rng(0)
    x, w, labels, dw = build(family, shape, config)[1]
    return [
        jnp.asarray(rng.normal(size=x.shape), x.dtype),
        jnp.asarray(rng.normal(size=w.shape) / np.sqrt(shape.hidden), w.dtype),
        jnp.asarray(rng.integers(0, shape.vocabulary, labels.shape), labels.dtype),
        jnp.zeros(dw.shape, dw.dtype),
    ]


def cycles(compiled, shape: Shape, config: TpuCrossEntropyConfig) -> float:
    """Cycles of one core for `shape.tokens`, of each kernel or of its bytes where these take longer."""
    return sum(max(parts) for parts in costs(compiled, shape, config).values()) * shape.tokens / config.chunk


def costs(compiled, shape: Shape, config: TpuCrossEntropyConfig) -> dict[str, tuple[float, float]]:
    """For each kernel the cycles of one chunk and those in which its bytes pass."""
    chip = static_cycles.CHIPS[aot.DEVICES[compiled.device].target.family]
    logits, head = 4 * config.chunk * shape.vocabulary, 2 * shape.vocabulary * shape.hidden
    rows = config.chunk // config.forward_tokens
    kernels = {  # how often its row of blocks of ids begins and ends, and what it moves
        "cross_entropy_logits": (rows, logits + rows * head),
        "cross_entropy_gradients": (1, logits + head + 2 * 2 * head),
    }
    return {
        name: (_cycles(compiled.kernel(name), passes), moved / chip.bandwidth * chip.clock)
        for name, (passes, moved) in kernels.items()
    }


def _cycles(kernel, passes: int) -> float:
    """Of one core, where a block of the last ids and what begins or ends a pass have branches of their own."""
    branches = kernel.branches(kernel.body or kernel.grid)
    passes = -(-passes // kernel.cores)
    runs = {branch.ordinal: passes for branch in branches if not branch.matmuls}
    products = [branch for branch in branches if branch.matmuls]
    if len(products) == 2:
        runs |= {products[0].ordinal: kernel.steps - passes, products[1].ordinal: passes}
    return kernel.model(runs)
