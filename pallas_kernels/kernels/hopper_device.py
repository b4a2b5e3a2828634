"""What the Hopper kernels need of Mosaic GPU, in a form that its interpreter on the CPU can run too.

The interpreter has no register layouts, no accumulator that is read and overwritten in a loop, and no reductions by
the copy engine. Each is imitated here, and nowhere else, when the current target is one to interpret.
"""

import functools
import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import target

_WHOLE = {"idx": ()} if "idx" in inspect.signature(plgpu.load).parameters else {}  # a parameter that jax 0.12 lacks


def interpreting() -> bool:
    return target.current().interpret


def kernel(body: Callable, *, out_type, scratch_types: dict, blocks: int, warpgroups: int, name: str) -> Callable:
    """A kernel over `blocks` ("block") of `warpgroups` ("wg"), that also takes `jax.Ref`s, to change in place."""
    mesh = plgpu.Mesh(grid=(blocks,), grid_names=("block",), num_threads=warpgroups, thread_name="wg", kernel_name=name)

    def allocated(*refs):
        pl.run_scoped(functools.partial(body, *refs), collective_axes="wg", **scratch_types)

    # The default of the semantics differs between versions of jax; layouts are spelled out below for this one.
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    return pl.kernel(allocated, out_type=out_type, mesh=mesh, compiler_params=params, name=name)


def tiled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike):
    """Shared memory in the layout that tensor cores read and the copy engine writes without bank conflicts."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def in_layout(x: jax.Array, reduced: int | None = None) -> jax.Array:
    """`x` in the layout of an accumulator, or of a vector that results from reducing one along axis `reduced`."""
    if interpreting():
        return x
    layout = plgpu.Layout.WGMMA
    return plgpu.layout_cast(x, layout if reduced is None else layout.reduce(reduced))


def load_vector(ref, reduced: int) -> jax.Array:
    """A vector, in global or shared memory, in the layout of `in_layout`."""
    if interpreting():
        return ref[...]
    layout = plgpu.Layout.WGMMA.reduce(reduced)
    return plgpu.load(ref, **_WHOLE, layout=layout, optimized=False)  # optimized loads are from shared memory alone


def load(ref) -> jax.Array:
    """A matrix in global memory, in the layout of an accumulator."""
    if interpreting():
        return ref[...]
    return plgpu.load(ref, **_WHOLE, layout=plgpu.Layout.WGMMA, optimized=False)


def full(shape: tuple[int, ...], value: float, reduced: int | None = None) -> jax.Array:
    return in_layout(jnp.full(shape, value, jnp.float32), reduced)


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return in_layout(lax.broadcasted_iota(jnp.int32, shape, axis))


def rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A vector with one element per row, repeated along the columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def columns(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A vector with one element per column, repeated along the rows."""
    return lax.broadcast_in_dim(x, shape, (1,))


class Accumulator:
    """Float32 registers of one warpgroup that tensor cores add to."""

    def __init__(self, ref):
        self._ref = ref

    def add(self, a, b, *, transposed: str = "") -> None:
        """Starts += a @ b, with one of them, "a" or "b", transposed. `a` may be in registers, else in shared memory."""
        plgpu.wgmma(self._ref, a.T if transposed == "a" else a, b.T if transposed == "b" else b)

    def read(self, in_flight: int = 0) -> jax.Array:
        """The value, once at most `in_flight` of the last products are unfinished."""
        # The barrier keeps arithmetic on the value from being moved to before the wait.
        return lax.optimization_barrier(plgpu.wgmma_accumulator_load(self._ref, wait_n=in_flight))

    def set(self, value: jax.Array) -> None:
        self._ref[...] = value


class _Imitation:
    """An `Accumulator` in a part of shared memory that only the interpreter allocates."""

    def __init__(self, ref):
        self._ref = ref

    def add(self, a, b, *, transposed: str = "") -> None:
        a, b = a[...], b[...]
        a, b = a.T if transposed == "a" else a, b.T if transposed == "b" else b
        self._ref[...] += jnp.dot(a, b, preferred_element_type=jnp.float32)

    def read(self, in_flight: int = 0) -> jax.Array:
        del in_flight
        return self._ref[...]

    def set(self, value: jax.Array) -> None:
        self._ref[...] = value


def wait_for_products() -> None:
    """Until all that accumulators were given is added."""
    if not interpreting():
        plgpu.wgmma_wait(0)


def imitated(shapes: Sequence[tuple[int, int]], warpgroups: int) -> list:
    """Scratch to pass to `accumulators`: empty on a device."""
    return [plgpu.SMEM((warpgroups, *shape), jnp.float32) for shape in shapes] if interpreting() else []


def accumulators(body: Callable, shapes: Sequence[tuple[int, int]], imitations: Sequence, warpgroup: jax.Array):
    """`body` of as many accumulators, that start from zero."""
    if not interpreting():
        refs = [plgpu.ACC(shape, jnp.float32) for shape in shapes]
        return pl.run_scoped(lambda *allocated: body(*map(Accumulator, allocated)), *refs)
    allocated = [_Imitation(ref.at[warpgroup]) for ref in imitations]
    for each, shape in zip(allocated, shapes, strict=True):
        each.set(jnp.zeros(shape, jnp.float32))
    return body(*allocated)


def wait_if(condition: jax.Array, barrier) -> None:
    pl.when(condition)(lambda: plgpu.barrier_wait(barrier))


def add_to_gmem(source, destination) -> None:
    """Starts an addition of shared to global memory by the copy engine, in float32."""
    if interpreting():  # blocks run one after the other there
        destination[...] += source[...]
    else:
        plgpu.copy_smem_to_gmem(source, destination, reduction_op="add")
