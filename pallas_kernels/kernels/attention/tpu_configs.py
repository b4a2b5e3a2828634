"""Block sizes of the attention kernels on TPU, apart from the kernels: those import absl-py by way of Pallas."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TpuAttentionForwardConfig:
    """Sizes of the forward kernel.

    Attributes:
      block_q, block_kv: queries and keys of one step of the grid, multiples of 128.
      tile_q, tile_kv: of the pieces that are overlapped; divide the block.
      heads: query heads of a step, at most; 8 and 16 need no copy of the arrays where they divide the heads.
      unroll: heads whose tiles are overlapped with each other.
    """

    block_q: int = 1024
    block_kv: int = 1024
    tile_q: int = 128
    tile_kv: int = 256
    heads: int = 8
    unroll: int = 2


@dataclasses.dataclass(frozen=True)
class TpuAttentionBackwardConfig:
    """Sizes of the backward kernel.

    Attributes:
      block_q, block_kv: queries and keys of one step of the grid, multiples of 128.
      tile_q, tile_kv: of the pieces that are overlapped; divide the block.
      heads: query heads of a step, at most; 8 and 16 need no copy of the arrays where they divide the heads.
      unroll: heads whose tiles are overlapped with each other.
    """

    block_q: int = 1024
    block_kv: int = 1024
    tile_q: int = 256
    tile_kv: int = 128
    heads: int = 8
    unroll: int = 2
