"""What the README and the docs show is there and runs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
def test_the_readme_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    names = {}
    exec(blocks[0], names)
    assert names["out"].shape == names["q"].shape
    assert names["updates"]["w"].shape == (64, 32)


def test_the_recipe_of_the_data_page_describes_a_run():
    from davinci_jax.experiment import Experiment

    names = {}
    exec(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)[0], names)
    assert isinstance(names["config"](), Experiment)


def test_the_model_of_the_page_of_experts_is_one():
    names = {}
    exec(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "moe.md").read_text(), re.S)[0], names)
    assert names["model"].moe.experts == 64


def test_the_recipes_of_the_curation_page_can_be_run(tmp_path):
    from rich.console import Console

    from davinci_jax.curation.run import check, curate
    from davinci_jax.experiment import apply_overrides

    text = (ROOT / "docs" / "curation.md").read_text()
    recipes = re.findall(r"```python\n(.*?)```", text, re.S)[:2]
    names = {}
    exec(recipes[0], names)
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "note.txt").write_text("A sentence of the note. " * 20)
    (raw / "short.txt").write_text("Short.")
    places = [f"root={tmp_path}", f"sources.notes.inputs.0.path={raw}", "workers=1"]
    [result] = curate(apply_overrides(names["config"](), places), Console(quiet=True))
    assert [step["documents_out"] for step in result.funnel["steps"]] == [2, 2, 1, 1]

    exec(recipes[1], names)
    config = names["config"]()
    check(config)
    [override] = re.findall(r"sources\.manuals\.recipe\S+", text)
    (raw / "page.html").write_text("<html><body><p>" + "A sentence of the manual. " * 200 + "</p></body></html>")
    places = [f"root={tmp_path}", f"sources.manuals.inputs.0.path={raw}", "workers=1"]
    [result] = curate(apply_overrides(config, [override, *places]), Console(quiet=True))
    assert result.funnel["steps"][1]["documents_out"] == 1


def test_the_curation_page_names_every_operation_and_input():
    from davinci_jax.curation.registry import OPERATIONS, READERS

    text = (ROOT / "docs" / "curation.md").read_text()
    assert [name for name in (*OPERATIONS, *READERS) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_files_that_are_named_exist(page):
    from davinci_jax.cli import _parser

    verbs = _parser()._subparsers._group_actions[0].choices
    text = page.read_text()
    for verb in re.findall(r"\bdavinci ([a-z]+)\b", text):
        assert verb in verbs, verb
    for file in re.findall(r"\b((?:configs|launch|benchmarks|tests)/[\w/]+\.(?:py|sh|json))\b", text):
        assert (ROOT / file).exists(), file


@pytest.mark.slow
def test_the_examples_of_the_kernels_page_run_one_after_another(capsys):
    text = (ROOT / "docs" / "kernels.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)
    assert capsys.readouterr().out.strip() in text
    assert names["mixed"].shape == (512, 64)
