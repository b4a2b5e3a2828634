"""The package stands alone: what importing it brings in, and what its public functions say of themselves."""

import inspect
import pathlib
import subprocess
import sys
import tomllib

import davinci_jax
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


def test_the_folder_is_a_distribution_of_all_its_packages():
    folder = pathlib.Path(pallas_kernels.__file__).parent
    told = tomllib.loads((folder / "pyproject.toml").read_text())
    built = (folder / "build", folder / "pallas_kernels.egg-info")  # what an installation leaves
    files = [file for file in folder.rglob("*") if file.is_file() and not any(map(file.is_relative_to, built))]
    homes = (file.parent.relative_to(folder.parent) for file in files if file.name == "__init__.py")
    packages = sorted(".".join(home.parts) for home in homes)
    assert told["tool"]["setuptools"]["packages"] == packages
    assert told["project"]["version"] == davinci_jax.__version__
    assert [one.split(">")[0] for one in told["project"]["dependencies"]] == ["jax"]
    endings = {file.suffix for file in files} - {".py", ".pyc", ".toml"}
    assert {f"**/*{ending}" for ending in endings} == set(told["tool"]["setuptools"]["package-data"]["pallas_kernels"])
