"""The TPU attention kernels compile for every family, with the spills recorded here and no copy around the call."""

import dataclasses
import re

import pytest

from pallas_kernels.compiler import aot
from pallas_kernels.kernels.attention import tuning

# Vector registers that the schedules store for want of registers, with the sizes of the table, and a tenth more.
SPILLS = {
    ("v5e", "fwd"): 1150,
    ("v5e", "bwd"): 3950,
    ("v5p", "fwd"): 1600,
    ("v5p", "bwd"): 3900,
    ("v6e", "fwd"): 8000,
    ("v6e", "bwd"): 5400,
    ("tpu7x", "fwd"): 6200,
    ("tpu7x", "bwd"): 5700,
}


def moves(text: str) -> list[str]:
    """Shapes of the four-dimensional half precision arrays that XLA copies, transposes or reshapes."""
    found = re.findall(r"= (bf16\[[\d,]*\])\S* (?:copy|transpose|reshape|copy-start)\(", text)
    return [shape for shape in found if shape.count(",") == 3]


def compiled(family: str, shape: tuning.Shape, config=None):
    function, structs = tuning.build(family, shape, config)
    return aot.compile_for(family, function, *structs)


SMALL = {"length": 1024, "documents": 4}


@pytest.mark.parametrize(
    ("family", "backward"), [("v5e", False), ("v5p", False), ("v6e", False), ("v6e", True), ("tpu7x", False)]
)
def test_small_blocks_compile_without_copies(family, backward):
    shape = tuning.Shape(backward, **SMALL)
    config = shape.kind(256, 256, 256, 256, 16, unroll=1)
    program = compiled(family, shape, config)
    assert program.kernel("attention_").spills <= 400
    assert moves(program.text) == []
    assert tuning.cycles(program, shape, config) > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("name", ["fwd", "bwd"])
def test_recorded_sizes_compile(family, name):
    shape = tuning.shapes()[name]
    program = compiled(family, shape)
    assert program.kernel("attention_").spills <= SPILLS[family, name]
    found = moves(program.text)
    if name == "bwd":  # units of eight query heads write one key head each; XLA puts the two together
        found = [x for x in found if x != "bf16[1,4096,2,128]"]
    assert found == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize(
    "change",
    [{"size": 64}, {"size": 256}, {"heads": 12, "kv_heads": 12}, {"dtype": "float32"}, {"length": 1000}, {"batch": 2}],
    ids=str,
)
def test_other_shapes_compile(family, change):
    for backward in (False, True):
        shape = dataclasses.replace(tuning.Shape(backward, **SMALL), **change)
        assert compiled(family, shape, shape.kind(256, 256, 256, 256)).kernel("attention_")
