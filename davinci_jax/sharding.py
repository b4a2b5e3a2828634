"""The device mesh, and the one table that maps logical axis names to its axes.

Every axis is explicit (`jax.sharding.AxisType.Explicit`): an array's type carries its sharding, so a layout can
be checked without running anything. Set the mesh once with `jax.set_mesh(make_mesh(config))`; modules are built,
and functions traced, under it. A mesh of one device is no special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from davinci_jax.errors import ConfigError, nearest
from davinci_jax.experiment import MeshConfig

MESH_AXES = ("replica", "fsdp", "context", "tensor", "expert", "stage")

# Logical name -> mesh axes it is divided over. "embed" is the hidden axis of a parameter; the hidden axis of an
# activation is never divided and is written None in a spec.
RULES = MappingProxyType(
    {
        "batch": ("replica", "fsdp"),
        "sequence": "context",
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "head_size": None,
        "mlp": "tensor",
        "vocab": "tensor",
        "expert": "expert",
        "layers": None,
    }
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices out as a mesh with the axes `MESH_AXES`, all explicit.

    Args:
      config: sizes of the axes; one of them may be -1 and takes the devices that are left.
      devices: devices to use; `None` uses all of `jax.devices()`.

    Returns:
      The mesh; axes that `config` does not name have size 1.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    count = len(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, count)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES), devices=devices)


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of `MESH_AXES` on `num_devices` devices; raises as `make_mesh` does."""
    given = {"replica": config.replica, "fsdp": config.fsdp}
    fixed = math.prod(size for size in given.values() if size != -1)
    for name, size in given.items():
        if size == -1:
            if num_devices % fixed:
                raise ConfigError(
                    f"mesh.{name}",
                    -1,
                    f"cannot take what is left: {num_devices} devices / {fixed} on the other axes is no whole number",
                    "choose divisors of the number of devices",
                )
            given[name] = num_devices // fixed
    if math.prod(given.values()) != num_devices:
        shown = " x ".join(f"{name} {size}" for name, size in given.items())
        raise ConfigError(
            "mesh",
            None,
            f"{shown} = {math.prod(given.values())} does not match {num_devices} devices",
            "change an axis, or write -1 for one of them",
        )
    return tuple(given.get(name, 1) for name in MESH_AXES)


def spec(*logical: str | None) -> PartitionSpec:
    """Partition spec of an array whose axes have these logical names (`None`: not divided).

    Raises:
      ConfigError: a name is not in `RULES`, or two of the axes would be divided over the same mesh axis.
    """
    entries = []
    for name in logical:
        if name is not None and name not in RULES:
            raise ConfigError("logical axis", name, "is unknown", nearest(name, RULES))
        entries.append(None if name is None else RULES[name])
    used = [axis for entry in entries for axis in _axes(entry)]
    if len(used) != len(set(used)):
        raise ConfigError("logical axes", logical, "divide two axes over one mesh axis", "leave one of them None")
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Reshards `x` to `spec(*logical)`; outside any mesh it returns `x` as it is."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec(*logical))


def out(*logical: str | None) -> PartitionSpec | None:
    """`spec(*logical)` for an `out_sharding` argument, or `None` outside any mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else spec(*logical)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry
