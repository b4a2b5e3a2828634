"""Layouts of arrays over explicit mesh axes.

What a function cannot take divided is put together here first, as XLA's partitioner does by itself on automatic axes.
"""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

Entry = str | tuple[str, ...] | None


def entries(x: jax.Array) -> tuple[Entry, ...]:
    """For each dimension of `x` the explicit mesh axes that divide it."""
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return (None,) * x.ndim
    spec = jax.typeof(x).sharding.spec
    return (*spec, *[None] * (x.ndim - len(spec)))


def divide(x: jax.Array, *wanted: Entry) -> jax.Array:
    """`x` with dimension i divided over `wanted[i]`; of an axis that comes twice, the first counts."""
    wanted = distinct(*wanted)
    return x if wanted == entries(x) else jax.sharding.reshard(x, PartitionSpec(*wanted))


def distinct(*wanted: Entry) -> tuple[Entry, ...]:
    """The entries without those whose axes came before: an axis divides one dimension of an array."""
    used, kept = set(), []
    for entry in wanted:
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        kept.append(None if used.intersection(axes) else entry)
        used.update(axes)
    return tuple(kept)


def whole(x: jax.Array) -> jax.Array:
    """`x`, divided over no explicit mesh axis."""
    return divide(x, *[None] * x.ndim)


def on_every_device(function: Callable) -> Callable:
    """`function` of arrays that no explicit mesh axis divides, as each device's own call.

    XLA's partitioner is then not asked about a kernel, which it cannot divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not explicit:
        return function
    return jax.shard_map(
        function, in_specs=PartitionSpec(), out_specs=PartitionSpec(), axis_names=explicit, check_vma=False
    )
