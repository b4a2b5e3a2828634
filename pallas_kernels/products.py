"""Products of matrices with float32 sums, in every dtype on every platform."""

import jax
import jax.numpy as jnp

from pallas_kernels import target


def einsum(subscripts: str, *arrays: jax.Array) -> jax.Array:
    """`jnp.einsum` whose sums and result are float32 (float64 for float64).

    XLA's CPU backend has no 16-bit kernel for some layouts of a product and fails when the program runs ("Unsupported
    element type for DotThunk"), so there the operands are widened first; it computes in float32 anyway.
    """
    if target.current().platform == "cpu":
        arrays = tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays)
    return jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.promote_types(arrays[0].dtype, jnp.float32))
