"""The floors of the house: a room imports rooms below it, never above; and nothing loads code from data."""

import ast
import graphlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = (
    (
        "pallas_kernels",
        "davinci_jax",
        "davinci_jax.errors",
        "davinci_jax.files",
        "davinci_jax.text",
        "davinci_jax.experiment",
    ),
    ("davinci_jax.ops",),
    ("davinci_jax.layers", "davinci_jax.sharding"),
    ("davinci_jax.models", "davinci_jax.optimizers"),
    ("davinci_jax.curriculum", "davinci_jax.data", "davinci_jax.curation"),
    ("davinci_jax.evaluation", "davinci_jax.training"),
    ("davinci_jax.science", "davinci_jax.inference"),
    ("davinci_jax.cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OWN = ("davinci_jax", "pallas_kernels")
# What a room may import besides the standard library and the rooms below it; other rooms are free.
LIBRARIES = {
    "pallas_kernels": {"jax", "absl", "numpy"},
    "davinci_jax": set(),
    "davinci_jax.errors": set(),
    "davinci_jax.files": set(),
    "davinci_jax.text": set(),
    "davinci_jax.experiment": set(),
    "davinci_jax.ops": {"jax", "numpy"},
    "davinci_jax.layers": {"jax", "flax", "numpy"},
    "davinci_jax.sharding": {"jax", "numpy"},
}
PICKLING = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch",
    "transformers",
}
MAY_IMPORT_BY_NAME = {
    "davinci_jax.experiment.load",  # a recipe is the user's own program
    "pallas_kernels.tune.operations",  # what lies in the package's own folder of kernels
}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
IMPORTS_BY_NAME = {"import_module", "exec_module", "run_path", "run_module", "load_module"}


def modules():
    """(dotted name, source) of every module of the packages."""
    for package in OWN:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path.read_text()


def room(name):
    """davinci_jax.data.shards -> davinci_jax.data; pallas_kernels is one room."""
    parts = name.split(".")
    return parts[0] if parts[0] == "pallas_kernels" else ".".join(parts[:2])


def imports(name, source, is_package=False):
    """Dotted names that a module imports anywhere, functions and TYPE_CHECKING blocks included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def known_room(imported):
    """The room of an imported name; a name taken from davinci_jax itself, such as its version, is that module."""
    candidate = room(imported)
    return candidate if candidate in FLOOR_OF else imported.split(".")[0]


def upward(name, imported):
    """Sentences on imports that go up, leave the plan of the house, or bring a library that the room does without."""
    own_room = room(name)
    if own_room not in FLOOR_OF:
        return [f"{name} is in no room of the plan"]
    out = []
    for target in sorted(imported):
        library = target.split(".")[0]
        if library in OWN:
            if FLOOR_OF[known_room(target)] > FLOOR_OF[own_room]:
                out.append(f"{name} imports {target} from a floor above")
            if target.startswith("pallas_kernels.kernels") and own_room != "pallas_kernels":
                out.append(f"{name} imports {target}, which pallas_kernels keeps to itself")
        elif own_room in LIBRARIES and library not in LIBRARIES[own_room] | sys.stdlib_module_names:
            out.append(f"{name} imports {target}, which its room does without")
    return out


def unsafe(name, source):
    """Sentences on ways to run code that lies in data."""
    out = []
    for target in imports(name, source):
        if target.split(".")[0] in PICKLING:
            out.append(f"{name} imports {target}")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called.removeprefix("builtins.") in RUNS_CODE:
            out.append(f"{name}:{node.lineno} calls {called}")
        if called.split(".")[-1] in IMPORTS_BY_NAME and name not in MAY_IMPORT_BY_NAME:
            out.append(f"{name}:{node.lineno} calls {called}: only recipes are imported by name")
        pickled = [key for key in node.keywords if key.arg == "allow_pickle"]
        if any(not (isinstance(key.value, ast.Constant) and key.value.value is False) for key in pickled):
            out.append(f"{name}:{node.lineno} allows pickle")
        if any(key.arg == "trust_remote_code" for key in node.keywords):
            out.append(f"{name}:{node.lineno} trusts remote code")
    return out


def all_imports():
    return {name: imports(name, source, (ROOT / name.replace(".", "/")).is_dir()) for name, source in modules()}


def test_every_import_goes_down():
    found = all_imports()
    assert len(found) > 20
    assert [line for name, targets in found.items() for line in upward(name, targets)] == []


@pytest.mark.slow
def test_rooms_of_one_floor_have_no_cycle():
    graph = {}
    for name, targets in all_imports().items():
        below = {known_room(target) for target in targets if target.split(".")[0] in OWN}
        graph.setdefault(room(name), set()).update(below - {room(name), "davinci_jax"})
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_nothing_runs_code_from_data():
    assert [line for name, source in modules() for line in unsafe(name, source)] == []


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("davinci_jax.ops.x", "def f():\n    from davinci_jax import training", "from a floor above"),
        ("davinci_jax.data.x", "import davinci_jax.training.step", "from a floor above"),
        ("davinci_jax.models.x", "from ..data import shards", "from a floor above"),
        ("davinci_jax.layers.x", "import optax", "does without"),
        ("davinci_jax.experiment.x", "import numpy as np", "does without"),
        ("pallas_kernels.x", "from davinci_jax import ops", "from a floor above"),
        ("pallas_kernels.x", "import flax", "does without"),
        ("davinci_jax.ops.x", "from pallas_kernels.kernels import moe", "keeps to itself"),
        ("davinci_jax.cellar.x", "import jax", "no room"),
    ],
)
def test_the_check_notices(name, source, told):
    (line,) = upward(name, imports(name, source))
    assert told in line


def test_the_check_lets_pass():
    sources = {
        "davinci_jax.training.x": "from davinci_jax import __version__, data, ops\nimport orbax.checkpoint as ocp",
        "davinci_jax.data.x": "from davinci_jax.curation import documents",
        "davinci_jax.models.x": "from .decoder import build\nfrom . import cache",
    }
    assert [line for name, source in sources.items() for line in upward(name, imports(name, source))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "def f():\n    import dill",
        "importlib.import_module(name)",
        "spec.loader.exec_module(module)",
        "runpy.run_path(path)",
        "eval('1')",
        "exec(text)",
        "numpy.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_the_safety_check_notices(source):
    assert len(unsafe("davinci_jax.data.x", source)) == 1
    assert unsafe("davinci_jax.data.x", "numpy.load(path, allow_pickle=False)\nre.compile(text)") == []
