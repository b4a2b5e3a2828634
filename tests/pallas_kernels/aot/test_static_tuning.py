"""The tuner with static cycles, on an example operation; its children compile."""

import argparse
import importlib
import json
import pathlib
import sys

import pytest

from pallas_kernels.tune import __main__ as command
from pallas_kernels.tune import costs, entries

EXAMPLES = pathlib.Path(__file__).parents[1] / "tune"


@pytest.fixture
def products(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("tuning_examples.products.tuning")
    for name in [name for name in sys.modules if name.startswith("tuning_examples")]:
        del sys.modules[name]


def test_fewer_cycles_win_and_are_written(products, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(entries, "FOLDER", tmp_path)
    options = argparse.Namespace(jobs=1, write=True, force=False)
    assert command.tune(products, "v6e", "large", products.Shape(512), options)
    printed = capsys.readouterr().out
    assert "static cycles" in printed
    written = json.loads((tmp_path / "example_product.json").read_text())["v6e"]["square/512"]
    assert written["config"] == {"rows": 512, "repeats": 1}
    assert (written["unit"], written["source"]) == ("cycles", "static")
    assert "libtpu" in written["versions"]
    # Costs rise from line to line, and what fails comes last, with the first line of its error.
    lines = [line.split() for line in printed.splitlines() if "rows=" in line][:4]
    ranked = [float(line[0]) for line in lines[:3]]
    assert ranked == sorted(ranked)
    assert lines[3][0] == "fails"
    assert "second line" not in printed


def test_a_compiler_that_dies_costs_one_candidate(products, monkeypatch):
    monkeypatch.setattr(products, "__name__", "tuning_examples.dying", raising=True)
    configs = [products.Config(rows=0), products.Config(rows=256)]
    found = list(costs.static_costs(products, "v5e", products.Shape(256), configs))
    assert found[0].failure == "the compiler ended its process"
    assert found[1].value > 0
    assert not found[1].failure
