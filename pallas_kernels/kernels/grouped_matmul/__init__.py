"""Matrix products of rows that are sorted by group, each group with a matrix of its own."""

from pallas_kernels.kernels.grouped_matmul.api import grouped_matmul, grouped_matmul_transposed
from pallas_kernels.kernels.grouped_matmul.config import (
    GroupedMatmulConfig,
    HopperGroupedMatmulConfig,
    HopperGroupedMatmulTransposedConfig,
    TpuGroupedMatmulConfig,
    TpuGroupedMatmulTransposedConfig,
)

__all__ = [
    "GroupedMatmulConfig",
    "HopperGroupedMatmulConfig",
    "HopperGroupedMatmulTransposedConfig",
    "TpuGroupedMatmulConfig",
    "TpuGroupedMatmulTransposedConfig",
    "grouped_matmul",
    "grouped_matmul_transposed",
]
