"""Mosaic GPU's interpreter for the kernels here: one multiprocessor, and transposed operands of wgmma."""

import contextlib
import dataclasses

import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.state.types import TransposeTransform

from pallas_kernels import target


@contextlib.contextmanager
def hopper(cores: int = 1):
    """Interprets kernels as a Hopper GPU with `cores` multiprocessors would run them; each is compiled anew."""
    multiply = gpu_callbacks.wgmma
    gpu_callbacks.wgmma = _wgmma
    try:
        with target.interpreting(dataclasses.replace(target.H200, cores=cores)):
            yield
    finally:
        gpu_callbacks.wgmma = multiply


def _wgmma(*, token, source_info=None, acc_dtype, **kwargs):
    """As the interpreter's own, which does not know of transposed operands (jax 0.10.2)."""
    values = {name: _read(kwargs, name, source_info) for name in ("acc", "a", "b")}
    product = np.matmul(values["a"], values["b"], dtype=acc_dtype)
    key, where, thread, logging = _place(kwargs, "acc", source_info)[:4]
    gpu_callbacks._get_shared_memory().store_buffer_content(
        key, where, values["acc"] + product, thread, logging_info=logging
    )
    return token


def _read(kwargs, name, source_info):
    key, where, thread, logging, flipped = _place(kwargs, name, source_info)
    value, *_ = gpu_callbacks._get_shared_memory().get_buffer_content(key, where, thread, logging_info=logging)
    return value.T if flipped else value


def _place(kwargs, name, source_info):
    """Buffer, slice, thread, what to log, and whether the slice is transposed."""
    transforms = gpu_callbacks._remove_noop_transforms(kwargs[f"{name}_transforms"])
    indexers = [t for t in transforms if not isinstance(t, (TransposeTransform, *gpu_callbacks.NOOP_TRANSFORMS))]
    flipped = any(isinstance(t, TransposeTransform) for t in transforms)
    device, thread = int(kwargs["device_id"]), int(kwargs["thread_id"])
    logging = gpu_callbacks.interpret_utils.GPULoggingInfo(
        device_id=device,
        grid_point_coords=tuple(int(i) for i in kwargs["grid_point_coords"]),
        thread_id=thread,
        source_info=source_info,
    )
    return (
        gpu_callbacks.HostAllocationKey.from_array(kwargs[f"{name}_allocation_key_as_array"]),
        gpu_callbacks.interpret_utils.to_range(gpu_callbacks.jax.tree.map(int, tuple(indexers))),
        gpu_callbacks._get_shared_memory().get_global_thread_id(device, thread),
        logging,
        flipped,
    )
