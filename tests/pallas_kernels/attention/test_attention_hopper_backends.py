"""Which backend a call takes on Hopper: the recorded order, else cuDNN first but for documents; each where it can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import supported, tables, target
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.kernels.attention import api, attention, hopper

pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")


@pytest.fixture
def taken(monkeypatch):
    """Asks which backend a call takes, on an H200 with cuDNN and with `order` recorded."""
    monkeypatch.setattr(api, "_cudnn_found", lambda: True)
    monkeypatch.setattr(api, "_cudnn", lambda q, *_: took.append("cudnn") or q)
    kernel = hopper.forward
    monkeypatch.setattr(hopper, "forward", lambda *x, **how: took.append("pallas") or kernel(*x, **how))
    took: list[str] = []

    def ask(order=None, length=256, size=128, dtype=jnp.bfloat16, kind="causal", on=target.H200, **options):
        recorded = {"hopper": {f"head{size}/{kind}": {"config": {"order": order}}}} if order else {}
        monkeypatch.setattr(tables, "load", lambda operation: recorded if operation == "attention_backend" else {})
        q, k = (jax.ShapeDtypeStruct((2, length, heads, size), dtype) for heads in (4, 2))
        took.clear()
        with target.compiling_for(on):
            jax.eval_shape(lambda q, k: attention(q, k, k, **options), q, k)
        return took[-1] if took else "xla"

    return ask


def test_cudnn_comes_first_where_nothing_is_recorded_and_it_takes_the_case(taken):
    assert taken() == "cudnn"
    assert taken(causal=False) == "cudnn"
    assert taken(soft_cap=30.0) == "pallas"
    assert taken(return_lse=True) == "pallas"
    assert taken(sinks=np.zeros(4, np.float32)) == "pallas"
    assert taken(window=(3, 3), causal=False) == "pallas"
    assert taken(size=256) == "xla"
    assert taken(dtype=jnp.float32) == "xla"


def test_documents_go_to_the_kernel_where_nothing_else_is_recorded(taken):
    segments = np.zeros((2, 256), np.int32)
    assert taken(segment_ids=segments) == "pallas"
    assert taken(segment_ids=segments, causal=False) == "pallas"
    assert taken(["cudnn", "pallas"], kind="causal/packed", segment_ids=segments) == "cudnn"
    other = target.Target("gpu", "NVIDIA A100", cores=108)
    assert taken(on=other, segment_ids=segments) == "cudnn"


def test_what_is_recorded_decides_for_its_kind_of_mask(taken):
    kernel_first = ["pallas", "cudnn"]
    assert taken(kernel_first) == "pallas"
    assert taken(kernel_first, causal=False) == "cudnn"
    assert taken(kernel_first, causal=False, kind="full") == "pallas"
    segments = np.zeros((2, 256), np.int32)
    assert taken(["cudnn", "pallas"], segment_ids=segments) == "pallas"
    assert taken(["cudnn", "pallas"], kind="causal/packed", segment_ids=segments) == "cudnn"
    assert taken(["cudnn", "pallas"]) == "cudnn"
    assert taken(["xla"]) == "xla"


def test_a_named_backend_is_taken_whatever_is_recorded(taken):
    assert taken(["pallas", "cudnn"], backend="cudnn") == "cudnn"
    assert taken(["cudnn", "pallas"], backend="pallas") == "pallas"
    assert taken(backend="xla") == "xla"
    with pytest.raises(UnsupportedError, match="soft cap"):
        taken(backend="cudnn", soft_cap=3.0)
    with pytest.raises(UnsupportedError, match="head size 96"):
        taken(backend="pallas", size=96)


def test_other_gpus_have_cudnn_alone(taken):
    other = target.Target("gpu", "NVIDIA A100", cores=108)
    assert taken(on=other) == "cudnn"
    assert taken(on=other, soft_cap=30.0) == "xla"


def test_without_cudnn_the_kernel_runs_and_the_reason_is_named(taken, monkeypatch):
    monkeypatch.setattr(api, "_cudnn_found", lambda: False)
    assert taken() == "pallas"
    q, k = (jax.ShapeDtypeStruct((1, 64, heads, 64), jnp.bfloat16) for heads in (2, 1))
    with target.compiling_for(target.H200):
        assert supported(attention, q, k, k, backend="cudnn") == "jax finds no cuDNN"
        assert supported(attention, q, k, k, backend="pallas") is None
