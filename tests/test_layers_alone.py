"""The lower rooms stand alone: a project that wants a layer gets no trainer with it."""

import functools
import json
import subprocess
import sys

import pytest

TRAINING = {"optax", "orbax", "grain", "array_record", "tensorstore", "tokenizers", "sentencepiece", "safetensors"}
TRAINING |= {"tensorboardX", "matplotlib", "rich", "torch", "transformers"}


@functools.cache
def imported_by(module):
    """Names in sys.modules of a fresh process that imports one module."""
    code = f"import json, sys; import {module}; print(json.dumps(sorted(sys.modules)))"
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "floors"),
    [
        ("davinci_jax.experiment", {"errors", "experiment"}),
        ("davinci_jax.ops", {"errors", "ops"}),
        ("davinci_jax.layers", {"errors", "experiment", "ops", "sharding", "layers"}),
    ],
)
def test_a_room_brings_only_the_rooms_below(module, floors):
    names = imported_by(module)
    own = {name.split(".")[1] for name in names if name.startswith("davinci_jax.")}
    assert own <= floors
    # flax itself brings optax and rich.
    own_libraries = {name.split(".")[0] for name in set(names) - set(imported_by("flax.nnx"))}
    assert own_libraries & TRAINING == set()
    if module == "davinci_jax.experiment":
        assert not {"jax", "numpy"} & set(names)
