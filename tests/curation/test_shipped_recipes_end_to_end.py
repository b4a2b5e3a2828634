"""The recipes that ship, over a handful of real documents with planted cases, each of which falls where it should."""

import collections
import dataclasses
import gzip
import json
import pathlib
import textwrap

import pytest
import recipe_materials
import scripted_server
from recipe_materials import ADVERTISEMENT, BENCHMARK, load, page, paragraphs
from rich.console import Console
from test_curation_threads import HEAD, answer, question

from davinci_jax.curation.extract import ANSWER, QUESTION
from davinci_jax.curation.generation import prompts
from davinci_jax.curation.run import curate
from davinci_jax.curation.sandbox import can_isolate
from davinci_jax.experiment import apply_overrides

pytestmark = pytest.mark.slow
SECOND = (
    "A voucher that you order this week is a discount on everything until the sale is over. The banner at the door of "
    "the shop has the year of each offer, which will be sent with the order and never ends too soon for you."
)
GERMAN = (
    "Die Tiere des Waldes schlafen am Tag und wachen in der Nacht, weil sie dann niemand stört. Im Winter finden sie "
    "wenig, und viele von ihnen legen im Herbst einen Vorrat an. Erst im Frühling kommen sie wieder heraus. "
)


def run(name, *overrides, root=None, sources=None):
    """Curates a shipped recipe; returns for each source (documents by id, rejects by step)."""
    config = apply_overrides(load(name), ["workers=1", *overrides])
    if sources is not None:
        config = dataclasses.replace(config, sources=tuple(item for item in config.sources if item.name in sources))
    return {result.source: (documents(result), rejects(result)) for result in curate(config, Console(quiet=True))}


def documents(result):
    return {item["id"]: item for item in lines(result.folder / "documents")}


def rejects(result):
    """Steps with the ids that they dropped."""
    found = collections.defaultdict(set)
    for step in (result.folder / "rejects").iterdir():
        found[step.name.split("-", 1)[1]] |= {item["id"].rsplit("/", 1)[-1] for item in lines(step)}
    return dict(found)


def lines(folder):
    for file in sorted(folder.rglob("*.jsonl.gz")):
        with gzip.open(file, "rt") as stream:
            yield from map(json.loads, stream)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prepared(tmp_path, name):
    """The folder of a recipe with its classifiers and its benchmark."""
    config = load(name)
    recipe_materials.write_models(tmp_path, config)
    recipe_materials.write_benchmark(tmp_path / config.root)
    return tmp_path / config.root


def ends(found, *names):
    """Whether the ids are those that end so."""
    return sorted(name.rsplit("/", 1)[-1] for name in found) == sorted(names)


def test_web(tmp_path):
    root = prepared(tmp_path, "curate_web")
    # Gopher counts marks as words without a letter.
    prose = [text for text in paragraphs() if sum(map(text.count, '"()*_[]“”:;')) < 6]
    good = ["\n".join(prose[n : n + 4]) for n in range(0, 20, 4)]
    near = good[1].replace(good[1].split()[40], "another", 1)
    written = {f"http://good.example/page{n}": page(text) for n, text in enumerate(good)}
    written |= {
        "http://good.example/same": page(good[0]),
        "http://good.example/near": page(near),
        "http://www.spam.example/page": page(good[2] + "\nOf another host."),
        "http://good.example/german": page("\n".join([GERMAN * 2] * 3)),
        "http://good.example/again": page("\n".join([prose[30]] * 4)),
        "http://good.example/advertisement": page(f"{ADVERTISEMENT}\n{SECOND}"),
        "http://good.example/benchmark": page(f"{prose[31]}\n{prose[32]}\n{BENCHMARK}\n{prose[33]}"),
        "http://good.example/address": page(f"{prose[34]}\n{prose[35]}\nWrite to jane.roe@university.edu about it."),
    }
    recipe_materials.write_warc(root / "raw/crawl/a.warc.gz", written)
    (root / "blocked_domains.txt").write_text("spam.example\n")
    [(kept, dropped)] = run("curate_web").values()
    by_url = {item["metadata"]["url"].rsplit("/", 1)[-1]: item for item in kept.values()}
    assert sorted(by_url) == ["address", *(f"page{n}" for n in range(5))]
    assert {step: len(found) for step, found in dropped.items()} == {
        "drop-urls": 1,
        "keep-languages": 1,
        "gopher-repetition": 1,
        "exact-duplicates": 1,
        "near-duplicates": 1,
        "educational-value": 1,
        "decontaminate": 1,
    }
    assert "<EMAIL>" in by_url["address"]["text"]
    assert "About us" not in "".join(item["text"] for item in kept.values())
    assert {item["level"] for item in kept.values()} == {"L3"}
    assert {item["metadata"]["extraction"] for item in kept.values()} == {"careful"}


def test_code(tmp_path):
    root = prepared(tmp_path, "curate_code")
    wrap = pathlib.Path(textwrap.__file__).read_text()
    own = {"LICENSE": recipe_materials.MIT, "wrap.py": wrap, "copy/wrap.py": wrap}
    own |= {"near.py": wrap.replace("whitespace", "blank", 1), "made.py": f"# Generated by x.\n{wrap}"}
    own["data.xyz"] = "1,2\n"
    recipe_materials.write_repository(root / "raw/repositories/mine", own)
    theirs = {"COPYING": recipe_materials.GPL, "theirs.py": wrap.replace("text", "words")}
    recipe_materials.write_repository(root / "raw/repositories/theirs", theirs)
    (root / "raw/threads").mkdir(parents=True)
    asked = question(1, "How do I wrap?", f"<p>{paragraphs()[0]}</p>") + answer(2, 1, f"<p>{paragraphs()[1]}</p>")
    asked += question(3, "Unanswered?")
    (root / "raw/threads/Posts.xml").write_text(f"{HEAD}{asked}</posts>\n")
    found = run("curate_code")
    kept, dropped = found["code"]
    [document] = kept.values()
    assert document["licence"] == "MIT"
    assert document["level"] == "L2"
    assert dropped == {
        "code-files": {"LICENSE", "data.xyz", "COPYING"},
        "keep-licences": {"theirs.py"},
        "code-quality": {"made.py"},
        "exact-duplicates": {"wrap.py"},
        "near-duplicates": {"near.py"} if document["id"].endswith("wrap.py") else {"wrap.py"},
    }
    card = json.loads((root / "curated/code/current/card.json").read_text())
    assert (card["level"], card["level_reached"]) == ("L3", "L2")
    threads, unanswered = found["stack-exchange"]
    assert len(threads) == 1
    assert list(unanswered) == ["thread-text"]


def test_mathematics(tmp_path):
    root, prose = prepared(tmp_path, "curate_mathematics"), paragraphs()
    good = ["\n".join(prose[n : n + 3]) for n in range(0, 9, 3)]
    written = {f"http://good.example/page{n}": page(text) for n, text in enumerate(good)}
    written["http://good.example/sale"] = page(f"{ADVERTISEMENT}\n{ADVERTISEMENT}")
    recipe_materials.write_warc(root / "raw/crawl/a.warc.gz", written)
    with scripted_server.serve(refine) as server:
        found = run("curate_mathematics", f"sources.mathematics-refined.recipe.refine.parameters.endpoint={server.url}")
    kept, dropped = found["mathematics"]
    assert len(kept) == 3
    assert {step: len(ids) for step, ids in dropped.items()} == {"domain": 1}
    refined, dropped = found["mathematics-refined"]
    assert sorted(refined) == sorted(kept)
    assert dropped == {}
    assert {item["level"] for item in refined.values()} == {"L4"}
    # What brought the page through the first source is still told of it.
    steps = [step["operation"] for step in next(iter(refined.values()))["lineage"]]
    assert steps.index("html-careful") < steps.index("refine")


def refine(payload, times):
    [text] = scripted_server.material(payload)
    assert scripted_server.prefix(payload) == prompts.load("refine_v1").text
    return f"<CLEANED_TEXT>{text.replace('NOISE', '').strip()}</CLEANED_TEXT>"


def science(payload, times):
    """Refines, or completes by a sentence."""
    if scripted_server.prefix(payload) == prompts.load("refine_v1").text:
        return refine(payload, times)
    [text] = scripted_server.material(payload)
    assert scripted_server.prefix(payload) == prompts.load("complete_v1").text
    return (
        f"<COMPLETED_TEXT>{text}\n\nIn other words, this part of the text says what the machine does.</COMPLETED_TEXT>"
    )


def ask(payload, times):
    """Asks after the longest sentence of a passage, and answers with it."""
    [passage] = scripted_server.material(payload)
    said = max(" ".join(passage.split()).split(". "), key=len)
    if scripted_server.material(payload, "QUESTION"):
        return f"<ANSWER>{said}</ANSWER>"
    asked = f"What holds for {' '.join(said.split()[:6])}?"
    return f"<QA>\n<QUESTION>{asked}</QUESTION>\n<ANSWER>{said}</ANSWER>\n<EVIDENCE>{said}</EVIDENCE>\n</QA>"


def test_books_papers_and_questions_about_them(tmp_path):
    root, prose = prepared(tmp_path, "curate_darwin_science"), paragraphs()[:80]
    half = len(prose) // 2
    for name, texts in {
        "books/one": prose[:half],
        "books/same": prose[:half],
        "books/short": prose[half : half + 5],
        "papers/one": prose[half:],
        "papers/sale": [f"{ADVERTISEMENT} {n} {paragraph[:60]}" for n, paragraph in enumerate(prose[:40])],
    }.items():
        recipe_materials.write_pdf(root / f"raw/{name}.pdf", texts)
    (root / "raw/papers/broken.pdf").write_bytes(b"%PDF-1.7\n")
    with scripted_server.serve(science) as server:
        found = run(
            "curate_darwin_science",
            f"sources.books.recipe.refine.parameters.endpoint={server.url}",
            f"sources.papers.recipe.refine.parameters.endpoint={server.url}",
            f"sources.papers-completed.recipe.complete.parameters.endpoint={server.url}",
        )
    (books, fell), (papers, fell_too), (completed, none) = found.values()
    assert list(books) == ["books/one.pdf"]
    assert fell == {"near-duplicates": {"same.pdf"}, "keep-sizes": {"short.pdf"}}
    assert list(papers) == list(completed) == ["papers/one.pdf"]
    assert fell_too == {"pdf-text": {"broken.pdf"}, "document-type": {"sale.pdf"}}
    assert none == {}
    levels = [next(iter(made.values()))["level"] for made in (books, papers, completed)]
    assert levels == ["L4", "L4", "L5"]
    assert completed["papers/one.pdf"]["text"].count("In other words") > 4

    recipe_materials.write_benchmark(tmp_path / "data/qa")
    with scripted_server.serve(ask) as server:
        found = run("curate_qa", f"sources.book-qa.recipe.ask-questions.parameters.endpoint={server.url}")
    [(pairs, _)] = found.values()
    assert len(pairs) > 3
    for pair in pairs.values():
        ((start, end),) = pair["questions"]
        assert pair["text"][start:end].startswith(QUESTION)
        assert pair["text"][start:end].endswith(ANSWER)
        assert (pair["level"], pair["group"]) == ("L5", "books/one.pdf")
        assert pair["metadata"]["evidence"] in " ".join(books["books/one.pdf"]["text"].split())


def solve(payload, times):
    """Wrong at first, right from the second sample on."""
    [asked] = scripted_server.material(payload, "QUESTION")
    wrong = payload["seed"] == 0
    if "Write" in asked:
        return f"```python\ndef double(x):\n    return {3 if wrong else 2} * x\n```"
    if "planet" in asked:
        return f"It is the largest one.\nAnswer: {'A' if wrong else 'B'}"
    return f"Twelve and two make \\boxed{{{15 if wrong else 14}}}"


def test_rejection_sampling(tmp_path):
    root = prepared(tmp_path, "curate_rejection")
    (root / "raw").mkdir()
    for name, problems in {
        "mathematics": [
            {"text": "What is 2 + 3 * 4?", "answer": "14"},
            {"text": "What is 2 + 3 * 4?", "answer": "14"},
            {"text": "What is 7 * 9?", "answer": "63"},
            {"text": BENCHMARK, "answer": "4800"},
        ],
        "science": [{"text": "Which planet is the largest?\nA. Mars\nB. Jupiter", "answer": "B"}],
        "code": [{"text": "Write a function double(x).", "tests": "assert double(4) == 8"}],
    }.items():
        (root / f"raw/{name}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    sources = ["mathematics-rs", "science-rs", *(["code-rs"] if can_isolate() is None else [])]
    with scripted_server.serve(solve) as server:
        endpoint = f"sources.QA.recipe.rejection-sampling.parameters.endpoint={server.url}"
        found = run("curate_rejection", endpoint, sources=sources)
    assert list(found) == sources
    _, dropped = found["mathematics-rs"]
    assert {step: len(ids) for step, ids in dropped.items()} == {
        "exact-duplicates": 1,
        "decontaminate": 1,
        "rejection-sampling": 1,
    }
    for made, _ in found.values():
        [pair] = made.values()
        assert pair["metadata"]["right"] == [3, 4]
        assert pair["level"] == "L5"
        assert pair["questions"]
    assert not any("twelve hens" in str(payload) for payload in server.payloads)
