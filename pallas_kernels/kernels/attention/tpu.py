"""Attention on TPU: what is taken, sizes of blocks, and the two kernels on local arrays."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import tables, target
from pallas_kernels.kernels.attention import tpu_backward, tpu_forward, tpu_heads
from pallas_kernels.kernels.attention.spec import AttentionSpec, Masks
from pallas_kernels.kernels.attention.tpu_configs import TpuAttentionBackwardConfig as BackwardConfig
from pallas_kernels.kernels.attention.tpu_configs import TpuAttentionForwardConfig as ForwardConfig

__all__ = ["BackwardConfig", "ForwardConfig", "backward", "forward", "shape_class", "supported"]

Config = ForwardConfig | BackwardConfig

TABLE = "attention_tpu"
HEAD_SIZES = (64, 128, 256)
MOST_BLOCKS = 60_000  # of a list in scalar memory, three words each


def supported(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype, spec: AttentionSpec, on: target.Target
) -> str | None:
    """Why the kernels do not take a case; None if they do."""
    missing = on.lacks_kernels("tpu")
    if missing is not None:
        return missing
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{jnp.dtype(dtype)} inputs; the kernels take bfloat16, float16 and float32"
    if q_shape[3] not in HEAD_SIZES:
        return f"head size {q_shape[3]}; the kernels take {', '.join(map(str, HEAD_SIZES))}"
    if not math.prod(q_shape) or not math.prod(k_shape):
        return "an array without elements"
    blocks = q_shape[0] * math.ceil(q_shape[1] / 1024) * math.ceil(k_shape[1] / 1024)
    blocks = blocks // 2 if spec.causal else blocks
    if blocks > MOST_BLOCKS:
        return f"{blocks} blocks of scores; a list in scalar memory holds {MOST_BLOCKS}: divide batch or sequence"
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
    """Output and log-sum-exp of local arrays.

    float16 is computed in float32: the matrix unit has no float16, and bfloat16 would drop three bits.

    Args:
      q: [B, T, H, K] bfloat16, float16 or float32.
      k, v: [B, S, G, K] in the same dtype, G divides H.
      spec: which keys a query sees, and how scores are made.
      q_segments, kv_segments: [B, T], [B, S] int32, below 2**30; not decreasing along a row but for negative ids
        between documents, which are padding. Those of queries alone are the keys', too; None: one document.
      q_positions, kv_positions: [B, T], [B, S] int32; None: counted from 0, T = S if causality or a window asks.
      config: None takes the recorded sizes, else a guess.

    Returns:
      [B, T, H, K] in the dtype of `q`, [B, H, T] float32; 0 and -inf for queries that see nothing.
    """
    dtype = q.dtype
    q, k, v = (_computable(x) for x in (q, k, v))
    out, lse = tpu_forward.forward(
        q,
        k,
        v,
        Masks(q_segments, kv_segments, q_positions, kv_positions),
        spec=spec,
        config=_config(config, ForwardConfig, q, k, spec, q_segments is not None),
    )
    return out.astype(dtype), lse


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
    """Gradients of q, k and v for local arrays.

    Args:
      q, k, v, spec, segments, positions, config: as in `forward`.
      lse: [B, H, T] float32, of `forward`, 0 for queries that see nothing.
      delta: [B, H, T] float32, sum over K of out * dout, less the gradient of `lse`.
      dout: [B, T, H, K], gradient of the output.
    """
    dtype = q.dtype
    q, k, v, dout = (_computable(x) for x in (q, k, v, dout.astype(dtype)))
    gradients = tpu_backward.backward(
        q,
        k,
        v,
        lse,
        delta,
        dout,
        Masks(q_segments, kv_segments, q_positions, kv_positions),
        spec=spec,
        config=_config(config, BackwardConfig, q, k, spec, q_segments is not None),
    )
    return tuple(x.astype(dtype) for x in gradients)


def _computable(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def shape_class(kind: type[Config], size: int, length: int, spec: AttentionSpec, packed: bool, dtype) -> str:
    """Key of the table: direction, head size, mask, and the length rounded up to 1024, 4096, 16384, ..."""
    direction = "fwd" if kind is ForwardConfig else "bwd"
    mask = "window" if spec.window else "causal" if spec.causal else "full"
    length = 4 ** max(5, math.ceil(math.log(length, 4) - 1e-9))
    kind_of_mask = mask + ("-packed" if packed else "")
    return f"{direction}/head{size}/{kind_of_mask}/{length}" + ("" if dtype == jnp.bfloat16 else f"/{jnp.dtype(dtype)}")


def _config(given: Config | None, kind: type[Config], q, k, spec: AttentionSpec, packed: bool) -> Config:
    if given is not None:
        return given
    key = shape_class(kind, q.shape[3], max(q.shape[1], k.shape[1]), spec, packed, q.dtype)
    recorded = tables.lookup(TABLE, target.current().family, key)
    # Products of float32 take six passes, which overlap enough; the program of two heads would only be twice as long.
    guess = kind(unroll=1) if q.dtype == jnp.float32 else kind()
    return fitted(kind(**recorded) if recorded else guess, q, k)


def fitted(config: Config, q, k) -> Config:
    """`config`, its blocks cut down to the lengths of the arrays and to the vector memory."""
    lengths = [math.ceil(n / 128) * 128 for n in (q.shape[1], k.shape[1])]
    block_q, block_kv = min(config.block_q, lengths[0]), min(config.block_kv, lengths[1])
    if q.shape[1] == k.shape[1] and config.block_q == config.block_kv:
        block_q = block_kv = max(block_q, block_kv)
    config = _sized(config, block_q, block_kv)
    while vmem_bytes(config, q, k) > tpu_forward.vmem_limit() and max(block_q, block_kv) > 128:
        most = max(block_q, block_kv)
        half = max(128, most // 256 * 128)
        block_q, block_kv = (half if n == most else n for n in (block_q, block_kv))
        config = _sized(config, block_q, block_kv)
    return config


def _sized(config: Config, block_q: int, block_kv: int) -> Config:
    tile_q, tile_kv = math.gcd(config.tile_q, block_q), math.gcd(config.tile_kv, block_kv)
    return dataclasses.replace(config, block_q=block_q, block_kv=block_kv, tile_q=tile_q, tile_kv=tile_kv)


def vmem_bytes(config: Config, q, k) -> int:
    """Vector memory that a kernel takes: blocks twice, to load ahead, and what stays in it."""
    heads, size, dtype = q.shape[2], q.shape[3], jnp.dtype(q.dtype)
    units = tpu_heads.units(heads, k.shape[2], size, dtype, config.heads)
    n, g, bq, bk = units.q.block, units.kv_heads, config.block_q, config.block_kv
    q_block = tpu_heads.block_bytes(units.q, bq, dtype)
    kv_block = tpu_heads.block_bytes(units.kv, bk, dtype)
    lanes, item = max(size, 128), dtype.itemsize
    spilled = 6 * config.tile_q * config.tile_kv * 4 * config.unroll
    if isinstance(config, ForwardConfig):
        kept = n * bq * (lanes * item + size * 4 + 64) + 2 * g * bk * lanes * item
        return 2 * (2 * q_block + 2 * kv_block) + kept + spilled
    kept = n * bq * (2 * size * item + size * 4 + 64) + 3 * g * bk * lanes * item
    summed = min(math.ceil(k.shape[1] / bk) * bk, tpu_backward.keys_at_once(units, config)) * g * size * 8
    return 2 * (3 * q_block + 2 * kv_block + 2 * g * bk * lanes * 4) + kept + summed + 2 * spilled
