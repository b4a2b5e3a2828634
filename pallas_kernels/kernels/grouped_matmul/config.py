"""Block sizes of the kernels, which import nothing of Pallas: a caller may name them on any machine."""

import dataclasses

import jax
import jax.numpy as jnp

SWIZZLE = 128  # bytes of a row of a tile in Hopper's shared memory
OUT_SLOTS = 2  # tiles of results on their way to memory, for each of two warpgroups
OTHER = 3 * 1024  # bytes at most of barriers, and of scratch that Mosaic GPU sets aside


@dataclasses.dataclass(frozen=True)
class TpuGroupedMatmulConfig:
    """Block sizes of the products on TPUs.

    Attributes:
      rows: of a block of x and of the result.
      part: rows of a block that are multiplied at once where it holds several groups; divides `rows`.
      columns: of a block of the weights; with two weights, of each of them.
    """

    rows: int = 512
    part: int = 128
    columns: int = 512

    def vmem(self, depth: int, columns: int, dtype: jax.typing.DTypeLike, weights: int, outs: int) -> int:
        """Bytes of the blocks, each held twice, and of the float32 sums."""
        width = min(self.columns, columns)
        blocks = self.rows * depth + weights * depth * width + outs * self.rows * width
        sums = 3 if weights > 1 else 1  # of the gated product also the result
        return 2 * blocks * jnp.dtype(dtype).itemsize + 4 * sums * self.rows * width


@dataclasses.dataclass(frozen=True)
class TpuGroupedMatmulTransposedConfig:
    """Block sizes of the gradient of the weights on TPUs.

    Attributes:
      rows: of a block of x and of y.
      part: rows of a block that are multiplied at once where it holds several groups; divides `rows`.
      depth: rows of a block of the result.
      columns: of a block of the result.
    """

    rows: int = 512
    part: int = 128
    depth: int = 1024
    columns: int = 512

    def vmem(self, depth: int, columns: int, dtype: jax.typing.DTypeLike) -> int:
        """Bytes of the blocks, each held twice, and of the float32 sums with one product beside them."""
        height, width = min(self.depth, depth), min(self.columns, columns)
        blocks = self.rows * (height + width) + height * width
        return 2 * blocks * jnp.dtype(dtype).itemsize + 2 * 4 * height * width


@dataclasses.dataclass(frozen=True)
class HopperGroupedMatmulConfig:
    """Block sizes of the products on Hopper.

    Attributes:
      tile_m: rows of an output tile, 128 or 256, divided between two warpgroups.
      tile_n: its columns; with "swiglu" these many of the gate and of the up projection.
      stages: steps of operands in shared memory, each 128 bytes deep.
      band: row tiles that share the columns of the weights while these are in L2.
    """

    tile_m: int = 128
    tile_n: int = 256
    stages: int = 4
    band: int = 8

    def shared_memory(self, weights: int) -> int:
        """Bytes that a block takes; `weights` is 2 for "swiglu"."""
        step = SWIZZLE * (self.tile_m + weights * self.tile_n)
        return self.stages * step + OUT_SLOTS * self.tile_m * SWIZZLE + OTHER


@dataclasses.dataclass(frozen=True)
class HopperGroupedMatmulTransposedConfig:
    """Block sizes of the gradient of the weights on Hopper.

    Attributes:
      tile_k: rows of an output tile (features of x), 128 or 256, divided between two warpgroups.
      tile_n: its columns (features of dy).
      tile_m: rows of x and dy that one step contracts.
      stages: steps of operands in shared memory.
      band: row tiles that share columns of dy while these are in L2.
    """

    tile_k: int = 128
    tile_n: int = 256
    tile_m: int = 64
    stages: int = 4
    band: int = 8

    def shared_memory(self) -> int:
        """Bytes that a block takes, for operands of 16 bits."""
        step = 2 * self.tile_m * (self.tile_k + self.tile_n)
        return self.stages * step + OUT_SLOTS * self.tile_k * SWIZZLE + OTHER


ProductConfig = TpuGroupedMatmulConfig | HopperGroupedMatmulConfig
TransposedConfig = TpuGroupedMatmulTransposedConfig | HopperGroupedMatmulTransposedConfig


@dataclasses.dataclass(frozen=True)
class GroupedMatmulConfig:
    """Block sizes of the three kernels of a product and its gradients, for the device at hand; None looks them up.

    Attributes:
      forward: of the product.
      grad_x: of the gradient of the rows, a product as well.
      grad_w: of the gradient of the weights.
    """

    forward: ProductConfig | None = None
    grad_x: ProductConfig | None = None
    grad_w: TransposedConfig | None = None
