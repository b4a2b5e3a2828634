"""Curation of a small planted package: every reject exact, every span in place, twice the same."""

import dataclasses
import gzip
import io
import json
import pathlib
import re

import pytest
from rich.console import Console

from davinci_jax.curation import readers, stages
from davinci_jax.curation.cards import print_cards
from davinci_jax.curation.documents import document_files, documents_path
from davinci_jax.curation.installation import Package
from davinci_jax.curation.recipes import builtin_sources
from davinci_jax.curation.run import curate, show_plan
from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment import (
    Batch,
    DataConfig,
    Experiment,
    LearningRate,
    ModelConfig,
    RunConfig,
    Source,
    Stage,
)
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step

LONG = "This sentence is here so that the text is longer than the rule for short documents asks for, by far.\n"
COMMENT = "# " + LONG

FILES = {
    "area.py": f'''"""Areas of shapes.

{LONG}
>>> 6 * 7
42
>>> import math
>>> r = 2
>>> for n in range(2):
...     print(n * r)
0
2
"""

class Circle(Base):
    """A circle. {LONG}"""

    def area(self, digits=2):
        """The area.

        >>> Circle(1).area()
        3.14
        """

    def silent(self):
        pass

if True:
    def square(side: float) -> float:
        """The square of a side. {LONG}"""
        def inner():
            """Nobody's interface. {LONG}"""

add_newdoc("pack.area", "compiled", """
    compiled(x)

    {LONG}
    """)
add_newdoc("pack.area", "kind", ("member", """{LONG * 2}"""))
''',
    "copy_of_square.py": f'def other_name(x):\n    """The square of a side. {LONG}"""\n',
    "twin_a.py": COMMENT * 2,
    "twin_b.py": COMMENT * 2,
    "broken.py": COMMENT + "def (:\n",
    "garbled.py": COMMENT + "# " + "\x01" * 60 + "\n",
    "windows.py": "\ufeff" + COMMENT + "x = 1\r\n" + COMMENT,
    "empty.py": "",
    "short.py": "x = 1\n",
    "tests/test_area.py": COMMENT * 3,
    "site-packages/foreign.py": COMMENT * 4,
    "_sysconfigdata_linux.py": COMMENT * 5,
    "pydoc_data/topics.py": "topics = {'if': '''Topic. " + LONG + "''', 'for': '''" + LONG + "''' + 'a'}\n",
}


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Plants the packages where the reader looks for them; returns how they are found."""
    root = tmp_path / "installation"
    for name, text in FILES.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    (root / "latin.py").write_bytes(b"# caf\xe9\n" * 30)
    for package in ("numpy", "scipy"):
        (root.parent / package).mkdir()
        (root.parent / package / "__init__.py").write_text(f'"""{package}. {LONG}\n>>> {package}\n1\n"""\n')

    def find(name):
        folder = root if name == "python" else root.parent / name
        return Package(name, "9.9", folder, "PSF-2.0")

    monkeypatch.setattr(readers, "find_package", find)
    return find


def experiment(root, *sources):
    return Experiment(
        run=RunConfig(name="x"),
        model=ModelConfig(
            vocab_size=300, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, mlp_size=8
        ),
        data=DataConfig(root=str(root), sources=sources, sequence_length=16),
        curriculum=(
            Stage(
                name="s",
                tokens=1,
                batch=(Batch(size=1),),
                learning_rate=LearningRate(peak=1e-3),
                mixture={sources[0].domain: 1},
            ),
        ),
    )


def source(recipe, name="made", **changes):
    return Source(name=name, domain="D", level="L2", tokens=1, documents=f"python-installation:{recipe}", **changes)


def run(experiment):
    return curate(builtin_sources(experiment), Console(quiet=True))


def lines(folder):
    return [json.loads(line) for file in sorted(folder.rglob("*.jsonl.gz")) for line in gzip.open(file, "rt")]


def curated(tmp_path, recipe):
    """Returns documents by id, rejects as (id, operation) -> reason, and the funnel."""
    [result] = run(experiment(tmp_path / "root", source(recipe)))
    found = lines(result.folder / "documents")
    documents = {document["id"]: document for document in found}
    assert len(documents) == len(found)
    rejects = [reject for label in sorted((result.folder / "rejects").iterdir()) for reject in lines(label)]
    return documents, {(r["id"], r["operation"]): r["reason"] for r in rejects}, result.funnel


def test_source_keeps_programs_and_names_every_reject(tmp_path, find):
    documents, rejects, funnel = curated(tmp_path, "source")
    assert sorted(documents) == [
        "python/area.py",
        "python/copy_of_square.py",
        "python/twin_a.py",
        "python/windows.py",
    ]
    assert documents["python/area.py"]["text"] == FILES["area.py"]
    assert documents["python/windows.py"]["text"] == FILES["windows.py"].lstrip("\ufeff").replace("\r\n", "\n")
    assert rejects == {
        ("python/tests/test_area.py", "drop-paths"): "test suite (folder tests)",
        ("python/pydoc_data/topics.py", "drop-paths"): "named by the recipe",
        ("python/latin.py", "decode-utf8"): "not UTF-8 at byte 5",
        ("python/empty.py", "acquire"): "empty",
        ("python/garbled.py", "drop-garbled"): "60 of 166 characters are garbled",
        ("python/broken.py", "drop-unparsable"): "does not parse (invalid syntax (<unknown>, line 2))",
        ("python/short.py", "drop-short"): "5 characters, below 100",
        ("python/twin_b.py", "exact-duplicates"): "same text as python/twin_a.py",
    }
    first, last = funnel["steps"][0], funnel["steps"][-1]
    assert (first["documents_out"], last["documents_out"], funnel["documents"]) == (11, 4, 4)
    assert funnel["bytes"] == last["bytes_out"] == sum(len(d["text"].encode()) for d in documents.values())
    for before, after in zip(funnel["steps"], funnel["steps"][1:], strict=False):
        assert (before["documents_out"], before["bytes_out"]) == (after["documents_in"], after["bytes_in"])


def test_a_document_carries_its_level_licence_and_lineage(tmp_path, find):
    document = curated(tmp_path, "docs")[0]["python/area.py::Circle"]
    assert (document["level"], document["licence"], document["group"]) == ("L2", "PSF-2.0", "python/area.py")
    acquired, *later = document["lineage"]
    assert acquired["level"] == "L0"
    assert acquired["parameters"].pop("sha256")
    assert acquired["parameters"] == {
        "source": "made",
        "input": "python",
        "file": "area.py",
        "licence": "PSF-2.0",
        "package": "python",
        "version": "9.9",
    }
    assert document["metadata"] == {"path": "area.py"}
    assert [(step["level"], step["operation"]) for step in later] == [
        ("L2", "drop-paths"),
        ("L1", "decode-utf8"),
        ("L2", "drop-garbled"),
        ("L1", "docstring-pages"),
        ("L2", "drop-short"),
        ("L2", "exact-duplicates"),
    ]
    assert later[4]["parameters"] == {"characters": 80}
    assert str(tmp_path) not in json.dumps(document)


def test_docs_are_pages_of_docstrings(tmp_path, find):
    documents, rejects, _ = curated(tmp_path, "docs")
    assert sorted(documents) == [
        "python/area.py::Circle",
        "python/area.py::area",
        "python/area.py::compiled",
        "python/area.py::kind",
        "python/area.py::square",
        "python/pydoc_data/topics.py::if",
    ]
    assert documents["python/area.py::Circle"]["text"] == (
        f"area.Circle(Base)\n\nA circle. {LONG.strip()}\n\n"
        "area.Circle.area(self, digits=2)\n\nThe area.\n\n>>> Circle(1).area()\n3.14\n"
    )
    assert documents["python/area.py::square"]["text"].startswith("area.square(side: float)\n\nThe square")
    assert documents["python/area.py::compiled"]["text"] == f"area.compiled\n\ncompiled(x)\n\n{LONG}"
    assert documents["python/area.py::kind"]["text"].startswith("area.kind.member\n\n")
    duplicate = rejects["python/copy_of_square.py::other_name", "exact-duplicates"]
    assert duplicate == "same text as python/area.py::square"
    assert rejects["python/broken.py", "docstring-pages"].startswith("does not parse")
    assert rejects["python/twin_a.py", "docstring-pages"] == "no docstring"


def test_question_spans_are_exactly_the_questions(tmp_path, find):
    documents, _, funnel = curated(tmp_path, "doctests")
    document = documents["python/area.py::area#area"]
    questions = [document["text"][start:end] for start, end in document["questions"]]
    assert questions == [
        "Question:\n>>> 6 * 7\nAnswer:\n",
        "Question:\n>>> import math\n>>> r = 2\n>>> for n in range(2):\n...     print(n * r)\nAnswer:\n",
    ]
    answers, at = [], 0
    for start, end in [*document["questions"], [len(document["text"])] * 2]:
        answers.append(document["text"][at:start])
        at = end
    assert answers == ["", "42\n\n", "0\n2\n"]
    assert document["group"] == "python/area.py"
    assert funnel["pairs"] == 2
    assert "python/area.py::Circle#area.Circle.area" not in documents  # one short pair


def test_another_run_writes_the_same_bytes_and_a_third_writes_nothing(tmp_path, find):
    [first] = run(experiment(tmp_path / "a", source("doctests")))
    [other] = run(experiment(tmp_path / "b", source("doctests")))
    assert first.folder.name == other.folder.name
    for folder in ("documents", "rejects", "samples"):
        for file in (first.folder / folder).rglob("*.*"):
            assert file.read_bytes() == (other.folder / file.relative_to(first.folder)).read_bytes()
    [again] = run(experiment(tmp_path / "a", source("doctests")))
    assert (first.built, other.built, again.built) == (True, True, False)
    assert again.funnel == first.funnel


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncate", "remove", "funnel", "package", "code"])
def test_what_has_changed_is_written_again(tmp_path, find, damage, monkeypatch):
    made = experiment(tmp_path / "root", source("scientific-docs"))
    [first] = run(made)
    [file] = document_files(made.data, made.data.sources[0])
    good = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(good[:-10])
    elif damage == "remove":
        file.unlink()
    elif damage == "funnel":
        (first.folder / "funnel.json").write_text('{"source": ')
    elif damage == "package":
        with (find("scipy").root / "__init__.py").open("a") as out:
            out.write(f'def f():\n    """New. {LONG}"""\n')
        monkeypatch.setattr(readers, "find_package", _with_version(find, "10"))
    else:
        monkeypatch.setattr(stages, "code_hash", lambda module: "other code")
    [second] = run(made)
    assert second.built is (damage != "funnel")
    assert (second.folder == first.folder) == (damage not in ("package", "code"))
    [file] = document_files(made.data, made.data.sources[0])
    assert (file.read_bytes() == good) == (damage != "package")
    assert second.funnel["documents"] == first.funnel["documents"] + (damage == "package")


def _with_version(find, version):
    def found(name):
        package = find(name)
        return Package(name, version, package.root, package.licence)

    return found


def test_documents_of_the_user_are_left_alone(tmp_path, find):
    own = Source(name="made", domain="D", level="L2", tokens=1)
    assert builtin_sources(experiment(tmp_path / "root", own)) is None


def test_an_unknown_recipe_and_a_missing_package_are_told(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'python-installation:docs'"):
        run(experiment(tmp_path, source("dogs")))

    def empty(name):
        return Package(name, "1", pathlib.Path(tmp_path / "nothing"), None)

    monkeypatch.setattr(readers, "find_package", empty)

    with pytest.raises(DataError, match=r"installed without its \.py files"):
        run(experiment(tmp_path, source("docs")))


def test_where_the_documents_of_a_source_lie():
    data = DataConfig(
        root="/data",
        sources=(
            source("docs", "built-in"),
            Source(name="default", domain="D", level="L2", tokens=1),
            Source(name="relative", domain="D", level="L2", tokens=1, documents="mine/a.jsonl"),
            Source(name="absolute", domain="D", level="L2", tokens=1, documents="/elsewhere"),
        ),
    )
    assert [str(documents_path(data, item)) for item in data.sources] == [
        "/data/curated/built-in/current/documents",
        "/data/documents/default",
        "/data/mine/a.jsonl",
        "/elsewhere",
    ]


def folder_source(name, *paths):
    inputs = tuple(Input(kind="folder", path=str(path), name=f"in{n}") for n, path in enumerate(paths))
    return CuratedSource(name=name, domain="D", level="L1", inputs=inputs, recipe=(Step("decode-utf8"),))


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder with a text; the command runs in the folder above it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("text a")
    return tmp_path / "texts"


def test_what_a_later_source_lacks_is_told_before_the_first_is_made(tmp_path, texts):
    first = folder_source("first", texts)
    made = tmp_path / "root/curated/first/current/documents"
    bad = Step("drop-urls", domains_file=str(tmp_path / "nothing"))
    for second in (
        folder_source("second", tmp_path / "nothing"),
        folder_source("second", made, tmp_path / "nothing"),  # of which one input is made by then
        dataclasses.replace(folder_source("second", made), recipe=(bad,)),
        dataclasses.replace(folder_source("second", made), recipe=(Step("decontaminate", benchmarks=["nothing"]),)),
    ):
        with pytest.raises(DataError, match="nothing"):
            curate(CurationConfig(root="root", sources=(first, second), workers=1), Console(quiet=True))
        assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("root", ["root", "./texts/../root", "{}/root", "{}/link"])
@pytest.mark.parametrize("path", ["root", "{}/root", "texts/../root", "link"])
def test_a_source_waits_for_an_earlier_one_however_its_path_is_written(tmp_path, texts, root, path):
    (tmp_path / "link").symlink_to(tmp_path / "root")
    (tmp_path / "root").mkdir()
    made = f"{path.format(tmp_path)}/curated/first/current/documents"
    second = CuratedSource(
        name="second", domain="D", level="L1", inputs=(Input(kind="documents", path=made),), recipe=()
    )
    config = CurationConfig(root=root.format(tmp_path), sources=(folder_source("first", texts), second), workers=1)
    show_plan(config, Console(file=(out := io.StringIO()), width=1000))
    assert "goes on from first, not there yet" in out.getvalue()
    assert [result.funnel["documents"] for result in curate(config, Console(quiet=True))] == [1, 1]
    show_plan(config, Console(file=(out := io.StringIO()), width=1000))
    assert "not there yet" not in out.getvalue()


@pytest.mark.parametrize(
    ("root", "told"),
    [
        ("/proc/nothing", "No such file or directory"),
        ("texts/a.txt/root", "Not a directory"),
        ("r" * 300, "File name too long"),
        ("/proc/self", "curated"),
    ],
)
def test_a_root_that_cannot_hold_results_is_told(texts, root, told):
    config = CurationConfig(root=root, sources=(folder_source("s", texts), folder_source("t", texts)), workers=1)
    with pytest.raises(DataError, match=f"curation.root = .*: cannot hold .*{told}.*name a folder"):
        curate(config, Console(quiet=True))


def test_a_folder_in_the_place_of_the_link_to_the_result_is_told_before_anything_runs(tmp_path, texts):
    config = CurationConfig(root="root", sources=(folder_source("s", texts), folder_source("t", texts)), workers=1)
    (tmp_path / "root/curated/t/current").mkdir(parents=True)
    with pytest.raises(DataError, match="t/current: is no link to the newest result"):
        curate(config, Console(quiet=True))
    assert not (tmp_path / "root/curated/s").exists()
    (tmp_path / "root/curated/t/current").rmdir()
    assert len(curate(config, Console(quiet=True))) == 2


def curated_texts(root, texts, *steps):
    """Curates a folder; returns the result and the lines that tell of an empty one."""
    first = dataclasses.replace(folder_source("first", texts), recipe=(Step("decode-utf8"), *steps))
    told = io.StringIO()
    [result] = curate(CurationConfig(root=str(root), sources=(first,)), Console(file=told, width=80))
    at = told.getvalue().splitlines()
    return result, [line for line in at if "no document is left" in line or "still leads to" in line]


def test_a_source_that_keeps_no_document_says_why_and_leaves_an_earlier_result_in_place(tmp_path, texts):
    (texts / "b.txt").write_text("b" * 300)
    full, told = curated_texts(tmp_path / "root", texts)
    assert told == []
    short = Step("drop-short", characters=1000)
    for _ in range(2):  # made, and up to date
        empty, told = curated_texts(tmp_path / "root", texts, short)
        reason = json.loads((empty.folder / "samples/removed.jsonl").read_text().splitlines()[0])["reason"]
        link = empty.folder.parent / "current"
        assert told == [
            f"first: no document is left: 2 rejected, most often by drop-short ({reason}); see {empty.folder}/rejects",
            f"first: {link} still leads to the result before, of 2 documents",
        ]
        assert link.resolve() == full.folder.resolve()


def test_a_path_is_told_as_it_is(tmp_path, texts):
    config = CurationConfig(root=str(tmp_path / "a[bold]b"), sources=(folder_source("first", texts),), workers=1)
    [result] = curate(config, Console(file=(told := io.StringIO()), width=40))
    assert f"first: 1 document, 6 B, made: {result.folder}\n" in told.getvalue()
    assert f"report: {config.root}/curated/report.html\n" in told.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_name_is_told_as_it_is(tmp_path, texts, terminal):
    """Also on the bar of a terminal, and of a source that waits for another one."""
    first = dataclasses.replace(folder_source("x[red]", texts), domain="[/]")
    given = Input(kind="documents", path=str(tmp_path / "root/curated/x[red]/current/documents"), name="in")
    then = dataclasses.replace(first, name=":smile:", inputs=(given,), recipe=())
    config = CurationConfig(root=str(tmp_path / "root"), sources=(first, then), workers=1)
    console = Console(file=(told := io.StringIO()), width=200, force_terminal=terminal, color_system=None)
    show_plan(config, console)
    curate(config, console)
    print_cards(config, console=console)
    assert told.getvalue().count("x[red]  [/], L1 as declared; 1 file, 6 B in 1 task; recipe ") == 2
    assert ":smile:  [/], L1 as declared; goes on from x[red], not there yet\n" in told.getvalue()
    assert len(re.findall(r"^ *(?:x\[red\]|:smile:) +\[/\][ ,]", told.getvalue(), re.M)) == 6
    assert not terminal or "x[red]: decode-utf8 " in told.getvalue()


def test_a_first_result_that_is_empty_is_pointed_to_and_a_later_one_takes_its_place(tmp_path, texts):
    empty, told = curated_texts(tmp_path / "root", texts, Step("drop-short", characters=1000))
    assert [line.partition(" rejected")[0] for line in told] == ["first: no document is left: 1"]
    link = empty.folder.parent / "current"
    assert link.resolve() == empty.folder.resolve()
    full, told = curated_texts(tmp_path / "root", texts)
    assert told == []
    assert link.resolve() == full.folder.resolve()


def test_a_source_without_any_document_says_so(tmp_path, texts):
    (texts / "a.txt").rename(tmp_path / "a.txt")
    (texts / "rows.jsonl").write_text("")
    given = Input(kind="jsonl", path=str(texts), name="in")
    empty = CuratedSource(name="first", domain="D", level="L1", inputs=(given,), recipe=())
    told = io.StringIO()
    curate(CurationConfig(root=str(tmp_path / "root"), sources=(empty,)), Console(file=told))
    assert "first: no document is left, and none was rejected\n" in told.getvalue()
