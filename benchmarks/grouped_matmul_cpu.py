"""Grouped matmul on this CPU: `pallas_kernels.grouped_matmul` against `jax.lax.ragged_dot`, taken in turns.

Forward, and forward with both gradients; sizes of groups vary as a nearly balanced router leaves them. Times are
medians over rounds of one call each, in which the two sides alternate; the processor time of a call is given too, which
other load on the machine changes less. `dense` is one product of the same rows with a single matrix: what no grouped
product can beat.

  python benchmarks/grouped_matmul_cpu.py --output benchmarks/results/grouped_matmul_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kernels.grouped_matmul import grouped_matmul

# rows, depth, columns, groups
SHAPES = {"small": (2048, 256, 128, 8), "16 experts": (4096, 256, 128, 16), "64 experts": (4096, 512, 256, 64)}


def sides(shape: tuple[int, int, int, int], dtype: str) -> dict[str, tuple]:
    """Compiled functions by name, each with its arguments."""
    rows, depth, columns, groups = shape
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((rows, depth), (groups, depth, columns)))
    dy = jnp.asarray(rng.standard_normal((rows, columns)), dtype)
    sizes = jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(groups, 25.0))), jnp.int32)

    def ragged(x, w):
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32).astype(x.dtype)

    def dense(x, w):
        return jnp.dot(x, w[0], preferred_element_type=jnp.float32).astype(x.dtype)

    def ours(x, w):
        return grouped_matmul(x, w, sizes)

    def gradients(function):
        return lambda x, w: jax.vjp(function, x, w)[1](dy)

    found = {"ours": ours, "ragged_dot": ragged, "dense": dense}
    compiled = {name: (jax.jit(function), (x, w)) for name, function in found.items()}
    with_gradients = {f"{name}, gradients": (jax.jit(gradients(f)), (x, w)) for name, f in found.items()}
    return compiled | with_gradients


def measure(function, arguments) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    results = []
    for dtype in ("float32", "bfloat16"):
        for name, shape in SHAPES.items():
            calls = sides(shape, dtype)
            for call in calls.values():
                measure(*call)  # compiles
            times = {side: [] for side in calls}
            for _ in range(args.rounds):
                for side, call in calls.items():
                    times[side].append(measure(*call))
            entry = {"shape": name, "rows_depth_columns_groups": shape, "dtype": dtype, "sides": {}}
            for side, rounds in times.items():
                wall, processor = (statistics.median(column) for column in zip(*rounds, strict=True))
                entry["sides"][side] = {"milliseconds": wall * 1e3, "processor_milliseconds": processor * 1e3}
                print(f"{dtype:9} {name:11} {side:22} {wall * 1e3:9.2f} ms  processor {processor * 1e3:9.2f} ms")
            results.append(entry)
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    machine = {"cores": os.cpu_count(), "load_average": os.getloadavg()}
    result = {"command": " ".join(["python", *sys.argv]), "results": results, "machine": machine, "versions": versions}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
