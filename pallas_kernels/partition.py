"""Running a function of local arrays on arrays that are divided over a mesh.

A kernel is opaque to XLA's partitioner, which would gather its arguments to every device. What it needs to know is
said here by a label for each dimension, in the notation of einops: "b t (g r) k" for queries whose heads are g groups
of r, "b s g k" for their keys.
"""

import re
from collections.abc import Callable, Sequence

import jax
import jax.extend.core
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import target
from pallas_kernels.errors import ArgumentError

Entry = str | tuple[str, ...] | None


def divided(
    function: Callable[..., tuple[jax.Array, ...]],
    arrays: Sequence[jax.Array],
    dims: Sequence[str],
    out_dims: Sequence[str],
    *,
    divisible: str,
    batch: str,
    name: str,
    opaque: bool,
) -> tuple[jax.Array, ...]:
    """Calls `function` on each device's own part of `arrays`.

    Explicit mesh axes are read off the types of the arrays, and `function` runs inside `jax.shard_map`. Automatic axes
    are known to the partitioner alone, which gets a rule for the call. Inside a `shard_map` of the caller, arrays
    are local already. An output that lacks a divided label is summed over the devices that divide it.

    Args:
      function: takes local arrays, returns a tuple of local arrays.
      arrays: its arguments.
      dims: for each argument the labels of its dimensions; "(g r)" is one dimension that is divided as g.
      out_dims: the same for the outputs.
      divisible: labels, separated by spaces, along which arrays may be divided.
      batch: a label that leads wherever it is; `jax.vmap` of an opaque function extends it.
      name: of the public function, for errors.
      opaque: whether the partitioner cannot see into `function`, as with a kernel; XLA's operations need no rule.

    Raises:
      ArgumentError: explicit axes divide a dimension that is not divisible, or two arguments differently.
    """
    inputs = [_leading(labels) for labels in dims]
    outputs = [_leading(labels) for labels in out_dims]
    allowed = divisible.split()

    def ruled(*parts):
        if not _takes_rules():
            return function(*parts)
        return _ruled(function, inputs, outputs, allowed, dims, out_dims, parts)

    def local(*parts):
        if not opaque:
            return function(*parts)
        return _batchable(ruled, [batch in labels for labels in inputs], all(batch in labels for labels in outputs))(
            *parts
        )

    axes = _explicit_axes(arrays, inputs, allowed, name)
    if not axes:
        return local(*arrays)

    def body(*parts):
        results = zip(local(*parts), outputs, strict=True)
        return tuple(_sum(result, _missing(axes, labels, inputs)) for result, labels in results)

    # Inference of varying axes stops at interpreted kernels; the sums above are what it would ask for.
    return jax.shard_map(
        body,
        in_specs=tuple(_spec(axes, labels) for labels in inputs),
        out_specs=tuple(_spec(axes, labels) for labels in outputs),
        check_vma=False,
    )(*arrays)


def _takes_rules() -> bool:
    """Whether the partitioner of automatic axes is to get a rule.

    libtpu knows none (https://github.com/jax-ml/jax/issues/38196): there XLA's operations are divided as it sees fit,
    and jax says of a kernel that it needs a `shard_map`, unless `Target.lacks_kernels` could see the axes. Inside a
    `shard_map` arrays are local, and rules do not know of axes that it leaves to the partitioner. The effects of
    interpreted kernels on memory are more than custom_partitioning takes.
    """
    now = target.current()
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return not (now.interpret or now.platform == "tpu" or manual)


def out_struct(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *like: jax.Array) -> jax.ShapeDtypeStruct:
    """The output type of a kernel; inside `shard_map` it varies over the mesh axes over which any of `like` does."""
    varying = _varying(like)
    if not varying:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying))


def vary_alike(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Arrays marked as varying over the same axes of a surrounding `shard_map`; their gradients are summed there."""
    varying = _varying([x for x in arrays if x is not None])

    def mark(x):
        missing = () if x is None else tuple(varying - jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tuple(mark(x) for x in arrays)


def _varying(arrays: Sequence[jax.Array]) -> frozenset[str]:
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def _leading(dims: str) -> list[str]:
    """ "b (g r) k" -> ["b", "g", "k"]: the labels that say how the dimensions are divided."""
    return [labels.strip("()").split()[0] for labels in re.findall(r"\([^)]*\)|\S+", dims)]


def _batchable(function, batched_inputs: list[bool], batched_outputs: bool):
    """`function` under `jax.vmap`: one call with a larger batch where all arrays have one, else call after call."""
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def rule(axis_size, mapped, *arrays):
        foldable = batched_outputs and all(
            has or not is_mapped for has, is_mapped in zip(batched_inputs, mapped, strict=True)
        )
        if not foldable:
            return _one_after_another(call, axis_size, mapped, arrays)

        def fold(x, has, is_mapped):
            if not has:
                return x
            x = x if is_mapped else jax.numpy.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        folded = [fold(*each) for each in zip(arrays, batched_inputs, mapped, strict=True)]
        results = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in call(*folded))
        return results, (True,) * len(results)

    return call


def _one_after_another(call, axis_size: int, mapped: Sequence[bool], arrays: Sequence[jax.Array]):
    def one(i):
        return call(*(x[i] if is_mapped else x for x, is_mapped in zip(arrays, mapped, strict=True)))

    results = jax.lax.map(one, jax.numpy.arange(axis_size))
    return results, (True,) * len(results)


def _spec(axes: dict[str, Entry], labels: list[str]) -> PartitionSpec:
    return PartitionSpec(*(axes.get(label) for label in labels))


def _explicit_axes(arrays, inputs: list[list[str]], allowed: list[str], name: str) -> dict[str, Entry]:
    """Which explicit mesh axes divide each label; empty outside of an explicit mesh, or where nothing is divided."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return {}
    axes: dict[str, Entry] = {}
    for array, labels in zip(arrays, inputs, strict=True):
        spec = jax.typeof(array).sharding.spec
        for label, entry in zip(labels, (*spec, *[None] * len(labels)), strict=False):
            if entry is None or not _size(mesh, entry) > 1:
                entry = None
            elif label not in allowed:
                problem = f"is divided along `{label}` over the mesh axis {entry!r}"
                raise ArgumentError(name, "sharding", problem, f"only {', '.join(allowed)} may be divided: reshard it")
            if axes.setdefault(label, entry) != entry:
                problem = f"of the arguments differs along `{label}`: {axes[label]!r} and {entry!r}"
                raise ArgumentError(name, "sharding", problem, "reshard one of them")
    return axes if any(axes.values()) else {}


def explicit_parts(array: jax.Array, axis: int) -> int:
    """Into how many parts explicit mesh axes divide a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return 1
    spec = jax.typeof(array).sharding.spec
    return _size(mesh, spec[axis] if axis < len(spec) else None)


def _size(mesh, entry: Entry) -> int:
    size = 1
    for axis in _tuple(entry):
        size *= mesh.shape[axis]
    return size


def _tuple(entry: Entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _missing(axes: dict[str, Entry], labels: list[str], inputs: list[list[str]]) -> tuple[str, ...]:
    """Mesh axes that divide some input but not the output of these labels, which then holds a partial sum."""
    kept = {axis for label in labels for axis in _tuple(axes.get(label))}
    used = dict.fromkeys(axis for dims in inputs for label in dims for axis in _tuple(axes.get(label)))
    return tuple(axis for axis in used if axis not in kept)


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


def _rule(arrays: Sequence[jax.Array], dims: Sequence[str], out_dims: Sequence[str], allowed: list[str]) -> dict:
    """What Shardy is told: the labels, which of them must stay whole, and the sizes of those inside brackets."""
    sizes, brackets = {}, []
    for array, part in zip(arrays, dims, strict=True):
        for size, labels in zip(array.shape, re.findall(r"\([^)]*\)|\S+", part), strict=True):
            if labels.startswith("("):
                brackets.append((size, labels.strip("()").split()))
            else:
                sizes[labels] = size
    inner = {last: size // sizes[first] for size, (first, last) in brackets}
    seen = dict.fromkeys(re.findall(r"[^\s()]+", " ".join(dims)))  # Shardy wants them in the order they appear in
    whole = tuple(label for label in seen if label not in allowed)
    return {
        "sharding_rule": ", ".join(dims) + " -> " + ", ".join(out_dims),
        "need_replication_factors": whole,
        **inner,
    }


def _ruled(function, inputs, outputs, allowed, dims, out_dims, parts):
    """Calls `function` on `parts`, with a rule for XLA's partitioner over automatic axes."""
    now = target.current()  # the partitioner asks when the program is compiled, which may be outside of this context

    def partition(mesh, arg_shapes, result_shapes):
        axes: dict[str, Entry] = {}
        for shape, labels in zip(arg_shapes, inputs, strict=False):
            for label, entry in zip(labels, shape.sharding.spec, strict=False):
                if label in allowed and axes.get(label) is None:
                    axes[label] = entry

        def body(*local):
            with target.compiling_for(now):
                results = zip(function(*local[: len(inputs)]), outputs, strict=True)
                return tuple(_sum(result, _missing(axes, labels, inputs)) for result, labels in results)

        results = [NamedSharding(mesh, _spec(axes, labels)) for labels in outputs]
        whole = [[]] * (len(arg_shapes) - len(inputs))
        return mesh, body, tuple(results), tuple(NamedSharding(mesh, _spec(axes, part)) for part in [*inputs, *whole])

    # Arrays that `function` makes while it is traced become arguments: custom_partitioning takes no constants.
    traced = jax.make_jaxpr(function)(*parts)
    pure = traced.jaxpr.replace(
        constvars=(),
        invars=(*traced.jaxpr.constvars, *traced.jaxpr.invars),
        debug_info=traced.jaxpr.debug_info.with_unknown_names(),
    )
    run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(pure, ()))
    constants = [jax.numpy.asarray(x) for x in traced.consts]
    whole = [" ".join(f"c{i}_{axis}" for axis in range(x.ndim)) for i, x in enumerate(constants)]

    def call(*arrays):
        return tuple(run(*arrays[len(inputs) :], *arrays[: len(inputs)]))

    ruled = custom_partitioning(call)
    arrays = (*parts, *constants)
    ruled.def_partition(partition, **_rule(arrays, (*dims, *whole), out_dims, allowed))
    return ruled(*arrays)
