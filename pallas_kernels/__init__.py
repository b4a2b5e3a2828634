"""Kernels for training language models in JAX: attention, expert routing, grouped matmul, fused cross-entropy.

Arrays in, arrays out; nothing but jax is imported. Each function takes `backend="auto" | "pallas" | "xla"`, and
`supported` says why a backend does not take a case. `docs/kernels.md` shows each of them in use.
"""

from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.attention import attention
from pallas_kernels.kernels.cross_entropy import CrossEntropyAux, linear_cross_entropy
from pallas_kernels.kernels.elementwise import rms_norm, rope, swiglu
from pallas_kernels.kernels.grouped_matmul import grouped_matmul, grouped_matmul_transposed
from pallas_kernels.kernels.moe import moe_mlp
from pallas_kernels.kernels.routing import Routing, load_balancing_loss, route, router_z_loss
from pallas_kernels.support import supported

__all__ = [
    "ArgumentError",
    "CrossEntropyAux",
    "Routing",
    "UnsupportedError",
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
