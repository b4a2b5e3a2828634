"""The recipes that ship: every step there, the report's levels, order and thresholds, and a plan of each."""

import json

import pytest
import recipe_materials
from raw_files import pdf
from recipe_materials import NAMES, load

from davinci_jax.cli import main
from davinci_jax.curation import registry
from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation.pairs import unpair
from davinci_jax.curation.licences import FindLicence
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import apply_overrides

STAGE_1, STAGE_2 = ("1-1", "1-2"), ("2-1", "2-2")
# Source: domain, level as the report has it, level that the steps reach, stages.
EXPECTED = {
    "curate_web": {"web": ("General", "L3", "L3", None)},
    "curate_code": {"code": ("Code", "L3", "L2", None), "stack-exchange": ("Code", "L2", "L2", None)},
    "curate_mathematics": {
        "mathematics": ("Science", "L3", "L3", STAGE_1),
        "mathematics-refined": ("Science", "L4", "L4", STAGE_2),
    },
    "curate_darwin_science": {
        "books": ("Science", "L4", "L4", None),
        "papers": ("Science", "L4", "L4", None),
        "papers-completed": ("Science", "L5", "L5", STAGE_2),
    },
    "curate_qa": {"book-qa": ("QA", "L5", "L5", STAGE_2)},
    "curate_rejection": {f"{name}-rs": ("QA", "L5", "L5", STAGE_2) for name in ("mathematics", "science", "code")},
}
RAW = {
    "curate_web": ["crawl/a.warc"],
    "curate_code": ["threads/Posts.xml"],
    "curate_mathematics": ["crawl/a.warc"],
    "curate_darwin_science": ["books/a.pdf", "papers/a.pdf"],
    "curate_qa": [],
    "curate_rejection": ["mathematics.jsonl", "science.jsonl", "code.jsonl"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which all recipes find what they name, their raw files empty."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in NAMES:
        config = load(name)
        root = folder / config.root
        recipe_materials.write_benchmark(root)
        recipe_materials.write_models(folder, config, recipe_materials.leave_untrained)
        for file in RAW[name]:
            (root / "raw" / file).parent.mkdir(parents=True, exist_ok=True)
            (root / "raw" / file).write_bytes(pdf(["A line."]) if file.endswith(".pdf") else b"")
    recipe_materials.write_repository(folder / "data/code/raw/repositories/one", {"a.py": "x = 1\n"})
    books = folder / "data/darwin_science/curated/books"
    (books / "made/documents").mkdir(parents=True)
    (books / "made/documents/00000.jsonl").write_text(Document(id="a", text="A book.").to_json() + "\n")
    (books / "current").symlink_to("made")
    (folder / "data/web/blocked_domains.txt").write_text("spam.example\n")
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def operations(name, source):
    [found] = [item for item in load(name).sources if item.name == source]
    return [registry.build(step) for step in found.recipe]


def parameters(name, source, operation):
    """What a step does, as the lineage of a document tells it."""
    return next(item for item in operations(name, source) if item.name == operation).parameters()


def test_all_are_here():
    assert sorted(EXPECTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_levels_domains_and_stages_are_those_of_table_2(name):
    found = {}
    for source in load(name).sources:
        reached = max(operation.level for operation in operations(name, source.name))
        found[source.name] = (source.domain, source.level, reached, source.stages)
    assert found == EXPECTED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_shown_and_nothing_written(name, folder, capsys):
    before = sorted(folder.rglob("*"))
    assert main(["curate", str(recipe_materials.CONFIGS / f"{name}.py"), "--plan"]) == 0
    shown = capsys.readouterr().out
    for source, (domain, level, _, _) in EXPECTED[name].items():
        assert f"{source}  {domain}, {level} as declared" in shown
        for operation in operations(name, source):
            assert f"{operation.level} {operation.name}" in shown
    assert sorted(folder.rglob("*")) == before


def test_a_source_that_goes_on_from_another_waits_for_it(capsys):
    main(["curate", str(recipe_materials.CONFIGS / "curate_mathematics.py"), "--plan"])
    assert "mathematics-refined  Science, L4 as declared; goes on from mathematics, not there yet" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_source_ends_decontaminated_by_20_words(name):
    for source in EXPECTED[name]:
        last = operations(name, source)[-1]
        assert (last.name, last.ngram, last.action, last.report_ngram) == ("decontaminate", 20, "drop", 13)


@pytest.mark.parametrize(
    ("name", "source", "order"),
    [
        (
            "curate_web",
            "web",
            "drop-urls html-text keep-languages gopher-repetition gopher-quality c4-quality fineweb-quality "
            "exact-duplicates near-duplicates html-careful educational-value replace-personal-data decontaminate",
        ),
        (
            "curate_mathematics",
            "mathematics",
            "html-text keep-languages domain exact-duplicates near-duplicates html-careful domain educational-value "
            "replace-personal-data decontaminate",
        ),
        *(
            (
                "curate_darwin_science",
                source,
                "pdf-text near-duplicates keep-sizes drop-garbled-text keep-languages document-type educational-value "
                "domain refine decontaminate",
            )
            for source in ("books", "papers")
        ),
        ("curate_darwin_science", "papers-completed", "complete decontaminate"),
    ],
)
def test_the_order_is_the_published_one(name, source, order):
    assert [operation.name for operation in operations(name, source)] == order.split()


def test_thresholds_are_the_published_ones():
    science = {name: parameters("curate_darwin_science", "books", name) for name in ("near-duplicates", "refine")}
    assert {name: science["near-duplicates"][name] for name in ("bands", "rows", "normalise_numbers")} == {
        "bands": 14,
        "rows": 8,
        "normalise_numbers": False,
    }
    assert parameters("curate_darwin_science", "books", "keep-sizes")["min_bytes"] == 8192
    assert parameters("curate_darwin_science", "books", "drop-garbled-text")["share"] == 0.5
    assert parameters("curate_darwin_science", "books", "keep-languages")["languages"] == ("en",)
    assert (science["refine"]["characters"], science["refine"]["required"]) == (1024, 0.95)
    assert science["refine"]["model"] == "openai/gpt-oss-120b"
    assert parameters("curate_darwin_science", "papers-completed", "complete")["tokens"] == 1024
    assert parameters("curate_web", "web", "near-duplicates")["normalise_numbers"] is True
    assert parameters("curate_code", "code", "near-duplicates")["normalise_numbers"] is False
    mathematics = parameters("curate_mathematics", "mathematics", "near-duplicates")
    assert (mathematics["bands"], mathematics["rows"], mathematics["normalise_numbers"]) == (11, 10, False)
    checkers = [parameters("curate_rejection", f"{name}-rs", "rejection-sampling")["checker"] for name in (
        "mathematics", "science", "code",
    )]  # fmt: skip
    assert checkers == ["math", "choice", "code"]


@pytest.mark.parametrize(("name", "source"), [("curate_web", "web"), ("curate_mathematics", "mathematics")])
def test_the_bytes_of_a_page_reach_the_careful_pass(name, source):
    raw = recipe_materials.page("\n".join(recipe_materials.PROSE), "Of rivers and the sea")
    documents = iter([Document(id="d", raw=raw, metadata={"url": "http://good.example/"})])
    for operation in operations(name, source):
        if operation.name == "html-careful":
            break
        if operation.level != "L3" and not hasattr(operation, "reduce"):
            documents = operation.apply(documents, pytest.fail)
    [document] = documents
    assert document.raw == raw


def test_code_says_that_its_level_is_published_and_not_reached():
    [code, _] = load("curate_code").sources
    assert "L3 as published, by operation L2" in code.note


def test_steps_are_overridden_by_their_operation():
    config = apply_overrides(
        load("curate_darwin_science"),
        [
            "sources.books.recipe.refine.parameters.endpoint=http://here:1",
            "sources.Science.recipe.decontaminate.parameters.ngram=13",
            "sources.papers.inputs.papers.path=/elsewhere",
        ],
    )
    books, papers, completed = config.sources
    assert [step.parameters["endpoint"] for step in books.recipe if step.operation == "refine"] == ["http://here:1"]
    assert [step.parameters["endpoint"] for step in papers.recipe if step.operation == "refine"] != ["http://here:1"]
    assert [source.recipe[-1].parameters["ngram"] for source in (books, papers, completed)] == [13] * 3
    assert papers.inputs[0].path == "/elsewhere"
    with pytest.raises(ConfigError, match="did you mean 'refine'"):
        apply_overrides(load("curate_darwin_science"), ["sources.books.recipe.refin.parameters.endpoint=x"])


def test_a_file_has_the_licence_that_it_states_or_else_its_repository_s():
    def licence(text, **fields):
        [found] = FindLicence().apply(iter([Document(id="d", text=text, **fields)]), None)
        return found.licence

    top = {"metadata": {"repository_licence": "MIT"}}
    assert licence("x = 1", **top) == "MIT"
    assert licence("# SPDX-License-Identifier: GPL-3.0-only", **top) == "GPL-3.0-only"
    assert licence("x = 1", licence="ISC", **top) == "ISC"
    assert licence("x = 1") is None


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (Document(id="d", text="What is 1 + 1?", metadata={"answer": 2}), ("What is 1 + 1?", "2")),
        (Document(id="d", text="Double x.", metadata={"tests": "assert f(1) == 2"}), ("Double x.", "")),
        (Document(id="d", text="unused", metadata={"question": "What?", "answer": "That."}), ("What?", "That.")),
        (Document(id="d", text="Prose without an answer."), ("", "")),
    ],
)
def test_a_problem_is_the_text_of_its_document(document, expected):
    assert unpair(document) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"LICENSE": recipe_materials.MIT}, "MIT"),
        ({"COPYING.txt": recipe_materials.GPL, "LICENSE-MIT": recipe_materials.MIT}, "(GPL-3.0-or-later) AND (MIT)"),
        ({"LICENSE": "Apache License\n  Version 2.0, January 2004\n"}, "Apache-2.0"),
        ({"LICENSE": "Do as you like."}, None),
        ({"vendor/LICENSE": recipe_materials.MIT}, None),
    ],
)
def test_licences_at_the_top_of_a_repository(files, expected, tmp_path):
    from davinci_jax.curation.inputs import acquire, make_plan
    from davinci_jax.experiment import CuratedSource, Input

    recipe_materials.write_repository(tmp_path / "one", {"a.py": "x = 1\n", **files})
    given = Input(kind="git", path=str(tmp_path), options={"suffixes": [".py"]})
    source = CuratedSource(name="s", domain="Code", level="L0", inputs=(given,), recipe=())
    [(_, item)] = make_plan(source, registry.build_reader, 2**20).tasks[0].items
    [document] = acquire(source, given, registry.build_reader(given), item, None)
    assert document.metadata.get("repository_licence") == expected
    assert json.loads(json.dumps(dict(document.metadata)))["path"] == "a.py"
