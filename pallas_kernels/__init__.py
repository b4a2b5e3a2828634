"""Kernels for training language models in JAX: attention, expert routing, grouped matmul, fused cross-entropy.

Arrays in, arrays out; nothing but jax is imported. Functions take `backend="auto" | "pallas" | "xla"`, attention also
"cudnn", and `config`, block sizes that are looked up where it is None; `supported` says why a backend does not take a
case. `rms_norm`, `swiglu` and `rope` are XLA alone: they raise for "pallas" and for any config. So are the two losses
of a router, which take neither. `docs/kernels.md` shows each in use.
"""

from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.attention import attention
from pallas_kernels.kernels.attention.hopper import HopperAttentionBackwardConfig, HopperAttentionForwardConfig
from pallas_kernels.kernels.attention.tpu_configs import TpuAttentionBackwardConfig, TpuAttentionForwardConfig
from pallas_kernels.kernels.cross_entropy import (
    CrossEntropyAux,
    TpuCrossEntropyConfig,
    XlaCrossEntropyConfig,
    linear_cross_entropy,
)
from pallas_kernels.kernels.elementwise import rms_norm, rope, swiglu
from pallas_kernels.kernels.grouped_matmul import (
    GroupedMatmulConfig,
    HopperGroupedMatmulConfig,
    HopperGroupedMatmulTransposedConfig,
    TpuGroupedMatmulConfig,
    TpuGroupedMatmulTransposedConfig,
    grouped_matmul,
    grouped_matmul_transposed,
)
from pallas_kernels.kernels.moe import MoeConfig, moe_mlp
from pallas_kernels.kernels.routing import Routing, load_balancing_loss, route, router_z_loss
from pallas_kernels.support import supported

__all__ = [
    "ArgumentError",
    "CrossEntropyAux",
    "GroupedMatmulConfig",
    "HopperAttentionBackwardConfig",
    "HopperAttentionForwardConfig",
    "HopperGroupedMatmulConfig",
    "HopperGroupedMatmulTransposedConfig",
    "MoeConfig",
    "Routing",
    "TpuAttentionBackwardConfig",
    "TpuAttentionForwardConfig",
    "TpuCrossEntropyConfig",
    "TpuGroupedMatmulConfig",
    "TpuGroupedMatmulTransposedConfig",
    "UnsupportedError",
    "XlaCrossEntropyConfig",
    "attention",
    "grouped_matmul",
    "grouped_matmul_transposed",
    "linear_cross_entropy",
    "load_balancing_loss",
    "moe_mlp",
    "rms_norm",
    "rope",
    "route",
    "router_z_loss",
    "supported",
    "swiglu",
]
