"""What a candidate costs: time on the device, or cycles of its schedule."""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiler import aot, static_cycles
from pallas_kernels.errors import ArgumentError
from pallas_kernels.tune import operations

ROUNDS, ROUND_SECONDS = 7, 0.05


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one candidate, or why it has none.

    Attributes:
      value: in `unit`; infinite if the candidate does not compile.
      unit: "us" or "cycles".
      source: "measured" or "static".
      spills: of its Pallas kernels, where known.
      failure: the first line of the error.
    """

    value: float
    unit: str
    source: str
    spills: int | None = None
    failure: str = ""


def static_costs(module: Any, family: str, shape: Any, configs: Sequence[Any], jobs: int = 1) -> Iterator[Cost]:
    """Costs by static cycles, in the order of the configs; `jobs` of them are compiled at a time."""
    local = threading.local()
    arguments = [(module.__name__, family, shape, config) for config in configs]
    with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        yield from threads.map(functools.partial(_in_child, local), arguments)


def check_static(family: str) -> None:
    """Raises if `static_costs` cannot tell the cycles of a family.

    Raises:
      ArgumentError: a GPU, whose schedule is not known before it runs; a TPU, and there is no libtpu to compile for it.
    """
    if family not in static_cycles.CHIPS:
        problem = f"is {family}, which is not here, and a GPU's cycles are not in its code"
        raise ArgumentError("tune", "--device", problem, "run it on a machine with the GPU")
    if importlib.util.find_spec("libtpu") is None:
        raise ArgumentError(
            "tune", "--device", f"is {family}, which is not here and cannot be compiled for without libtpu",
            "pip install 'jax[tpu]' into an environment of its own, since jax complains where libtpu finds no TPU",
        )  # fmt: skip


def static_cost(module_name: str, family: str, shape: Any, config: Any) -> Cost:
    """The cost by static cycles of one candidate."""
    module = operations.load(module_name)
    try:
        function, structs = module.build(family, shape, config)
        compiled = aot.compile_for(operations.device_of(family), function, *structs)
    except Exception as error:  # whatever a compiler or a kernel has against a candidate
        return Cost(math.inf, "cycles", "static", failure=_first_line(error))
    kernels = [kernel for kernel in compiled.kernels if kernel.pallas]
    chip = static_cycles.CHIPS[family]
    try:
        own = getattr(module, "cycles", None)
        cycles = own(compiled, shape, config) if own else sum(kernel.model() for kernel in kernels)
    except LookupError as error:  # the compiler made loops of this candidate whose trips cannot be told
        return Cost(math.inf, "cycles", "static", failure=f"cycles cannot be counted: {_first_line(error)}")
    least = sum(kernel.bytes for kernel in kernels) / chip.bandwidth * chip.clock
    return Cost(max(cycles, least), "cycles", "static", spills=sum(kernel.spills for kernel in kernels))


def measured_costs(module: Any, family: str, shape: Any, configs: Sequence[Any]) -> list[Cost]:
    """Costs by time on the default device: the median of rounds in which the candidates take turns."""
    calls, failures = {}, {}
    for index, config in enumerate(configs):
        try:
            calls[index] = _prepared(module, family, shape, config)
        except Exception as error:
            failures[index] = Cost(math.inf, "us", "measured", failure=_first_line(error))
    times = in_turns(list(calls.values()))
    measured = {
        index: Cost(statistics.median(rounds) * 1e6, "us", "measured")
        for index, rounds in zip(calls, times, strict=True)
    }
    return [(measured | failures)[index] for index in range(len(configs))]


def in_turns(calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS, seconds: float = ROUND_SECONDS) -> list[list]:
    """Seconds of one call of each, by round; a round repeats a call until it has lasted about `seconds`.

    Calls are queued without waiting, so that what is timed is the device, as long as a call takes longer there than
    to queue.
    """
    repeats = [max(1, math.ceil(seconds / max(_seconds(call, 3), 1e-7))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for index, call in enumerate(calls):
            times[index].append(_seconds(call, repeats[index]))
    return times


def random_arguments(structs: Any) -> Any:
    """Standard normal numbers for floating arrays, zeros for others."""
    rng = np.random.default_rng(0)

    def make(struct: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(struct.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(struct.shape, np.float32), struct.dtype)
        return jnp.zeros(struct.shape, struct.dtype)

    return jax.tree.map(make, structs)


def _prepared(module: Any, family: str, shape: Any, config: Any) -> Callable[[], Any]:
    """A call of the compiled candidate, which has run once."""
    function, structs = module.build(family, shape, config)
    special = getattr(module, "arguments", None)
    arguments = special(family, shape, config) if special else random_arguments(structs)
    call = functools.partial(jax.jit(function), *arguments)
    jax.block_until_ready(call())
    return call


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / repeats


def _in_child(local: threading.local, arguments: tuple) -> Cost:
    """`static_cost` in this thread's child process, which is made anew when the compiler takes it down."""
    if not hasattr(local, "pool"):
        # The child compiles for devices that it does not have.
        os.environ["JAX_PLATFORMS"] = "cpu"
        local.pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
        return local.pool.submit(static_cost, *arguments).result()
    except BrokenProcessPool:
        local.pool.shutdown()
        del local.pool
        return Cost(math.inf, "cycles", "static", failure="the compiler ended its process")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
