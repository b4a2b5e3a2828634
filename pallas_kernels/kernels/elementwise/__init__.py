"""RMSNorm, SwiGLU and rotary embeddings, in XLA with gradients of their own.

Automatic differentiation would keep several times the bytes for the backward pass. There is no Pallas kernel: XLA
moves the least bytes for SwiGLU, and fuses all of them with the sums and products around them, which a kernel prevents.
"""

from pallas_kernels.kernels.elementwise.norm import rms_norm
from pallas_kernels.kernels.elementwise.rope import rope
from pallas_kernels.kernels.elementwise.swiglu import swiglu

__all__ = ["rms_norm", "rope", "swiglu"]
