"""What a program is traced for."""

import builtins
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import grouped_matmul, linear_cross_entropy, route, supported, target

SHAPES = (((256, 128), jnp.bfloat16), ((512, 128), jnp.bfloat16), ((256,), jnp.int32))


@pytest.fixture
def devices(monkeypatch):
    """A machine with a GPU, which jax takes by default, and a CPU."""
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", core_count=132)
    cpu = types.SimpleNamespace(platform="cpu", device_kind="cpu")
    monkeypatch.setattr(jax, "devices", lambda platform=None: {None: [gpu, cpu], "gpu": [gpu], "cpu": [cpu]}[platform])
    return gpu, cpu


def test_the_default_device_is_the_target(devices):
    assert target.current() == target.H200
    with jax.default_device("cpu"):
        assert target.current() == target.Target("cpu", "cpu")
        with target.compiling_for(target.TPU_V5P):
            assert target.current() == target.TPU_V5P
    assert target.current() == target.H200


def test_a_device_object_may_be_the_default(monkeypatch):
    real = jax.devices()[-1]
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("another device is asked"))
    with jax.default_device(real):
        assert target.current() == target.Target("cpu", "cpu")


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("TPU v4", "other"),
        ("NVIDIA H100 80GB HBM3", "hopper"),
        ("NVIDIA A100-SXM4-80GB", "other"),
    ],
)
def test_kinds_of_devices_fall_into_families(kind, family):
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    device = target.Target(platform, kind)
    assert device.family == family
    assert (family in target.VMEM) == (platform == "tpu" and family != "other")
    missing = None if family != "other" else f"there is no kernel for {kind}"
    assert device.lacks_kernels("tpu", "gpu") == device.lacks_kernels(platform) == missing
    assert device.lacks_kernels("cpu") == f"there is no kernel for {kind}"


def test_without_absl_hopper_has_no_kernels(monkeypatch):
    normal = builtins.__import__

    def without_absl(name, *args, **kwargs):
        if "mosaic_gpu" in (args[2] or ()):
            raise ModuleNotFoundError("No module named 'absl'", name="absl")
        return normal(name, *args, **kwargs)

    logits = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    x, w, sizes = (
        jax.ShapeDtypeStruct(*s) for s in (((256, 128), "bfloat16"), ((3, 128, 128), "bfloat16"), ((3,), "int32"))
    )
    with target.compiling_for(target.H200):
        assert supported(route, logits, top_k=2) is None is supported(grouped_matmul, x, w, sizes)
        monkeypatch.setattr(builtins, "__import__", without_absl)
        assert "absl-py" in supported(route, logits, top_k=2)
        assert "absl-py" in supported(grouped_matmul, x, w, sizes)


def test_kernels_of_tpus_are_not_taken_where_axes_are_automatic():
    x, w, labels = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in SHAPES)

    def why():
        return supported(linear_cross_entropy, x, w, labels)

    with target.compiling_for(target.TPU_V5P):
        with jax.set_mesh(jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))):
            assert "over automatic mesh axes" in why()
            specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
            inside = jax.shard_map(lambda: jnp.asarray(why() is None), **specs)
            assert inside()
        with jax.set_mesh(jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,))):
            assert why() is None
        with jax.set_mesh(jax.make_mesh((2,), ("a",), axis_types=(AxisType.Explicit,))):
            assert why() is None
    with target.compiling_for(target.H200), jax.set_mesh(jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))):
        assert target.current().lacks_kernels("gpu") is None  # there the partitioner gets a rule
