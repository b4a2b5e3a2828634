"""Root mean square normalisation with a learned scale."""

import jax
from flax import nnx

from davinci_jax import ops
from davinci_jax.layers import parameters


class RMSNorm(nnx.Module):
    """`ops.rms_norm` with parameter `scale` [D], which begins at one and is held whole on every device."""

    def __init__(self, size: int, eps: float):
        self.scale = parameters.constant(1.0, (size,), None)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], same dtype."""
        return ops.rms_norm(x, self.scale[...], self.eps)
