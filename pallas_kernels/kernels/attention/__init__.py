"""Attention: the public function, its reference, and the kernels behind it."""

from pallas_kernels.kernels.attention.api import RESIDUAL, attention
from pallas_kernels.kernels.attention.spec import AttentionSpec

__all__ = ["RESIDUAL", "AttentionSpec", "attention"]
