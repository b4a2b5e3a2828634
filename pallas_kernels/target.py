"""What a traced program will be compiled for: asked here once, so that a trace never queries hardware itself."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
from jax.sharding import AxisType

FAMILIES = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100": "hopper",
    "NVIDIA H200": "hopper",
    "NVIDIA GH200": "hopper",
}

# Bytes of vector memory of one TensorCore. How much of it a kernel asks for is said beside the kernel.
VMEM = {"v5e": 128 * 2**20, "v5p": 64 * 2**20, "v6e": 128 * 2**20, "tpu7x": 64 * 2**20}


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      platform: "tpu", "gpu" or "cpu".
      device_kind: as `jax.Device.device_kind` says it.
      cores: TensorCores of a TPU device that share one program (2 on v5p), multiprocessors of a GPU (132 on H200).
      interpret: run Pallas kernels in the interpreter of the platform, on the CPU.
    """

    platform: Literal["tpu", "gpu", "cpu"]
    device_kind: str
    cores: int = 1
    interpret: bool = False

    @property
    def family(self) -> str:
        """ "v5e", "v5p", "v6e", "tpu7x", "hopper", or "other": the key of the tables of block sizes."""
        known = [name for name in FAMILIES if self.device_kind.startswith(name)]
        return FAMILIES[max(known, key=len)] if known else "other"

    def lacks_kernels(self, *platforms: str) -> str | None:
        """Why an operation with kernels for `platforms` has none here; None if it has one."""
        if self.platform not in platforms or self.family == "other":
            return f"there is no kernel for {self.device_kind}"
        if self.platform == "tpu" and not self.interpret and _has_automatic_axes():
            return (
                "a kernel of TPUs cannot be divided over automatic mesh axes, only over explicit ones or in shard_map"
            )
        return _lacks_mosaic_gpu() if self.platform == "gpu" else None


def _lacks_mosaic_gpu() -> str | None:
    """Why the language of the kernels for Hopper cannot be imported, if so; jax itself does not install absl-py."""
    try:
        from jax.experimental.pallas import mosaic_gpu  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "absl":
            raise
        return "absl-py is not installed, which Mosaic GPU needs"
    return None


def _has_automatic_axes() -> bool:
    """Whether the mesh of the context leaves axes to XLA's partitioner, which has no rules for kernels on TPUs."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(kind == AxisType.Auto and size > 1 for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True))


TPU_V5E = Target("tpu", "TPU v5 lite")
TPU_V5P = Target("tpu", "TPU v5", cores=2)
TPU_V6E = Target("tpu", "TPU v6 lite")
TPU_7X = Target("tpu", "TPU7x")
H200 = Target("gpu", "NVIDIA H200", cores=132)

_chosen = jax.make_user_context(None)  # part of the key of jit's cache, unlike a variable of our own


def current() -> Target:
    """The target of the program being traced: the one set by `compiling_for`, else jax's default device."""
    if _chosen.value is not None:
        return _chosen.value
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    cores = getattr(device, "num_cores" if device.platform == "tpu" else "core_count", None)
    return Target(device.platform, device.device_kind, cores or 1)


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Within it, functions of this package choose and configure kernels for `target`."""
    with _chosen(target):
        yield


@contextlib.contextmanager
def interpreting(target: Target, params: object = None) -> Iterator[None]:
    """Within it, the kernels of `target` run on the CPU, in the interpreter that Pallas has for its platform.

    That of jax 0.10 for Hopper has no transposed operands of tensor cores, which gradients of grouped matmuls use.

    Args:
      target: the device to imitate.
      params: `pltpu.InterpretParams` or the interpreter parameters of Mosaic GPU, to detect races for example.
    """
    with compiling_for(dataclasses.replace(target, interpret=True)):
        if target.platform == "tpu":
            from jax.experimental.pallas import tpu as pltpu  # late, for `import pallas_kernels` to be quick

            with pltpu.force_tpu_interpret_mode(params or pltpu.InterpretParams()):
                yield
        else:
            force, default = _gpu_interpreter()
            with force(params or default()):
                yield


def _gpu_interpreter():
    """Public in `plgpu` from jax 0.11 on. Imported late: Mosaic GPU also needs absl-py."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if hasattr(plgpu, "force_gpu_interpret_mode"):
        return plgpu.force_gpu_interpret_mode, plgpu.InterpretGPUParams
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.force_gpu_interpret_mode, params.InterpretGPUParams
