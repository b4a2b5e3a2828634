"""Matrix products of rows that are sorted by group, each group with a matrix of its own."""

from pallas_kernels.kernels.grouped_matmul.api import GroupedMatmulConfig, grouped_matmul, grouped_matmul_transposed

__all__ = ["GroupedMatmulConfig", "grouped_matmul", "grouped_matmul_transposed"]
