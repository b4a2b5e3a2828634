"""Attention on Hopper: what is taken, sizes of tiles, and the two kernels on local arrays.

Mosaic GPU is imported with the kernels, when one is first called: it needs absl-py.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import tables, target
from pallas_kernels.kernels.attention import hopper_ranges
from pallas_kernels.kernels.attention.spec import AttentionSpec

TABLE = "attention_hopper"
HEAD_SIZES = (64, 128)
TILE = 128  # rows of queries that a forward block owns, and of keys that a backward block owns
MOST_SHARED = 227 * 1024  # bytes of shared memory that one block can have


@dataclasses.dataclass(frozen=True)
class HopperAttentionForwardConfig:
    """Sizes of the forward kernel.

    Attributes:
      block_kv: keys in one tile, a multiple of 64.
      stages: tiles of keys and of values that are loaded ahead.
    """

    block_kv: int = 128
    stages: int = 2

    def shared_bytes(self, head_dim: int) -> int:
        return 2 * head_dim * (TILE + 2 * self.stages * self.block_kv)


@dataclasses.dataclass(frozen=True)
class HopperAttentionBackwardConfig:
    """Sizes of the backward kernel.

    Attributes:
      stages: tiles of queries and of output gradients that are loaded ahead.
      splits: blocks among which the query heads of a key head are divided; they add up dk and dv in float32.
    """

    stages: int = 2
    splits: int = 1

    def shared_bytes(self, head_dim: int) -> int:
        block_q = 64 * TILE // head_dim
        return 2 * head_dim * 2 * (TILE + self.stages * block_q) + 2 * 2 * TILE * block_q + 4 * 2 * 64 * 64


# Of one name in the modules of both devices.
ForwardConfig, BackwardConfig = HopperAttentionForwardConfig, HopperAttentionBackwardConfig
Config = ForwardConfig | BackwardConfig


def supported(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype, spec: AttentionSpec, on: target.Target
) -> str | None:
    """Why the kernels do not take a case; None if they do."""
    del spec  # all of them
    missing = on.lacks_kernels("gpu")
    if missing is not None:
        return missing
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype)} inputs; the kernels take bfloat16 and float16"
    if q_shape[3] not in HEAD_SIZES:
        return f"head size {q_shape[3]}; the kernels take {', '.join(map(str, HEAD_SIZES))}"
    if not math.prod(q_shape) or not math.prod(k_shape):
        return "an array without elements"
    return None


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    spec: AttentionSpec,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    config: ForwardConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of local arrays (FlashAttention-3, arXiv 2407.08608).

    Args:
      q: [B, T, H, K] bfloat16 or float16.
      k, v: [B, S, G, K] of the same dtype, G dividing H.
      spec: which keys are visible.
      q_segments, kv_segments: [B, T], [B, S] int32; equal ids follow each other. A negative id is padding. Those
        of queries alone are the keys', too.
      q_positions, kv_positions: [B, T], [B, S] int32; tiles are skipped where positions rise along a document.
      config: sizes; by default those of the table, else of a rule.

    Returns:
      out: [B, T, H, K] of q's dtype, 0 for queries that see nothing.
      lse: [B, H, T] float32, -inf for those.
    """
    config = config or _config("fwd", ForwardConfig, q.shape, k.shape, spec, q_segments is not None)
    masks = (q_segments, kv_segments, q_positions, kv_positions)
    return _forward(q, k, v, masks, spec=spec, config=config)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    *,
    spec: AttentionSpec,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    config: BackwardConfig | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dq, dk, dv) of local arrays. dq is a sum in no fixed order, so that its last bits vary.

    Args:
      q, k, v, spec, q_segments, kv_segments, q_positions, kv_positions: as in `forward`.
      lse: [B, H, T] float32, finite also for queries that see nothing.
      delta: [B, H, T] float32, the sum over out * dout less the gradient of lse.
      dout: [B, T, H, K], the gradient of out.
      config: sizes; by default those of the table, else of a rule.
    """
    config = config or _config("bwd", BackwardConfig, q.shape, k.shape, spec, q_segments is not None)
    masks = (q_segments, kv_segments, q_positions, kv_positions)
    return _backward(q, k, v, lse, delta, dout.astype(q.dtype), masks, spec=spec, config=config)


def shape_class(
    direction: str, q_shape: tuple[int, ...], k_shape: tuple[int, ...], spec: AttentionSpec, packed: bool
) -> str:
    """The key of the table: "fwd/head128/causal/group8/4096"; the group is query heads to a key head.

    Backward it ends with the rows of keys in the batch, "/rows8": how many blocks there are decides on `splits`.
    """
    mask = "window" if spec.window is not None else "causal" if spec.causal else "full"
    length = 1 << (k_shape[1] - 1).bit_length()
    group = q_shape[2] // k_shape[2]
    rows = f"/rows{1 << (k_shape[0] * k_shape[2] - 1).bit_length()}" if direction == "bwd" else ""
    return f"{direction}/head{q_shape[3]}/{mask}{'-packed' if packed else ''}/group{group}/{length}{rows}"


def rule(direction: str, q_shape: tuple[int, ...], k_shape: tuple[int, ...], cores: int) -> Config:
    """Sizes where the table has none."""
    if direction == "fwd":
        return ForwardConfig(block_kv=128 if k_shape[1] > 64 else 64, stages=2)
    blocks = k_shape[0] * k_shape[2] * -(-k_shape[1] // TILE)
    group = q_shape[2] // k_shape[2]
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    # About four blocks for each multiprocessor even out the lengths of causal and packed rows.
    splits = next((n for n in divisors if blocks * n >= 4 * cores), group)
    return BackwardConfig(stages=2, splits=splits)


def _config(direction: str, kind: type, q_shape, k_shape, spec: AttentionSpec, packed: bool):
    on = target.current()
    recorded = tables.lookup(TABLE, on.family, shape_class(direction, q_shape, k_shape, spec, packed))
    return kind(**recorded) if recorded else rule(direction, q_shape, k_shape, on.cores)


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def _forward(q, k, v, masks, *, spec: AttentionSpec, config: ForwardConfig):
    from pallas_kernels.kernels.attention import hopper_forward

    limits = hopper_ranges.bounds(spec, q.shape[1], k.shape[1], *masks)
    return hopper_forward.forward(q, k, v, limits, spec=spec, block_kv=config.block_kv, stages=config.stages)


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def _backward(q, k, v, lse, delta, dout, masks, *, spec: AttentionSpec, config: BackwardConfig):
    from pallas_kernels.kernels.attention import hopper_backward

    limits = hopper_ranges.bounds(spec, q.shape[1], k.shape[1], *masks)
    sizes = {"stages": config.stages, "splits": config.splits}
    return hopper_backward.backward(q, k, v, lse, delta, dout, limits, spec=spec, **sizes)
