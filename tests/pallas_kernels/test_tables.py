"""The recorded block sizes: whole, of known devices, and configs that their operations take."""

import importlib.resources

import pytest

from pallas_kernels import tables
from pallas_kernels.tune import operations

FILES = [file.name for file in importlib.resources.files(tables).iterdir() if file.name.endswith(".json")]
ENTRIES = [
    pytest.param(family, key, entry, id=f"{file.removesuffix('.json')}/{family}/{key}")
    for file in FILES
    for family, by_key in tables.load(file.removesuffix(".json")).items()
    for key, entry in by_key.items()
]


@pytest.mark.parametrize(("family", "key", "entry"), ENTRIES)
def test_entries_say_where_they_come_from(family, key, entry):
    assert family in operations.families()
    assert entry["source"] in ("measured", "static")
    assert entry["unit"] == {"measured": "us", "static": "cycles"}[entry["source"]]
    assert entry["cost"] > 0
    assert "jax" in entry["versions"]


@pytest.mark.parametrize("module", operations.modules(), ids=lambda module: module.OPERATION)
def test_recorded_configs_are_found_and_built(module):
    """The config of a table has the fields of a candidate, and `build` takes it."""
    table = tables.load(module.OPERATION)
    for family, by_key in table.items():
        for shape in module.shapes().values():
            key = module.shape_class(shape)
            candidates = module.candidates(family, shape)
            if key in by_key and candidates:
                recorded = tables.lookup(module.OPERATION, family, key)
                module.build(family, shape, type(candidates[0])(**recorded))


def test_what_is_not_recorded_is_none():
    assert tables.load("no_such_operation") == {}
    assert tables.lookup("no_such_operation", "v5p", "any") is None
