"""Ahead-of-time compilation for a TPU or an H200, on a machine that has neither.

  compiled = compile_for("v5p", function, jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16))
  compiled.memory.temporary, compiled.text, compiled.kernels

Set JAX_PLATFORMS=cpu where no accelerator is meant to be used.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels import target as targets
from pallas_kernels.compiler import hopper_report, libtpu, schedule, static_cycles
from pallas_kernels.errors import ArgumentError

CACHE = "PALLAS_KERNELS_AOT_CACHE"
_known: dict[str, "Compiled"] = {}  # libtpu writes no schedule when it compiles a program again in the same process
_mosaic: dict[str, hopper_report.KernelReport] = {}  # nor does jax a kernel for Hopper, in whatever program
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm")


@dataclasses.dataclass(frozen=True)
class Device:
    """What can be compiled for: the target of this package, and the name jax has for a small slice of it."""

    target: targets.Target
    topology: str


DEVICES = {
    "v5e": Device(targets.TPU_V5E, "v5e:2x2"),
    "v5p": Device(targets.TPU_V5P, "v5p:2x2x1"),
    "v6e": Device(targets.TPU_V6E, "v6e:2x2"),
    "tpu7x": Device(targets.TPU_7X, "tpu7x:2x2x1"),
    "h200": Device(targets.H200, "1x1x8"),
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory while the program runs; `aliased` counts in both arguments and outputs."""

    arguments: int
    outputs: int
    temporary: int
    aliased: int

    @property
    def peak(self) -> int:
        """What the program occupies at once."""
        return self.arguments + self.outputs + self.temporary - self.aliased


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, as the compiler describes it.

    Attributes:
      device: the key of `DEVICES`.
      memory: bytes by use.
      text: the optimised HLO.
      kernels: one report for each fusion or Pallas kernel on a TPU, for each Mosaic kernel on a GPU.
      seconds: that compilation took.
    """

    device: str
    memory: Memory
    text: str
    kernels: tuple[static_cycles.KernelReport, ...] | tuple[hopper_report.KernelReport, ...]
    seconds: float

    def kernel(self, name: str) -> Any:
        """The report of the only kernel whose name contains `name`."""
        found = [kernel for kernel in self.kernels if name in kernel.name]
        if len(found) != 1:
            names = ", ".join(kernel.name for kernel in self.kernels) or "none"
            raise LookupError(f"{len(found)} kernels have {name!r} in their name; the program has: {names}")
        return found[0]


def compile_for(
    device: str | targets.Target,
    function: Callable,
    *arguments: Any,
    donate: Sequence[int] = (),
    options: dict[str, Any] | None = None,
) -> Compiled:
    """Compiles `function` for a device that need not be there.

    Functions of this package choose their kernels for that device, as if it were the default one. Where the
    environment variable PALLAS_KERNELS_AOT_CACHE names a folder, what the compiler said is kept there by program,
    compiler versions and options, and read back instead of compiling again.

    Args:
      device: a key of `DEVICES`, or one of the targets of `pallas_kernels.target`.
      function: what `jax.jit` takes.
      arguments: pytrees of `jax.ShapeDtypeStruct`; those without a sharding are put on one device. For several
        devices give shardings on a mesh of `devices(device)`.
      donate: positions of donated arguments.
      options: compiler options of XLA.

    Raises:
      ArgumentError: unknown device.
      ModuleNotFoundError: the compiler of that device is not installed.
    """
    name = device_name(device)
    arguments = jax.tree.map(functools.partial(_placed, default=devices(name)[0]), arguments)
    lowered = lower(name, function, *arguments, donate=donate)
    key = _identity(name, lowered, options)
    if key not in _known:
        file = pathlib.Path(os.environ[CACHE]) / f"{key}.json" if os.environ.get(CACHE) else None
        if file and file.exists():
            return _from_json(file.read_text())
        _known[key] = _compile(name, lowered, options)
        if file:
            _write(file, json.dumps(dataclasses.asdict(_known[key])))
    return _known[key]


def device_name(device: str | targets.Target) -> str:
    """The key of `DEVICES` for a target, or for itself."""
    names = [name for name, known in DEVICES.items() if device in (name, known.target)]
    if not names:
        raise ArgumentError("compile_for", "device", f"is {device!r}", f"choose one of {', '.join(DEVICES)}")
    return names[0]


def devices(device: str | targets.Target) -> list[Any]:
    """The devices of a small slice (4 chips) or host (8 GPUs), to make meshes for `compile_for`."""
    return list(_topology(device_name(device)))


def lower(device: str, function: Callable, *arguments: Any, donate: Sequence[int] = ()) -> jax.stages.Lowered:
    """Traces and lowers `function` for a device, given arguments with shardings on it."""
    target = DEVICES[device].target
    with targets.compiling_for(target), _abstract_device(target, _topology(device)[0].device_kind, arguments):
        traced = jax.jit(function, donate_argnums=tuple(donate)).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda" if target.platform == "gpu" else "tpu",))


def versions() -> dict[str, str]:
    """The versions of what compiles, where installed."""
    found = {}
    for package in _COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def _topology(name: str) -> Sequence[Any]:
    device = DEVICES[name]
    if device.target.platform == "tpu":
        libtpu.prepare()
        return topologies.get_topology_desc(device.topology, platform="tpu").devices
    config = (importlib.resources.files(__package__) / "h200.txtpb").read_text()
    return topologies.get_topology_desc("", platform="cuda", topology=device.topology, target_config=config).devices


@contextlib.contextmanager
def _abstract_device(target: targets.Target, kind: str, arguments: Any) -> Iterator[None]:
    """Tells Pallas what it traces for, which it would otherwise ask the default device; the mesh is the arguments'."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=target.cores, platform=target.platform)
    shardings = (leaf.sharding for leaf in jax.tree.leaves(arguments))
    meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, jax.sharding.NamedSharding)]
    sizes, names, types = (meshes[0].axis_sizes, meshes[0].axis_names, meshes[0].axis_types) if meshes else ((),) * 3
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, names, types, abstract_device=device)):
        yield


def _placed(argument: jax.ShapeDtypeStruct, default: Any) -> jax.ShapeDtypeStruct:
    sharding = argument.sharding or jax.sharding.SingleDeviceSharding(default)
    return jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=sharding)


def _compile(name: str, lowered: jax.stages.Lowered, options: dict[str, Any] | None) -> Compiled:
    target = DEVICES[name].target
    gpu = target.platform == "gpu"
    reports = hopper_report.collect() if gpu else static_cycles.collect(target.cores)
    started = time.monotonic()
    # An executable made without a device cannot be read back from jax's cache, which would also leave out the reports.
    with _no_jax_cache(), reports as kernels:
        executable = lowered.compile(compiler_options=options)
    memory = executable.memory_analysis()
    return Compiled(
        device=name,
        memory=Memory(
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
        ),
        text=executable.as_text(),
        kernels=hopper_report.of_program(executable.as_text(), kernels, _mosaic) if gpu else tuple(kernels),
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def _no_jax_cache() -> Iterator[None]:
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def _identity(name: str, lowered: jax.stages.Lowered, options: dict[str, Any] | None) -> str:
    # The reports are of the classes as they are now.
    sources = [pathlib.Path(module.__file__).read_text() for module in (hopper_report, libtpu, schedule, static_cycles)]
    identity = (name, lowered.as_text(), sorted((options or {}).items()), versions(), sources)
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def _from_json(text: str) -> Compiled:
    """What `json.dumps(dataclasses.asdict(compiled))` holds."""
    found = json.loads(text)
    module = hopper_report if DEVICES[found["device"]].target.platform == "gpu" else static_cycles
    kernels = tuple(module.KernelReport.from_dict(kernel) for kernel in found["kernels"])
    return Compiled(**found | {"memory": Memory(**found["memory"]), "kernels": kernels})


def _write(file: pathlib.Path, content: str) -> None:
    """Writes a file whole, so that a process that reads it at the same time sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        temporary.write(content)
    os.replace(temporary.name, file)
