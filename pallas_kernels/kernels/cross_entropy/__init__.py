"""Cross-entropy of a linear head that never stores the logits of all tokens."""

from pallas_kernels.kernels.cross_entropy.api import CrossEntropyAux, linear_cross_entropy
from pallas_kernels.kernels.cross_entropy.config import TpuCrossEntropyConfig, XlaCrossEntropyConfig

__all__ = ["CrossEntropyAux", "TpuCrossEntropyConfig", "XlaCrossEntropyConfig", "linear_cross_entropy"]
