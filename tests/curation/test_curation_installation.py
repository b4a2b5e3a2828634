"""Curation of the Python installation that runs the tests."""

import collections
import dataclasses
import gzip
import json
import pathlib

import pytest
from rich.console import Console

from davinci_jax.curation import installation
from davinci_jax.curation.installation import find_package
from davinci_jax.curation.recipes import builtin_sources
from davinci_jax.curation.run import curate
from davinci_jax.errors import DataError
from davinci_jax.experiment import load_config

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs/quickstart.py")


@pytest.mark.slow
def test_packages_are_found_without_importing_them():
    python, numpy = find_package("python"), find_package("numpy")
    assert (python.root / "os.py").is_file()
    paths = dict(python.files())
    assert "json/decoder.py" in paths
    assert not any("site-packages" in path or path.startswith("_sysconfigdata") for path in paths)
    assert (numpy.root / "__init__.py").is_file()
    assert "BSD" in numpy.licence
    with pytest.raises(DataError, match="pip install no_such_package"):
        find_package("no_such_package")


def quickstart(root):
    """What the quickstart curates, below another root."""
    experiment = load_config(CONFIG)
    return builtin_sources(dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, root=str(root))))


def check_documents(results):
    """Every document is in order; a file, its docstrings and their examples are one group, so held out together."""
    groups = collections.defaultdict(set)
    for result in results:
        identities = set()
        files = sorted((result.folder / "documents").iterdir())
        for document in (
            json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()
        ):
            identities.add(document["id"])
            groups[document["group"]].add(result.source)
            assert document["level"] == "L2"
            for start, end in document.get("questions", ()):
                question = document["text"][start:end]
                assert question.startswith("Question:\n>>> ")
                assert question.endswith("\nAnswer:\n")
        assert len(identities) == result.funnel["documents"]
    assert groups["python/heapq.py"] >= {"python-source", "python-docs"}
    assert groups["numpy/lib/_function_base_impl.py"] == {"scientific-docs", "doctest-qa"}


@pytest.mark.slow
def test_the_quickstart_takes_text_of_this_machine(tmp_path, monkeypatch):
    """A few of the files; all of them in the next test."""
    pytest.importorskip("scipy")
    few = ("heapq.py", "json/", "pydoc", "lib/_function_base_impl.py", "special/_basic.py")
    all_files = installation.Package.files
    monkeypatch.setattr(
        installation.Package, "files", lambda self: (file for file in all_files(self) if file[0].startswith(few))
    )
    config = dataclasses.replace(quickstart(tmp_path), workers=1)
    results = curate(config, Console(quiet=True))
    check_documents(results)
    assert sum(result.funnel.get("pairs", 0) for result in results) > 100
    assert all(result.built is False for result in curate(config, Console(quiet=True)))


@pytest.mark.exhaustive
def test_the_quickstart_finds_its_text_on_this_machine(tmp_path):
    pytest.importorskip("scipy")
    results = curate(quickstart(tmp_path), Console(quiet=True))
    check_documents(results)
    megabytes = {result.source: result.funnel["bytes"] / 1e6 for result in results}
    assert 7 < megabytes["python-source"] < 16
    assert 1.5 < megabytes["python-docs"] < 4
    assert 5 < megabytes["scientific-docs"] < 11
    assert 0.7 < megabytes["doctest-qa"] < 2.5
    assert next(result for result in results if result.source == "doctest-qa").funnel["pairs"] > 4000
