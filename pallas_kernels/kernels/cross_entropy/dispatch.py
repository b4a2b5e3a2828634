"""Which steps a call runs, and with which block sizes."""

import jax.numpy as jnp

from pallas_kernels import tables, target
from pallas_kernels.errors import ArgumentError, UnsupportedError
from pallas_kernels.kernels.cross_entropy import xla
from pallas_kernels.kernels.cross_entropy.chunks import Steps
from pallas_kernels.kernels.cross_entropy.config import CrossEntropyConfig, TpuCrossEntropyConfig, XlaCrossEntropyConfig


def choose(backend: str, dtype, hidden: int, vocabulary: int, config: CrossEntropyConfig | None) -> str:
    """The backend to run: "tpu" or "xla".

    Raises:
      ArgumentError: `config` is not one of the backend's.
      UnsupportedError: backend="pallas" has no kernel for this case.
    """
    backend_of_config = {XlaCrossEntropyConfig: "xla", TpuCrossEntropyConfig: "pallas"}.get(type(config))
    if backend != "auto" and backend_of_config not in (None, backend):
        problem = f"is {type(config).__name__}, with backend={backend!r}"
        raise ArgumentError("linear_cross_entropy", "config", problem, "leave one of them out")
    asked = backend_of_config or backend
    reason = unsupported(dtype, hidden, vocabulary)
    if asked == "pallas" and reason is not None:
        raise UnsupportedError("linear_cross_entropy", "pallas", reason)
    return "xla" if asked == "xla" or reason is not None else "tpu"


def unsupported(dtype, hidden: int, vocabulary: int) -> str | None:
    """Why there is no kernel for this case on the current target; None if there is."""
    missing = target.current().lacks_kernels("tpu")
    if missing is not None:
        return missing
    from pallas_kernels.kernels.cross_entropy import tpu  # late: it imports Mosaic

    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernels take bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if hidden % 128:
        return f"a hidden size of {hidden} is no multiple of 128"
    if tpu.fit(tpu.DEFAULT, hidden, jnp.dtype(dtype).itemsize) is None:
        return f"rows of a hidden size of {hidden} leave no room in VMEM for a block"
    if vocabulary < 128:
        return f"a vocabulary of {vocabulary} is smaller than a block of 128"
    return None


def steps(
    backend: str,
    config: CrossEntropyConfig | None,
    soft_cap: float | None,
    tokens: int,
    dtype,
    w_shape: tuple[int, int],
) -> Steps:
    """The steps for `tokens` local tokens with a head of shape [V, D]."""
    vocabulary, hidden = w_shape
    if backend == "xla" or tokens == 0:
        chunk = config.chunk if config else xla.tokens_per_chunk(tokens, hidden, vocabulary)
        return xla.steps(soft_cap=soft_cap, chunk=chunk)
    from pallas_kernels.kernels.cross_entropy import tpu

    now = target.current()
    if config is None:
        recorded = tables.lookup("cross_entropy", now.family, shape_class(hidden))
        size = jnp.dtype(dtype).itemsize
        config = tpu.fit(TpuCrossEntropyConfig(**recorded) if recorded else tpu.DEFAULT, hidden, size)
    return tpu.steps(soft_cap=soft_cap, config=config, cores=now.cores)


def shape_class(hidden: int) -> str:
    """The key of the table: what a block needs in VMEM hangs on the hidden size, not on vocabulary and tokens."""
    return f"hidden{hidden}"
