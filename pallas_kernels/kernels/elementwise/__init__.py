"""RMSNorm, SwiGLU and rotary embeddings, in XLA with gradients of their own.

There is no Pallas kernel here, because XLA fuses these into as few passes over memory as a kernel would make, and
often into the matrix products around them, which a kernel of its own prevents.
"""

from pallas_kernels.kernels.elementwise.norm import rms_norm
from pallas_kernels.kernels.elementwise.rope import rope
from pallas_kernels.kernels.elementwise.swiglu import swiglu

__all__ = ["rms_norm", "rope", "swiglu"]
