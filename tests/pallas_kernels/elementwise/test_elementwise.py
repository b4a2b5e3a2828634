"""rms_norm, swiglu and rope against float64 NumPy: values, gradients in closed form, vmap, meshes, remat, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import ArgumentError, UnsupportedError, rms_norm, rope, supported, swiglu

EPS = 1e-3
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2, jnp.float16: 1e-3}


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


def norm_reference(x, scale, dout):
    """(out, dx, dscale)"""
    size = np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    inward = (dout * scale * x).mean(-1, keepdims=True)
    dx = dout * scale / size - x * inward / size**3
    return x / size * scale, dx, (dout * x / size).reshape(-1, x.shape[-1]).sum(0)


def swiglu_reference(gate, up, dout):
    """(out, dgate, dup)"""
    sigmoid = 1 / (1 + np.exp(-gate))
    return gate * sigmoid * up, dout * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), dout * gate * sigmoid


def rope_reference(x, angles, dout):
    """(out, dx) for angles [..., T, K / 2], as products of complex numbers."""

    def turn(x, angles):
        half = x.shape[-1] // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[..., None, :]
        return np.concatenate((turned.real, turned.imag), -1)

    return turn(x, angles), turn(dout, -angles)


def case(name, leading=(3, 5)):
    """(function of arrays, arrays, cotangent, reference of arrays and cotangent)"""
    if name == "rms_norm":
        x, scale, dout = arrays((*leading, 16), 16, (*leading, 16))
        return lambda x, scale: rms_norm(x, scale, EPS), (x, scale), dout, norm_reference
    if name == "swiglu":
        gate, up, dout = arrays(*[(*leading, 16)] * 3)
        return swiglu, (3 * gate, up), dout, swiglu_reference
    x, angles, dout = arrays((*leading, 2, 8), (*leading, 4), (*leading, 2, 8))
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    return lambda x: rope(x, cos, sin), (x,), dout, lambda x, dout: rope_reference(x, angles, dout)


def close(got, want, dtype=jnp.float32):
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * np.abs(want).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope"])
def test_values_and_gradients_equal_the_reference(name, dtype):
    function, inputs, dout, reference = case(name)
    inputs, dout = [jnp.asarray(x, dtype) for x in inputs], jnp.asarray(dout, dtype)

    @jax.jit
    def run(dout, *inputs):
        out, pullback = jax.vjp(function, *inputs)
        return out, *pullback(dout)

    wants = reference(*(np.asarray(x, np.float64) for x in (*inputs, dout)))
    for got, want in zip(run(dout, *inputs), wants, strict=True):
        assert got.dtype == dtype
        close(got, want, dtype)


def test_float32_parameters_of_bfloat16_states_get_float32_gradients():
    (x, scale), dout = case("rms_norm")[1:3]
    x, dout = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dout, jnp.bfloat16)
    _, dscale = jax.vjp(rms_norm, x, jnp.asarray(scale, jnp.float32))[1](dout)
    assert dscale.dtype == jnp.float32


def test_squares_do_not_overflow_float16():
    assert np.isfinite(rms_norm(jnp.full((4,), 300, jnp.float16), jnp.ones(4, jnp.float16))).all()


def test_large_gates_neither_overflow_nor_lose_their_gradient():
    gate = jnp.asarray([-200.0, -90.0, 0.0, 90.0, 200.0])
    dgate = jax.grad(lambda gate: swiglu(gate, jnp.ones(5)).sum())(gate)
    np.testing.assert_allclose(dgate, [0, 0, 0.5, 1, 1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope"])
def test_vmap_of_the_gradient(name):
    function, (x, *rest), dout, _ = case(name, (4, 3, 5))
    if name == "rope":
        cos, sin = (jnp.asarray(f(arrays((4, 3, 5, 4))[0]), jnp.float32) for f in (np.cos, np.sin))
        rest, function = [cos, sin], rope

    def gradient(x, dout, *rest):
        return jax.vjp(lambda x: function(x, *rest), x)[1](dout)[0]

    inputs = [jnp.asarray(a, jnp.float32) for a in (x, dout, *rest)]
    axes = [None if a.ndim == 1 else 0 for a in inputs]
    mapped, alone = jax.jit(jax.vmap(gradient, axes))(*inputs), jax.jit(gradient)
    for n in range(4):
        one = alone(*(a if axis is None else a[n] for a, axis in zip(inputs, axes, strict=True)))
        np.testing.assert_allclose(mapped[n], one, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope"])
def test_rows_divided_over_a_mesh(name, axis_type):
    function, inputs, dout, reference = case(name, (4, 6))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    wants = reference(*inputs, dout)
    with jax.set_mesh(mesh):
        if name == "rope":
            angles = arrays((4, 6, 2, 8), (4, 6, 4))[1]
            inputs, function = (inputs[0], np.cos(angles), np.sin(angles)), rope

        def place(x):
            spec = P() if x.ndim == 1 else P("a", "b")
            return jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, spec))

        def run(dout, *inputs):
            out, pullback = jax.vjp(function, *inputs)
            return out, *pullback(dout)

        run = jax.jit(run)
        placed = [place(x) for x in (dout, *inputs)]
        got = run(*placed)
        assert "all-gather" not in run.lower(*placed).compile().as_text()
    for each, want in zip(got[: len(wants)], wants, strict=True):
        close(each, want)


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("rms_norm", (P("a"), P("b"))),
        ("rms_norm", (P("a", None, "b"), P())),
        ("rms_norm", (P(), P("a"))),
        ("swiglu", (P("a"), P(None, "b"))),
        ("swiglu", (P(), P("a"))),
        ("rope", (P(), P("a"), P(None, None, "b"))),
        ("rope", (P("a"), P(None, "b"), P("b"))),
        ("rope", (P(None, None, "b"), P("b"), P())),
    ],
)
def test_arguments_in_unlike_layouts_over_explicit_axes(name, layouts):
    function, inputs, dout, reference = case(name, (4, 6))
    wants = reference(*inputs, dout)
    if name == "rope":
        angles = arrays((4, 6, 2, 8), (4, 6, 4))[1]
        inputs, function = (inputs[0], np.cos(angles), np.sin(angles)), rope
    with jax.set_mesh(jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)):
        placed = [jax.device_put(jnp.asarray(x, jnp.float32), spec) for x, spec in zip(inputs, layouts, strict=True)]
        out, pullback = jax.vjp(jax.jit(function), *placed)
        got = out, *pullback(jax.device_put(jnp.asarray(dout, jnp.float32), jax.typeof(out).sharding.spec))
    assert jax.typeof(out).sharding.spec == jax.typeof(placed[0]).sharding.spec
    for gradient, like in zip(got[1:], placed, strict=True):
        assert jax.typeof(gradient).sharding.spec == jax.typeof(like).sharding.spec
    for each, want in zip(got[: len(wants)], wants, strict=True):
        close(each, want)


@pytest.mark.slow
def test_inside_shard_map_the_gradient_of_the_scale_is_that_of_all_rows():
    function, (x, scale), dout, reference = case("rms_norm", (8, 3))
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(function, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))
    inputs = [jnp.asarray(a, jnp.float32) for a in (x, scale)]
    out, pullback = jax.vjp(run, *inputs)
    for got, want in zip((out, *pullback(jnp.asarray(dout, jnp.float32))), reference(x, scale, dout), strict=True):
        close(got, want)


@pytest.mark.parametrize(("name", "kept"), [("rms_norm", 4 / 16), ("swiglu", 0), ("rope", 0)])
def test_the_backward_pass_keeps_little_beside_the_arguments(name, kept):
    function, inputs, _, _ = case(name)
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    program = jax.make_jaxpr(lambda *inputs: jax.vjp(function, *inputs))(*inputs)
    own = {id(var): var for var in program.jaxpr.outvars[1:] if var not in program.jaxpr.invars}
    arrays_kept = [var.aval for var in own.values() if var not in program.jaxpr.constvars]
    assert sum(a.size * a.dtype.itemsize for a in arrays_kept if a.ndim) == kept * inputs[0].size


@pytest.mark.parametrize(
    ("name", "residual"),
    [("rms_norm", "rms_norm_out"), ("rms_norm", "rms_norm_inverse"), ("swiglu", "swiglu_out"), ("rope", "rope_out")],
)
def test_remat_policies_can_keep_what_is_named(name, residual, capsys):
    function, inputs, _, _ = case(name)
    inputs = [jnp.asarray(x, jnp.float32) for x in inputs]
    policy = jax.checkpoint_policies.save_only_these_names(residual)
    run = jax.checkpoint(lambda *inputs: jnp.square(function(*inputs)), policy=policy)
    jax.ad_checkpoint.print_saved_residuals(run, *inputs)
    assert f"named '{residual}'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: rms_norm(jnp.ones((2, 4)), jnp.ones(3)), "scale"),
        (lambda: rms_norm(jnp.ones((2, 4), int), jnp.ones(4)), "x"),
        (lambda: rms_norm(jnp.ones((2, 4)), jnp.ones(4), -1.0), "eps"),
        (lambda: rms_norm(jnp.ones((2, 4)), jnp.ones(4), np.nan), "eps"),
        (lambda: rms_norm(jnp.ones((2, 4)), jnp.ones(4), "1"), "eps"),
        (lambda: swiglu(jnp.ones(4), jnp.ones(5)), "up"),
        (lambda: swiglu(jnp.ones(4), jnp.ones(4), backend="cuda"), "backend"),
        (lambda: rms_norm(jnp.ones((2, 4)), jnp.ones(4), np.inf), "eps"),
        (lambda: rms_norm([[1.0, 2.0]], jnp.ones(2)), "x"),
        (lambda: rms_norm(jnp.ones((2, 4)), None), "scale"),
        (lambda: swiglu(jnp.ones(2), [1.0, 2.0]), "up"),
        (lambda: rope(jnp.ones((5, 2, 8)), None, jnp.ones((5, 4))), "cos"),
        (lambda: rms_norm(jnp.ones((2, 4)), jnp.ones(4), config=8), "config"),
        (lambda: swiglu(jnp.ones(4), jnp.ones(4), config=8), "config"),
        (lambda: rope(jnp.ones((5, 2, 8)), jnp.ones((5, 4)), jnp.ones((5, 4)), config=8), "config"),
        (lambda: rope(jnp.ones((5, 2, 7)), jnp.ones((5, 3)), jnp.ones((5, 3))), "x"),
        (lambda: rope(jnp.ones((5, 2, 8)), jnp.ones((5, 4)), jnp.ones((4, 4))), "sin"),
    ],
)
def test_bad_arguments_are_named(call, argument):
    with pytest.raises(ArgumentError) as error:
        call()
    assert error.value.argument == argument


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope"])
def test_a_config_of_none_is_taken(name):
    inputs = case(name)[1]
    inputs = (*inputs, *arrays((3, 5, 4), (3, 5, 4))) if name == "rope" else inputs
    function = {"rms_norm": rms_norm, "swiglu": swiglu, "rope": rope}[name]
    np.testing.assert_array_equal(function(*inputs, config=None), function(*inputs))


def test_numbers_of_numpy():
    x = jnp.arange(8.0).reshape(2, 4)
    for eps in (np.float32(0.5), np.float64(0.5), np.int32(1)):
        close(rms_norm(x, jnp.ones(4), eps), np.asarray(rms_norm(x, jnp.ones(4), float(eps)), np.float64))


def test_there_is_no_kernel_and_it_says_so():
    with pytest.raises(UnsupportedError, match="xla"):
        swiglu(jnp.ones(4), jnp.ones(4), backend="pallas")
    assert supported(rms_norm, jnp.ones((2, 4)), jnp.ones(4))
    assert supported(rms_norm, jnp.ones((2, 4)), jnp.ones(4), backend="xla") is None
