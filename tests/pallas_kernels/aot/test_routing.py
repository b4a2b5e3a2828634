"""The routing kernels compile for every TPU, with schedules that are short beside XLA's sort, and for Hopper."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import route
from pallas_kernels.compiler import aot

NAMES = "routing_select", "routing_counts", "routing_places"
SPILLS = 64  # vector registers stored for want of registers, and some more, with 128 experts


def compiled(family, tokens, experts, **options):
    def run(logits, bias):
        return route(logits, top_k=8, score="sigmoid", bias=bias, **options)[:5]

    arguments = jax.ShapeDtypeStruct((tokens, experts), jnp.float32), jax.ShapeDtypeStruct((experts,), jnp.float32)
    return aot.compile_for(family, run, *arguments)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["v5e", "v5p", "v6e", "tpu7x"])
def test_kernels_compile_and_take_few_cycles(family):
    """Cycles for each token: XLA's sort of its 128 scores alone takes about 18 on v6e, its order by expert over 90."""
    kernels = [compiled(family, 16384, 128).kernel(name) for name in NAMES]
    assert max(kernel.spills for kernel in kernels) <= SPILLS
    assert sum(kernel.model() for kernel in kernels) < 10 * 16384


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("experts", "options"),
    [(64, {"threshold": 0.5}), (256, {"groups": (8, 4)}), (64, {"capacity": 3000})],
    ids=["64, threshold", "256, groups", "64, capacity"],
)
def test_other_cases_compile(experts, options):
    program = compiled("v6e", 16000, experts, **options)
    assert all(program.kernel(name) for name in NAMES)


@pytest.mark.exhaustive
def test_each_chip_chooses_for_its_own_tokens():
    """What moves between chips is the choice, not the logits."""
    mesh = Mesh(np.array(aot.devices("v6e")), ("data",), axis_types=(AxisType.Explicit,))
    rows = NamedSharding(mesh, PartitionSpec("data", None))
    logits = jax.ShapeDtypeStruct((4096, 64), jnp.float32, sharding=rows)
    program = aot.compile_for("v6e", lambda x: route(x, top_k=8)[:5], logits)
    assert program.kernel("routing_select")
    assert re.findall(r"= (\w+)\S+ all-gather", program.text) == ["s32"]


@pytest.mark.parametrize(
    ("experts", "options", "spilled"),
    [
        (64, {}, 0),
        pytest.param(128, {"threshold": 0.5}, 0, marks=pytest.mark.exhaustive),
        pytest.param(64, {"groups": (1, 1)}, 0, marks=pytest.mark.exhaustive),
        pytest.param(256, {"groups": (8, 4), "capacity": 800}, 480, marks=pytest.mark.exhaustive),
        pytest.param(256, {"groups": (32, 4)}, 480, marks=pytest.mark.exhaustive),
    ],
)
def test_hopper_kernels_spill_nothing_up_to_128_experts(experts, options, spilled):
    """Bytes of a thread: with 256 experts scores with and without bias are 256 registers, all that there are."""
    select, ranks = compiled("h200", 16384, experts, backend="pallas", **options).kernels
    assert (select.name, ranks.name) == ("routing_select_mosaic_gpu_kernel", "routing_ranks_mosaic_gpu_kernel")
    assert select.spill_stores <= spilled
    assert ranks.spill_stores == 0


def test_kernels_that_another_program_has_are_reported_again():
    """jax compiles a kernel for Hopper once in a process, in whatever program, and dumps nothing the second time."""
    logits = jax.ShapeDtypeStruct((128, 64), jnp.float32)

    def run(x, factor):
        return route(factor * x, top_k=2, backend="pallas")[:5]

    once, again = (aot.compile_for("h200", lambda x, f=f: run(x, f), logits).kernels for f in (1, 3))
    assert again == once
    assert [kernel.name.split("_mosaic")[0] for kernel in again] == ["routing_select", "routing_ranks"]
