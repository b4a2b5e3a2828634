"""The program that measures kernels on a GPU: what of it needs none."""

import json
import pathlib
import sys

import pytest

from pallas_kernels import tables, target

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import kernels_gpu
import kernels_gpu_checks
from kernels_gpu import Row


def test_without_a_gpu_one_line_says_so(capsys):
    assert kernels_gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "kernels_gpu: no GPU here, jax runs on cpu; --tiny runs anywhere\n"


@pytest.mark.slow
def test_tiny_shapes_are_checked_measured_and_written_down(tmp_path):
    assert kernels_gpu.main(["--tiny", "--only", "loss", "--output", str(tmp_path / "results" / "tiny")]) == 0
    record = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert record["command"].startswith("python benchmarks/kernels_gpu.py --tiny --only loss --output")
    assert record["device"] == "cpu"
    assert [check["right"] for check in record["checks"]] == [True, True]
    assert {row["implementation"] for row in record["rows"]} == {"ours", "xla", "materialised", "products alone"}
    assert all(row["ms"] > 0 and row["tflops"] > 0 for row in record["rows"])
    page = (tmp_path / "results" / "tiny.md").read_text()
    assert "outputs and gradients: ours 1, xla 1." in page
    assert page.count("| cross-entropy, 64 x 32 x 1000 |") == 4


@pytest.mark.slow
def test_a_wrong_kernel_of_ours_is_named_and_fails_the_run(monkeypatch, capsys):
    right = kernels_gpu_checks.loss_float64
    monkeypatch.setattr(kernels_gpu_checks, "loss_float64", lambda *x, **how: right(*x, z_loss=0.3))
    monkeypatch.setattr(kernels_gpu, "loss_rows", lambda sizes: [])
    assert kernels_gpu.main(["--tiny", "--only", "loss"]) == 1
    assert "Wrong: ours, cross-entropy, errors" in capsys.readouterr().out


def row(kind, implementation, ms, tflops=0.0, memory=None, mask="causal"):
    return Row(f"{kind}, 4 x 4096, 16/16 heads of 128, {mask}", implementation, ms, tflops, memory)


def test_aims_are_for_ours_and_beside_the_numbers():
    good, bad = (kernels_gpu.aimed(row("attention forward", "ours", 1.0, rate), 600) for rate in (612.0, 599.0))
    assert (good.aim, good.met, bad.met) == ("600 TFLOP/s", True, False)
    assert kernels_gpu.aimed(row("attention forward", "cudnn", 1.0, 700.0), 600).aim == ""
    for ms, memory, met in ((10.4, 90.0, True), (10.6, 90.0, False), (10.4, 110.0, False)):
        ours, _ = kernels_gpu.beside_materialised(
            [Row("loss", "ours", ms, 1, memory), Row("loss", "materialised", 10.0, 1, 1000.0)]
        )
        assert ours.met is met
    record = {"rows": [vars(good), vars(bad)], "checks": [], "versions": {"jax": "0"}}
    record |= dict.fromkeys(("date", "device", "driver", "host", "command"), "x")
    page = kernels_gpu.markdown(record)
    assert page.count("600 TFLOP/s: reached") == page.count("600 TFLOP/s: missed") == 1


def test_the_order_of_backends_is_recorded_where_auto_looks_for_it(tmp_path, monkeypatch):
    rows = [row("attention forward", "ours", 1.0), row("attention forward", "cudnn", 0.9)]
    rows += [row("attention backward", "ours", 2.0), row("attention backward", "cudnn", 2.5)]
    rows += [
        row("attention forward", name, ms, mask="full") for name, ms in (("ours", 3.0), ("cudnn", 2.0), ("xla", 1.0))
    ]
    rows += [row("attention forward", "ours", 1.0, mask="causal, 8 documents a row")]  # cuDNN failed there
    rows += [Row("routing, 8 tokens, 2 of 64 experts", name, ms) for name, ms in (("ours", 3.0), ("xla", 2.0))]
    file = tmp_path / "attention_backend.json"
    with target.compiling_for(target.H200):
        kernels_gpu.write_tables(rows, tmp_path)
    monkeypatch.setattr(tables, "load", lambda operation: json.loads((tmp_path / f"{operation}.json").read_text()))
    assert tables.lookup("routing_backend", "hopper", "experts64") == {"order": ["xla", "pallas"]}
    assert tables.lookup("attention_backend", "hopper", "head128/causal") == {"order": ["pallas", "cudnn"]}
    assert tables.lookup("attention_backend", "hopper", "head128/full") == {"order": ["cudnn", "pallas"]}
    assert tables.lookup("attention_backend", "hopper", "head128/causal/packed") is None
    assert json.loads(file.read_text())["hopper"]["head128/causal"]["cost"] == 3000.0


def test_flops_count_visible_pairs():
    case = kernels_gpu.Attention(4, 4096, 16, 2, 128, True)
    assert case.flops(backward=False) == 4 * 4 * 16 * 128 * 4096**2 / 2
    assert case.flops(backward=True) == 2.5 * case.flops(backward=False)
    packed = kernels_gpu.Attention(4, 4096, 16, 2, 128, True, documents=8)
    assert packed.flops(backward=False) == case.flops(backward=False) / 8


@pytest.mark.exhaustive
def test_all_of_it_runs_at_tiny_shapes(tmp_path):
    assert kernels_gpu.main(["--tiny", "--output", str(tmp_path / "tiny")]) == 0
    record = json.loads((tmp_path / "tiny.json").read_text())
    right = [check["name"] for check in record["checks"] if check["implementation"] == "xla" and check["right"]]
    assert len(right) == 15
    timed = {row["case"].split(",")[0] for row in record["rows"] if row["ms"] and row["implementation"] == "xla"}
    products = {f"grouped matmul {kind}" for kind in ("y", "dx", "dw")}
    assert timed == {"attention forward", "attention backward", "routing", "cross-entropy"} | products
    reasons = {row["problem"] for row in record["rows"] if row["implementation"] == "ours" and row["problem"]}
    assert reasons == {"there is no kernel for cpu"}
