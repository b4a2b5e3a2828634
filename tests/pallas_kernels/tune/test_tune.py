"""The tuner's names, tables and timing; static cycles are tested with the compilers, in `aot`."""

import argparse
import dataclasses
import json
import math
import sys
import time
import types

import jax
import pytest
import tuning_examples
from tuning_examples.products import tuning as products

from pallas_kernels import target
from pallas_kernels.errors import ArgumentError
from pallas_kernels.tune import __main__ as command
from pallas_kernels.tune import costs, entries, operations

STATIC = costs.Cost(1000.4, "cycles", "static")
MEASURED = costs.Cost(2.04, "us", "measured")


@dataclasses.dataclass(frozen=True)
class Sleep:
    milliseconds: float


class Sleeping:
    """A tuning module whose candidates differ in how long the host waits, in place of a device."""

    OPERATION = "sleep"

    def candidates(self, family, shape):
        return [Sleep(4), Sleep(1), Sleep(-1)]

    def build(self, family, shape, config):
        if config.milliseconds < 0:
            raise ValueError("time does not run backwards")

        def function(x):
            wait = lambda x: (time.sleep(config.milliseconds / 1e3), x)[1]  # noqa: E731
            return jax.pure_callback(wait, x, x)

        return function, [jax.ShapeDtypeStruct((2,), "float32")]

    def shape_class(self, shape):
        return "any"


def options(**fields):
    return argparse.Namespace(**{"jobs": 1, "write": True, "force": False, **fields})


def test_names_are_found_and_wrong_ones_get_the_nearest():
    assert operations.find("example_product", tuning_examples) is products
    with pytest.raises(ArgumentError, match="did you mean example_product"):
        operations.find("exampel_product", tuning_examples)


@pytest.mark.parametrize("operation", [module.OPERATION for module in operations.modules()])
def test_the_families_of_an_operation_are_those_of_its_kernels(operation):
    expected = ["hopper"] if operation.endswith("hopper") else ["v5e", "v5p", "v6e", "tpu7x"]
    module = operations.find(operation)
    assert operations.families(module) == expected
    for family in expected:
        assert module.candidates(family, next(iter(module.shapes().values())))


@pytest.mark.parametrize(
    ("operation", "families"),
    [
        ("grouped_matmul_tpu", ["v5e", "v5p", "v6e", "tpu7x"]),
        ("grouped_matmul_hopper", ["hopper"]),
        ("attention_tpu", ["v5e", "v5p", "v6e", "tpu7x"]),
        ("cross_entropy", ["v5e", "v5p", "v6e", "tpu7x"]),
    ],
)
def test_an_operation_has_a_module_for_each_kind_of_device(operation, families, capsys):
    assert operations.families(operations.find(operation)) == families
    other = {"v5p", "hopper"}.difference(families).pop()
    assert command.main([operation, "--device", other]) == 2
    assert families[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["atention", "--device", "v5p"], "did you mean attention?"),
        (["attention", "--device", "v5"], "did you mean v5"),
        (["attention", "--device", "v5p", "--shape", "no such"], "--shape"),
        (["attention"], "no such device is here; choose one of v5e, v5p, v6e, tpu7x\n"),
        (
            ["attention", "--device", "hopper"],
            "is hopper, which is not here, and a GPU's cycles are not in its code; run it on a machine with the GPU",
        ),
        (["attention", "--device", "v5p", "--jobs", "0"], "`--jobs` is 0; give at least 1"),
        (["attention", "--device", "v6e"], "`--device` is v6e, which is not here and cannot be compiled for without"),
    ],
)
def test_one_line_for_what_cannot_be(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(operations.find, "__defaults__", (_renamed("attention"),))
    monkeypatch.setitem(sys.modules, "libtpu", None)  # as where it is not installed
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_without_a_device_none_is_offered_that_cannot_be_tuned_for(capsys):
    assert command.main(["attention_hopper"]) == 2
    assert capsys.readouterr().err.endswith("run it on a machine with the GPU\n")


def _renamed(name):
    """The examples' package; its operation is called `name` while the test runs."""
    products.OPERATION = name
    return tuning_examples


@pytest.fixture(autouse=True)
def keep_name():
    before = products.OPERATION
    yield
    products.OPERATION = before


def test_where_the_device_is_here_time_decides(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(entries, "FOLDER", tmp_path)
    monkeypatch.setattr(costs, "ROUND_SECONDS", 0.01)
    with target.compiling_for(target.TPU_V6E):
        assert command.tune(Sleeping(), "v6e", "any", None, options())
    written = json.loads((tmp_path / "sleep.json").read_text())["v6e"]["any"]
    assert written["config"] == {"milliseconds": 1}
    assert (written["unit"], written["source"]) == ("us", "measured")
    assert 1000 <= written["cost"] < 100_000
    assert "ValueError: time does not run backwards" in capsys.readouterr().out


def test_static_never_replaces_measured_unless_forced(tmp_path):
    def write(config, cost, **keywords):
        return entries.write("op", "v5p", "key", entries.entry(config, cost), folder=tmp_path, **keywords)

    def config():
        return json.loads((tmp_path / "op.json").read_text())["v5p"]["key"]["config"]["milliseconds"]

    assert write(Sleep(1), STATIC)
    assert write(Sleep(2), MEASURED)
    assert not write(Sleep(3), STATIC)
    assert config() == 2
    assert write(Sleep(4), MEASURED)
    assert write(Sleep(5), STATIC, force=True)
    assert config() == 5


def test_writing_keeps_other_entries(tmp_path):
    for family in ("v5p", "v6e"):
        for key in ("a", "b"):
            entries.write("op", family, key, entries.entry(Sleep(1), STATIC), folder=tmp_path)
    table = json.loads((tmp_path / "op.json").read_text())
    assert {family: sorted(table[family]) for family in table} == {"v5p": ["a", "b"], "v6e": ["a", "b"]}
    assert [file.name for file in tmp_path.iterdir()] == ["op.json"]


def test_without_write_the_table_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "FOLDER", tmp_path)
    monkeypatch.setattr(costs, "ROUND_SECONDS", 0.001)
    with target.compiling_for(target.TPU_V6E):
        assert command.tune(Sleeping(), "v6e", "any", None, options(write=False))
    assert list(tmp_path.iterdir()) == []


def test_rounds_take_turns():
    order = []
    costs.in_turns([lambda: order.append("a"), lambda: order.append("b")], rounds=3, seconds=1e-9)
    assert "".join(order[6:]) == "ababab"


def test_a_candidate_whose_cycles_cannot_be_counted_says_so(monkeypatch):
    def cycles(compiled, shape, config):
        raise LookupError("kernel.1: the trips of loop 7 hang on data: give them")

    module = types.SimpleNamespace(build=lambda *_: (None, []), cycles=cycles)
    monkeypatch.setattr(costs.operations, "load", lambda name: module)
    monkeypatch.setattr(costs.aot, "compile_for", lambda *_: types.SimpleNamespace(kernels=()))
    found = costs.static_cost("any", "v5e", None, None)
    assert found.value == math.inf
    assert (
        found.failure == "cycles cannot be counted: LookupError: kernel.1: the trips of loop 7 hang on data: give them"
    )
