"""Compiling for devices that are not there: XLA programs and small Pallas kernels, with what the compiler says."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import target
from pallas_kernels.compiler import aot

TPUS = [name for name in aot.DEVICES if name != "h200"]
SIZE, BLOCK, DEPTH = 1024, 512, 256
MATRIX = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16)
STEPS = (SIZE // BLOCK) ** 2 * (SIZE // DEPTH)


def blocked_matmul(x, w):
    def kernel(x, w, out):
        @pl.when(pl.program_id(2) == 0)
        def start():
            out[...] = jnp.zeros_like(out)

        out[...] += jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    return pl.pallas_call(
        kernel,
        grid=(SIZE // BLOCK, SIZE // BLOCK, SIZE // DEPTH),
        in_specs=[
            pl.BlockSpec((BLOCK, DEPTH), lambda i, j, k: (i, k)),
            pl.BlockSpec((DEPTH, BLOCK), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((BLOCK, BLOCK), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32),
        name="blocked_matmul",
    )(x, w)


@pytest.mark.parametrize("device", TPUS)
def test_tpu_kernel_has_steps_cycles_and_mxu_share(device):
    kernel = aot.compile_for(device, blocked_matmul, MATRIX, MATRIX).kernel("blocked_matmul")
    assert kernel.pallas
    assert kernel.steps == STEPS
    assert kernel.bytes == 2 * 2 * SIZE**2 + 4 * SIZE**2
    assert kernel.spills < 100
    # The multiplications of the schedule are those of the product, at the peak rate of one core.
    chip = aot.DEVICES[device].target
    peak = {"v5e": 197e12 / 1.5e9, "v5p": 459e12 / 1.75e9 / 2, "v6e": 918e12 / 1.75e9, "tpu7x": 1153e12 / 1.9e9}[device]
    assert chip.family == device
    assert kernel.mxu() * kernel.model() == pytest.approx(2 * SIZE**3 / peak, rel=0.2)
    assert kernel.model() > STEPS * kernel.body.cycles


def test_kernels_choose_for_the_device_compiled_for():
    seen = []

    def function(x):
        seen.append(target.current())
        return x + 1

    aot.compile_for("h200", function, MATRIX)
    aot.compile_for("v5p", function, MATRIX)
    assert seen == [target.H200, target.TPU_V5P]


@pytest.mark.parametrize("device", ["v5e", "h200"])
def test_memory_and_donation(device):
    def function(x):
        return x * 2

    kept = aot.compile_for(device, function, MATRIX).memory
    donated = aot.compile_for(device, function, MATRIX, donate=(0,)).memory
    assert kept.arguments == kept.outputs == 2 * SIZE**2
    assert donated.peak == kept.peak - 2 * SIZE**2


@pytest.mark.parametrize("device", ["v5p", "h200"])
def test_collectives_of_a_sharded_program(device):
    mesh = jax.make_mesh((4,), ("data",), devices=aot.devices(device)[:4], axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    compiled = aot.compile_for(device, lambda x: x.sum(0), rows)
    assert "all-reduce" in compiled.text
    assert compiled.memory.arguments == 4 * SIZE**2 // 4


def test_a_program_compiled_again_has_its_report():
    first, again = (aot.compile_for("v5e", blocked_matmul, MATRIX, MATRIX) for _ in range(2))
    assert first.kernels == again.kernels


@pytest.mark.parametrize("device", ["v5e", "h200"])
def test_what_the_compiler_said_is_read_back(device, tmp_path, monkeypatch):
    monkeypatch.setenv(aot.CACHE, str(tmp_path))
    monkeypatch.setattr(aot, "_known", {})

    def function(x, w):
        return blocked_matmul(x + 2, w) if device == "v5e" else x @ w

    made = aot.compile_for(device, function, MATRIX, MATRIX)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".json"
    monkeypatch.setattr(aot, "_known", {})
    monkeypatch.setattr(aot, "_compile", None)
    assert aot.compile_for(device, function, MATRIX, MATRIX) == made
