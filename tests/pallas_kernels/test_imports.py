"""The package stands alone: what importing it brings in, and what its public functions say of themselves."""

import inspect
import subprocess
import sys

import pallas_kernels


def test_importing_needs_jax_alone():
    code = "import sys, pallas_kernels; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pallas_kernels" in loaded
    assert {"flax", "davinci_jax", "absl", "optax"} & set(loaded) == set()


def test_public_functions_have_documentation():
    public = {name: value for name, value in vars(pallas_kernels).items() if not name.startswith("_")}
    functions = {name: value for name, value in public.items() if inspect.isroutine(value) or inspect.isclass(value)}
    bare = [name for name, value in functions.items() if not inspect.getdoc(value)]
    assert bare == []
    for name, function in functions.items():
        if inspect.isfunction(function) and "backend" in inspect.signature(function).parameters:
            assert "Args:" in function.__doc__, name
