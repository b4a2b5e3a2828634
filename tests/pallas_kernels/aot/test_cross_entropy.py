"""linear_cross_entropy compiles with a vocabulary of 151,936, in a small share of the memory of materialised logits."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import linear_cross_entropy
from pallas_kernels.compiler import aot
from pallas_kernels.kernels.cross_entropy import TpuCrossEntropyConfig, tuning

TOKENS, HIDDEN, VOCABULARY = 4096, 2048, 151936
# Vector registers that the schedules store for want of registers, with the sizes of the table, and a tenth more.
SPILLS = {"v5e": 6600, "v5p": 6600, "v6e": 8900, "tpu7x": 6600}


def gradients(x, w, labels):
    return jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, labels)[0], argnums=(0, 1))(x, w)


def materialised(x, w, labels):
    def loss(x, w):
        logits = jnp.einsum("nd,vd->nv", x, w, preferred_element_type=jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    return jax.value_and_grad(loss, argnums=(0, 1))(x, w)


def structs(tokens, vocabulary=VOCABULARY):
    return (
        jax.ShapeDtypeStruct((tokens, HIDDEN), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocabulary, HIDDEN), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )


def forward(x, w, labels):
    return linear_cross_entropy(x, w, labels)[1].log_probs


def test_small_blocks_compile_for_v6e():
    config = TpuCrossEntropyConfig(128, 128, 128, 128, 128)

    def small(x, w, labels):
        run = lambda x, w: linear_cross_entropy(x, w, labels, soft_cap=30.0, config=config)[0]  # noqa: E731
        return jax.grad(run, argnums=(0, 1))(x, w)

    arguments = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((128, 256), jnp.bfloat16), ((1000, 256), jnp.float32), ((128,), jnp.int32))
    ]
    program = aot.compile_for("v6e", small, *arguments)
    assert program.kernel("cross_entropy_logits").spills + program.kernel("cross_entropy_gradients").spills <= 400


@pytest.mark.exhaustive
def test_evaluation_holds_no_logits():
    program = aot.compile_for("v6e", forward, *structs(TOKENS))
    assert program.kernel("cross_entropy_logits").spills <= SPILLS["v6e"]
    assert program.memory.temporary < TOKENS * VOCABULARY * 4 / 100


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["v5e", "v5p", "v6e", "tpu7x"])
def test_training_on_tpus(family):
    program = aot.compile_for(family, gradients, *structs(2048))
    assert max(program.kernel(f"cross_entropy_{name}").spills for name in ("logits", "gradients")) <= SPILLS[family]


@pytest.mark.exhaustive
def test_training_holds_the_logits_of_one_chunk():
    """Beside them the gradient of the head, in float32; in small blocks, which compile quickly."""
    tokens, config = 4 * TOKENS, TpuCrossEntropyConfig(1024, 128, 128, 128, 128)

    def run(x, w, labels):
        return jax.grad(lambda x, w: linear_cross_entropy(x, w, labels, config=config)[0], argnums=(0, 1))(x, w)

    held = aot.compile_for("v6e", run, *structs(tokens)).memory.temporary
    assert held < 4 * VOCABULARY * (1024 + HIDDEN) + 2**28
    assert held < 4 * tokens * VOCABULARY / 4


@pytest.mark.exhaustive
def test_static_cycles_leave_little_beside_the_three_products():
    """On both cores of v5p, with the first sizes the tuner tries."""
    shape = tuning.shapes()["hidden2048"]
    config = tuning.candidates("v5p", shape)[0]
    function, arguments = tuning.build("v5p", shape, config)
    cycles = tuning.cycles(aot.compile_for("v5p", function, *arguments), shape, config)
    assert cycles / 1.75e9 < 1.1 * 3 * 2 * shape.tokens * shape.hidden * shape.vocabulary / 459e12


def test_h200_takes_under_a_tenth_of_the_memory_of_materialised_logits():
    arguments = structs(32768)
    ours, whole = (aot.compile_for("h200", run, *arguments).memory.temporary for run in (gradients, materialised))
    assert ours < 0.1 * whole
