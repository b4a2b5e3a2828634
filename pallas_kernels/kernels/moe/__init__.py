"""The MLP of a mixture of experts."""

from pallas_kernels.kernels.moe.api import MoeConfig, moe_mlp

__all__ = ["MoeConfig", "moe_mlp"]
