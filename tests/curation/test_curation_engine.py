"""Stages on datatrove: what is computed again and what is not, faults in the middle, any number of tasks."""

import collections
import dataclasses
import errno
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import fsspec
import pytest
import tokenizers
from rich.console import Console

import davinci_jax.curation.run
from davinci_jax.curation import engine, executors, places, registry
from davinci_jax.curation.documents import Document
from davinci_jax.curation.run import curate, show_plan
from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step
from davinci_jax.experiment.overrides import apply_overrides

CALLS = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Shout:
    """Makes text upper case, and counts how often it is asked."""

    ending: str = "!"
    fail: str = ""
    name = "shout"
    level = "L1"

    def parameters(self):
        return {"ending": self.ending}

    def begin(self):
        CALLS[f"{self.name} begins"] += 1
        if self.fail == "begin":
            raise RecursionError("a file is too deep")

    def apply(self, documents, reject):
        for document in documents:
            CALLS[self.name] += 1
            if self.fail == "number":
                document = dataclasses.replace(document, metadata={"score": float("nan")})
            if self.fail == "disk" and document.text.startswith("text 7"):
                raise OSError(errno.ENOSPC, "No space left on device")
            if self.fail == "endpoint" and document.text.startswith("text 7"):
                raise DataError("endpoint", "http://x", "does not answer", "start it")
            yield document.with_text(document.text.upper() + self.ending)


@dataclasses.dataclass(frozen=True)
class Judge(Shout):
    """The same at a level whose documents are kept, by a model that may answer otherwise another time."""

    answer = "!"
    name = "judge"
    level = "L4"

    def apply(self, documents, reject):
        for document in super().apply(documents, reject):
            yield document.with_text(document.text + self.answer)


@dataclasses.dataclass(frozen=True)
class Rank:
    """A corpus operation that gives every document its place among all documents of the source, and fails with one."""

    fails: str = ""
    error: str = "document"
    name = "rank"
    level = "L2"

    def parameters(self):
        return {}

    def remember(self, document):
        if self.fails == "first":
            break_at(document, self.error)
        return document.text

    def collect(self, remembered, folder):
        CALLS["collect"] += 1
        time.sleep(0.02)
        (folder / "texts").write_text(json.dumps(list(remembered)))

    def reduce(self, collected, folder):
        CALLS["reduce"] += 1
        time.sleep(0.05)
        texts = sorted(text for task in collected for text in json.loads((task / "texts").read_text()))
        (folder / "all").write_text(json.dumps(texts))

    def open(self, reduced, task):
        CALLS["open"] += 1
        time.sleep(0.03)
        return task, {text: n for n, text in enumerate(json.loads((reduced / "all").read_text()))}

    def apply(self, document, number, opened, reject):
        task, ranks = opened
        if self.fails == "last":
            break_at(document, self.error)
        metadata = {**document.metadata, "rank": ranks[document.text], "task": task, "number": number}
        yield dataclasses.replace(document, metadata=metadata)


def break_at(document, error):
    if document.text.startswith("TEXT 6"):
        raise OSError(errno.EACCES, "Permission denied") if error == "disk" else ZeroDivisionError("odd text")


@pytest.fixture(autouse=True)
def operations(monkeypatch):

    CALLS.clear()
    for kind in (Shout, Judge, Rank):
        monkeypatch.setitem(registry.OPERATIONS, kind.name, (lambda: sys.modules[__name__], kind.__name__))


@pytest.fixture
def raw(tmp_path):
    """Twelve text files, one of them no UTF-8."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n:02d}.txt").write_text(f"text {n} " + "word " * n)
    (folder / "03.txt").write_bytes(b"caf\xe9")
    return folder


RECIPE = (Step("decode-utf8"), Step("shout"), Step("drop-short", characters=14), Step("rank"))


def config(raw, recipe=RECIPE, root="root", inputs=None, **changes):
    inputs = inputs or (Input(kind="folder", path=str(raw), licence="CC0-1.0"),)
    source = CuratedSource(name="s", domain="D", level="L2", inputs=inputs, recipe=recipe)
    return CurationConfig(
        **{"root": str(raw.parent / root), "sources": (source,), "workers": 1, "task_bytes": 150, **changes}
    )


def run(made):
    [result] = curate(made, Console(quiet=True))
    return result


def records(folder):
    files = sorted(glob.glob(f"{folder}/**/*.gz", recursive=True))  # follows the links to earlier rejects
    return [json.loads(line) for file in files for line in gzip.open(file, "rt")]


def stage_of(folder, operation):
    """The folder of the stage that ends with an operation."""
    counts = {file: json.loads(file.read_text()) for file in folder.glob("*/counts/000000.json")}
    [found] = [file.parent.parent for file, told in counts.items() if told["steps"][-1]["operation"] == operation]
    return found


def content(folder):
    """Everything that must not depend on when and by how many it was made."""
    files = [file for part in ("documents", "rejects", "samples") for file in sorted((folder / part).rglob("*.*"))]
    funnel = json.loads((folder / "funnel.json").read_text())
    for step in funnel["steps"]:
        del step["seconds"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}, funnel


def test_a_source_goes_through_its_recipe(raw):
    result = run(config(raw))
    documents = records(result.folder / "documents")
    assert [document["id"] for document in documents] == [f"raw/{n:02d}.txt" for n in (2, 4, 5, 6, 7, 8, 9, 10, 11)]
    assert documents[0]["text"] == "TEXT 2 WORD WORD !"
    texts = sorted(document["text"] for document in documents)
    assert [document["metadata"]["rank"] for document in documents] == [texts.index(d["text"]) for d in documents]
    assert documents[0]["licence"] == "CC0-1.0"
    assert documents[0]["level"] == "L2"
    assert [step["operation"] for step in documents[0]["lineage"]] == ["read-folder", *(s.operation for s in RECIPE)]
    acquired = documents[0]["lineage"][0]["parameters"]
    assert acquired["file"] == "02.txt"
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", acquired["time"])
    assert len(acquired["sha256"]) == 64
    rejects = {(r["id"], r["operation"]): r["reason"] for r in records(result.folder / "rejects")}
    assert rejects == {
        ("raw/03.txt", "decode-utf8"): "not UTF-8 at byte 3",
        ("raw/00.txt", "drop-short"): "8 characters, below 14",
        ("raw/01.txt", "drop-short"): "13 characters, below 14",
    }
    assert (result.folder.parent / "current").resolve() == result.folder.resolve()
    rows = {
        step["operation"]: (step["documents_in"], step["documents_out"], step["rejected"])
        for step in result.funnel["steps"]
    }
    assert rows == {
        "acquire": (12, 12, 0),
        "decode-utf8": (12, 11, 1),
        "shout": (11, 11, 0),
        "drop-short": (11, 9, 2),
        "rank": (9, 9, 0),
    }


def test_a_source_that_is_there_is_left_alone(raw):
    first = run(config(raw))
    CALLS.clear()
    second = run(config(raw))
    assert (first.built, second.built) == (True, False)
    assert not CALLS
    assert second.funnel == first.funnel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "shouts", "collects"),
    [
        ((*RECIPE, Step("drop-short", characters=20)), 0, 0),  # behind the barrier
        ((*RECIPE[:2], Step("drop-short", characters=20), Step("rank")), 0, 4),  # before it: it is behind L1
        ((RECIPE[0], Step("shout", ending="?"), *RECIPE[2:]), 11, 4),
        ((*RECIPE, Step("judge")), 0, 0),
    ],
)
def test_an_edited_recipe_computes_only_what_changed(raw, edit, shouts, collects):
    first = run(config(raw))
    CALLS.clear()
    second = run(config(raw, edit))
    assert second.built
    assert (CALLS["shout"], CALLS["collect"]) == (shouts, collects)
    assert second.folder != first.folder
    fresh = run(config(raw, edit, root="fresh"))
    assert content(fresh.folder) == content(second.folder)
    CALLS.clear()
    assert run(config(raw)).folder == first.folder  # the old recipe is still there
    assert not CALLS


def test_a_rule_behind_a_model_does_not_ask_the_model_again(raw):
    recipe = (Step("decode-utf8"), Step("judge"), Step("drop-short", characters=14))
    run(config(raw, recipe))
    asked = CALLS["judge"]
    run(config(raw, (*recipe[:2], Step("drop-short", characters=20))))
    assert asked == 11
    assert CALLS["judge"] == 11
    run(config(raw, (recipe[0], Step("judge", ending="?"), recipe[2])))
    assert CALLS["judge"] == 22


@pytest.fixture
def many(raw):
    """Forty text files more, each with words of its own."""
    for n in range(100, 180, 2):
        (raw / f"{n}.txt").write_text(f"text {n} " + f"word{n} " * (n % 9))
    return raw


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["added", *(pytest.param(change, marks=pytest.mark.exhaustive) for change in ("changed", "removed"))]
)
def test_a_changed_input_is_another_recipe_hash_and_repeats_the_tasks_that_it_touches(many, change):
    """Before, in and behind an operation on the whole source, whose documents come out the same but for one task."""
    recipe = (RECIPE[0], Step("shout"), Step("drop-short", characters=14), Step("exact-duplicates"), Step("judge"))
    first = run(config(many, recipe))
    kept = content(first.folder)
    file = many / ("141.txt" if change == "added" else "140.txt")
    file.unlink() if change == "removed" else file.write_text("text that is new " * 2)
    CALLS.clear()
    second = run(config(many, recipe))
    assert second.built
    assert second.folder != first.folder
    assert max(CALLS["shout"], CALLS["judge"]) < 15
    assert content(second.folder) == content(run(config(many, recipe, root="fresh")).folder)
    assert content(first.folder) == kept
    CALLS.clear()
    assert run(config(many, recipe)).built is False
    assert not CALLS


@pytest.mark.slow
def test_a_file_more_has_little_more_collected_for_an_operation_on_the_whole_source(many):
    tasks = len(list((run(config(many)).folder / "documents").iterdir()))
    (many / "141.txt").write_text("text that is new " * 2)
    CALLS.clear()
    second = run(config(many))
    assert 0 < CALLS["collect"] < tasks / 2
    assert content(second.folder) == content(run(config(many, root="fresh")).folder)


def shouted_again(raw, **changes):
    """Has a task made anew beside an earlier result; returns how often an operation was asked for it."""
    (raw / "00.txt").write_text("text that is new")
    CALLS.clear()
    result = run(config(raw, **changes))
    asked = CALLS["shout"]
    assert content(result.folder) == content(run(config(raw, root="fresh", **changes)).folder)
    return asked


def test_what_is_damaged_in_an_earlier_result_is_not_taken_over(raw):
    stage = stage_of(run(config(raw)).folder.parent, "shout")
    for file in (stage / "documents").iterdir():
        good = file.read_bytes()
        file.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    assert shouted_again(raw) == 11


@pytest.mark.parametrize(
    "damage", [os.unlink, lambda file: os.truncate(file, 0), lambda file: file.write_bytes(file.read_bytes().lower())]
)
def test_what_is_damaged_of_an_earlier_collection_is_collected_again(raw, damage):
    [corpus] = run(config(raw)).folder.parent.glob("corpus-*")
    for file in corpus.glob("collected/*/texts"):
        damage(file)
    shouted_again(raw)


@pytest.mark.parametrize("damage", ["no text", "a folder", "other counts"])
def test_what_is_no_part_of_an_earlier_result_is_not_taken_over(raw, damage):
    for mark in run(config(raw)).folder.parent.glob("*/made_by"):
        if damage == "other counts":
            (mark.parent / "counts").mkdir(exist_ok=True)
            (mark.parent / "counts/x.json").write_text("{}")
        elif damage == "no text":
            mark.write_bytes(b"\xff\xfe")
        else:
            mark.unlink()
            mark.mkdir()
    assert (shouted_again(raw) == 11) == (damage != "other counts")


def test_it_is_told_where_earlier_results_take_long_to_check(raw, monkeypatch):
    monkeypatch.setattr(davinci_jax.curation.run, "_TOLD_BYTES", 1000)
    run(config(raw))
    (raw / "00.txt").write_text("text that is new")
    curate(config(raw), Console(file=(out := io.StringIO()), width=1000))
    told = "reads 1\\.\\d kB of earlier results, to see whether they are as they were"
    assert re.findall(rf"^s: decode-utf8 \+ shout: {told}$", out.getvalue(), re.M)


@pytest.mark.slow
def test_a_plan_tells_how_much_is_there_before_anything_runs(many):
    recipe = (RECIPE[0], Step("shout"), Step("drop-short", characters=14), Step("exact-duplicates"), Step("judge"))
    first = config(many, recipe)
    given = (Input(kind="documents", path=str(many.parent / "root/curated/s/current/documents"), name="in"),)
    then = CuratedSource(name="t", domain="D", level="L4", inputs=given, recipe=(Step("exact-duplicates"),))
    last = dataclasses.replace(
        then, name="u", inputs=(dataclasses.replace(given[0], path=given[0].path.replace("/s/", "/t/")),)
    )
    made = dataclasses.replace(first, sources=(*first.sources, then, last))

    def told():
        show_plan(made, Console(file=(out := io.StringIO()), width=1000))
        return re.findall(r"there  |to do(?:, .*?)?  |, which changes|, not there yet", out.getvalue())

    tasks = len(list((run(first).folder / "documents").iterdir()))
    assert told() == ["there  "] * 4 + [f"to do, 0 of {tasks} tasks there  ", "to do  ", ", not there yet"]
    curate(made, Console(quiet=True))
    (many / "141.txt").write_text("text that is new " * 2)
    *foreseen, then, last = told()
    assert (then, last) == (", which changes",) * 2
    curate(first, Console(file=(out := io.StringIO()), width=1000))
    taken = re.findall(r": (\d+ of \d+ tasks) as in an earlier result", out.getvalue())
    words = ("there", "there", "collected")  # nothing can be known behind the third
    assert foreseen == [*(f"to do, {tasks} {word}  " for tasks, word in zip(taken, words, strict=False)), "to do  "]


def test_tasks_whose_tokens_are_counted_otherwise_are_not_taken_over(raw):
    run(config(raw))
    file = str(raw.parent / "words.json")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(file)
    assert shouted_again(raw, tokenizer=file) == 11


def test_tasks_whose_tokens_an_earlier_file_of_this_name_has_counted_are_not_taken_over(raw):
    file = str(raw.parent / "words.json")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(file)
    run(config(raw, tokenizer=file))
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"[NONE]": 0}, unk_token="[NONE]")).save(file)
    assert shouted_again(raw, tokenizer=file) == 11


def test_where_files_cannot_have_two_names_they_are_copied(raw, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    run(config(raw))
    assert 0 < shouted_again(raw) < 11


@pytest.mark.slow
@pytest.mark.parametrize("task_bytes", [1, 150])
def test_documents_do_not_depend_on_how_the_source_is_cut(raw, task_bytes):
    whole = run(config(raw, root="whole", task_bytes=10**6))
    result = run(config(raw, task_bytes=task_bytes))
    texts = [(d["id"], d["text"], d["metadata"]["rank"]) for d in records(result.folder / "documents")]
    assert texts == [(d["id"], d["text"], d["metadata"]["rank"]) for d in records(whole.folder / "documents")]
    for name, count in (("removed", 3), ("changed", 8), ("kept", 8)):
        samples = (result.folder / f"samples/{name}.jsonl").read_bytes()
        assert samples == (whole.folder / f"samples/{name}.jsonl").read_bytes()
        assert samples.count(b"\n") == count


@pytest.mark.slow
def test_more_tasks_than_documents(raw):
    recipe = (Step("decode-utf8"), Step("drop-short", characters=60), Step("rank"))
    result = run(config(raw, recipe, task_bytes=1))
    files = sorted((result.folder / "documents").iterdir())
    assert len(files) == 12
    assert [document["id"] for document in records(result.folder / "documents")] == ["raw/11.txt"]


def test_the_funnel_counts_the_seconds_of_all_three_passes_of_a_corpus_operation(raw):
    *_, rank = run(config(raw)).funnel["steps"]
    assert CALLS["open"] == CALLS["collect"] > 0
    assert rank["seconds"] >= CALLS["collect"] * 0.02 + 0.05 + CALLS["open"] * 0.03


@pytest.mark.parametrize(("fail", "told"), [("begin", "shout: cannot load what it needs .RecursionError: a file is")])
def test_an_operation_that_cannot_begin_stops_the_run(raw, fail, told):
    made = config(raw, (RECIPE[0], Step("shout", fail=fail)))
    with pytest.raises(DataError, match=told):
        run(made)
    assert CALLS["shout"] == 0
    assert not (raw.parent / "root/curated/s/current").exists()


def test_an_operation_begins_once_a_task(raw):
    result = run(config(raw))
    assert CALLS["shout begins"] == len(list((result.folder / "documents").iterdir())) > 1


def test_the_funnel_counts_the_documents_with_which_an_operation_failed(raw):
    steps = run(config(raw, (*RECIPE[:3], Step("rank", fails="first")), task_bytes=10_000)).funnel["steps"]
    assert {step["operation"]: step["failed"] for step in steps if step["failed"]} == {"rank": 1}


@pytest.mark.parametrize("recipe", [(), (Step("drop-paths"),)])
def test_a_recipe_that_makes_no_text_is_told(raw, recipe):
    with pytest.raises(DataError, match=r"sources\[s\].recipe: makes no text of raw/00.txt; add a step that reads its"):
        run(config(raw, recipe))
    made = config(raw, recipe)
    source = dataclasses.replace(made.sources[0], level="L0")  # as it was acquired, and nobody says otherwise
    assert run(dataclasses.replace(made, sources=(source,), root=f"{made.root}-0")).funnel["documents"] == 12
    # What was no end of a recipe may have bytes alone: the next step reads them.
    assert run(config(raw, (*recipe, Step("rank"), RECIPE[0]), root="later")).funnel["documents"] == 11


@pytest.mark.parametrize("last", ["rank", "shout"])
def test_a_stage_file_that_is_damaged_is_named_and_made_again(raw, last):
    recipe = (RECIPE[0], Step("judge"), Step("drop-short", characters=1))
    folder = run(config(raw, recipe)).folder.parent
    file = stage_of(folder, "judge") / "documents" / "000001.jsonl.gz"
    good = file.read_bytes()
    file.write_bytes(good[:40] + bytes([good[40] ^ 1, good[41] ^ 1]) + good[42:])
    edited = config(raw, (*recipe[:2], Step(last)))
    CALLS.clear()
    with pytest.raises(DataError, match=f"{file}: is damaged .*; start the same command again, which makes this file"):
        run(edited)
    result = run(edited)
    assert file.read_bytes() == good
    assert CALLS["judge"] < 11  # the other files stay as they are
    fresh = run(config(raw, edited.sources[0].recipe, root="fresh"))
    assert content(result.folder) == content(fresh.folder)


def test_rejects_of_an_attempt_that_ended_half_way_go(raw):
    first = run(config(raw))
    good, rejects = content(first.folder), records(first.folder / "rejects")
    assert any(label.is_symlink() for label in (first.folder / "rejects").iterdir())
    (first.folder / "documents" / "000000.jsonl.gz").unlink()
    left = first.folder / "rejects" / "07-other" / "000000.jsonl.gz"
    left.parent.mkdir(parents=True)
    left.write_bytes(gzip.compress(b"{}\n"))
    again = run(config(raw))
    assert again.folder == first.folder
    assert content(again.folder) == good
    assert records(again.folder / "rejects") == rejects  # those of earlier stages, too


@pytest.mark.parametrize("gone", ["rejects/*/*.gz", "rejects/*", "rejects", "samples/removed.jsonl", "samples"])
def test_rejects_and_samples_that_were_removed_by_hand_are_made_again(raw, gone):
    recipe = (*RECIPE, Step("drop-short", characters=30))  # the last stage has rejects, and those before it
    first = run(config(raw, recipe))
    good, rejects = content(first.folder), records(first.folder / "rejects")
    assert {record["operation"] for record in rejects} == {"decode-utf8", "drop-short"}
    for path in glob.glob(f"{first.folder}/{gone}"):
        (shutil.rmtree if os.path.isdir(path) and not os.path.islink(path) else os.unlink)(path)
    again = run(config(raw, recipe))
    assert again.folder == first.folder
    assert content(again.folder) == good
    assert records(again.folder / "rejects") == rejects
    assert run(config(raw, recipe)).built is False


@pytest.mark.parametrize("fails", ["first", "last"])
def test_a_document_with_which_a_corpus_operation_fails_takes_no_other_with_it(raw, fails):
    result = run(config(raw, (*RECIPE[:3], Step("rank", fails=fails)), task_bytes=10_000))
    kept, rejects = records(result.folder / "documents"), records(result.folder / "rejects")
    [bad] = [record for record in rejects if record["operation"] == "rank"]
    assert (bad["id"], bad["reason"]) == ("raw/06.txt", "rank failed (ZeroDivisionError: odd text)")
    whole = records(run(config(raw, root="whole", task_bytes=10_000)).folder / "documents")
    assert [record["id"] for record in kept] == [record["id"] for record in whole if record["id"] != "raw/06.txt"]
    numbers, ranks = ([record["metadata"][name] for record in kept] for name in ("number", "rank"))
    if fails == "first":  # it takes part in nothing
        assert numbers == list(range(len(kept)))
        assert sorted(ranks) == list(range(len(kept)))
    assert result.funnel["steps"][-1]["rejected"] == 1


@pytest.mark.parametrize("fails", ["first", "last"])
def test_trouble_with_files_in_a_corpus_operation_stops_the_run(raw, fails):
    with pytest.raises(DataError, match="Permission denied"):
        run(config(raw, (*RECIPE[:3], Step("rank", fails=fails, error="disk"))))
    assert not (raw.parent / "root/curated/s/current").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing", ["documents", "counts", "completions", "collected", "notes", "reduced", "sense", "bytes"]
)
def test_what_a_kill_left_undone_is_done(raw, missing):
    first = run(config(raw))
    good, folder = content(first.folder), first.folder.parent
    corpus = next(folder.glob("corpus-*"))
    if missing == "documents":
        (first.folder / "documents" / "000001.jsonl.gz").write_bytes(b"half")
    elif missing == "counts":
        for stage in folder.glob("*/counts"):
            (stage / "000002.json").unlink(missing_ok=True)
    elif missing == "completions":
        # A mark without its files must not be believed, and files without their mark are as good as with it.
        (first.folder / "documents" / "000002.jsonl.gz").unlink()
        for mark in folder.glob("*/*/completions/00000"):
            mark.unlink()
    elif missing == "notes":
        for file in [*corpus.glob("notes/*"), first.folder / "counts" / "000000.json"]:
            file.unlink()
    elif missing == "sense":
        for number, file in enumerate([*corpus.glob("notes/*"), *first.folder.glob("counts/*")]):
            file.write_text(("[]", "{}", "3", '{"failed": 3}')[number % 4])
    elif missing == "reduced":  # killed between the first pass and the second
        shutil.rmtree(corpus / "reduced")
        shutil.rmtree(first.folder / "counts")
    elif missing == "bytes":  # a power cut left names alone
        for file in [*corpus.glob("collected/*/*"), *corpus.glob("reduced/*")]:
            os.truncate(file, 0)
        shutil.rmtree(first.folder / "counts")
    else:
        left = corpus / "collected" / ".000001.somewhere.77"
        left.mkdir()
        (left / "half").write_text("x")
        (corpus / "collected" / "000000" / "texts").rename(left / "texts")
        (corpus / "collected" / "000000").rmdir()
        (first.folder / "counts" / "000000.json").unlink()
    again = run(config(raw))
    assert again.built
    assert content(again.folder) == good
    assert not list(folder.glob("*/collected/.*"))


@pytest.mark.parametrize(("answer", "again"), [("!", 0), ("?", 1)])
def test_documents_that_a_model_has_made_anew_are_not_taken_for_the_old_ones(raw, monkeypatch, answer, again):
    recipe = (RECIPE[0], Step("judge"), Step("rank"), Step("shout"))
    first = run(config(raw, recipe))
    good, folder = content(first.folder), first.folder.parent
    assert run(config(raw, recipe)).built is False
    judged = stage_of(folder, "judge")
    tasks = len(list((judged / "documents").iterdir()))
    assert CALLS["collect"] == tasks > 2
    (judged / "documents" / "000001.jsonl.gz").unlink()
    monkeypatch.setattr(Judge, "answer", answer)
    CALLS.clear()
    result = run(config(raw, recipe))
    assert result.built
    assert (CALLS["collect"], CALLS["reduce"]) == (again, again)
    assert 0 < CALLS["judge"] < 11
    assert bool(CALLS["shout"]) == bool(again)
    texts = [document["text"] for document in records(result.folder / "documents")]
    assert sum("?" in text for text in texts) == again * CALLS["judge"]
    assert (content(result.folder) == good) == (not again)


def test_documents_that_change_under_a_corpus_operation_end_the_run(raw, monkeypatch):
    recipe = (RECIPE[0], Step("judge"), Step("rank"))
    made = config(raw, recipe)

    def reduce(self, collected, folder):
        counts = stage_of(raw.parent / "root/curated/s", "judge") / "counts" / "000001.json"
        counts.write_text(json.dumps({**json.loads(counts.read_text()), "output_digest": "other"}))

    monkeypatch.setattr(Rank, "reduce", reduce)
    monkeypatch.setattr(Rank, "open", lambda *_: (0, collections.defaultdict(int)))
    with pytest.raises(DataError, match=r"000001\.jsonl\.gz: is not what the first pass of rank has seen"):
        run(made)


@pytest.mark.slow
@pytest.mark.parametrize(("fail", "told"), [("disk", "No space left"), ("endpoint", "does not answer")])
def test_trouble_of_the_machine_stops_the_run_and_what_is_done_stays_done(raw, fail, told):
    recipe = (RECIPE[0], Step("shout", fail=fail), *RECIPE[2:])
    with pytest.raises(DataError, match=told):
        run(config(raw, recipe))
    folder = raw.parent / "root" / "curated" / "s"
    counted = sorted(file.name for file in folder.glob("*/counts/*.json"))
    assert counted[0] == "000000.json"
    assert not list(folder.glob("*/temporary/*"))
    assert not (folder / "current").exists()
    CALLS.clear()
    # `fail` is none of the parameters that decide the result, so this is the same recipe.
    result = run(config(raw))
    assert CALLS["shout"] < 11
    assert content(result.folder) == content(run(config(raw, root="fresh")).folder)


def test_a_full_disk_while_documents_are_written(raw, monkeypatch):
    class Full(engine.GzipText):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "GzipText", Full)
        with pytest.raises(DataError, match="No space left"):
            run(config(raw))
    folder = raw.parent / "root" / "curated" / "s"
    assert not list(folder.glob("*/documents/*"))
    assert run(config(raw)).funnel["documents"] == 9


@pytest.mark.parametrize(
    ("fail", "left", "told"),
    [
        ("disk", "an empty file", "OSError: .* No space left on device; logs in"),
        ("endpoint", "nothing", "http://x.*does not answer"),
    ],
)
def test_trouble_is_told_where_a_full_disk_has_no_room_to_write_it_down(raw, monkeypatch, fail, left, told):
    def tell(logs, error):
        if left == "nothing":
            raise OSError(errno.ENOSPC, "No space left on device")
        (logs / executors._ERROR_FILE).touch()

    monkeypatch.setattr(executors, "_tell", tell)
    with pytest.raises(DataError, match=told):
        run(config(raw, (RECIPE[0], Step("shout", fail=fail))))


class Lost(io.BytesIO):
    """A stream whose connection is gone after the first bytes."""

    def read(self, size=-1):
        if self.tell():
            raise TimeoutError("no answer in 30 s")
        return super().read(min(size, 5) if size > 0 else 5)


@pytest.mark.parametrize("when", ["open", "read"])
def test_an_address_that_cannot_be_reached_stops_the_run_and_loses_no_file(raw, monkeypatch, when):
    memory = fsspec.filesystem("memory")
    for file in raw.iterdir():
        memory.pipe(f"/engine-{when}/{file.name}", file.read_bytes())
    memory.pipe(f"/engine-{when}/10.txt.gz", b"\x1f\x8b damaged")
    reached = type(memory)._open

    def fail(self, path, *given, **settings):
        if "04.txt" in path and when == "open":
            raise PermissionError("the token has expired")
        return Lost(self.cat(path)) if "04.txt" in path else reached(self, path, *given, **settings)

    made = config(raw, inputs=(Input(kind="folder", path=f"memory://engine-{when}", name="in"),))
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "_open", fail)
        with pytest.raises(DataError, match=r"memory.*(token has expired|no answer in 30 s).*credentials"):
            run(made)
    result = run(made)
    rejected = [record["id"] for record in records(result.folder / "rejects") if record["operation"] == "acquire"]
    assert rejected == ["in/10.txt.gz"]  # what is damaged stays damaged, wherever it lies
    assert [result.funnel["steps"][0][name] for name in ("documents_in", "documents_out")] == [13, 12]


@pytest.mark.parametrize("code", ["EIO", "ESTALE", "ETIMEDOUT"])
def test_a_disk_that_fails_stops_the_run_and_loses_no_file(raw, monkeypatch, code):
    reached = places.Place.open

    def fail(self, item):
        if item.path == "04.txt":
            raise OSError(getattr(errno, code), "the disk fails")
        return reached(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(places.Place, "open", fail)
        with pytest.raises(DataError, match="the disk fails"):
            run(config(raw))
    assert run(config(raw)).funnel["steps"][0]["rejected"] == 0


def test_a_tokenizer_that_comes_later_is_told_and_never_speaks_for_what_bytes_counted(raw):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    file = str(raw.parent / "words.json")
    words.save(file)
    name = f"{file} ({hashlib.sha256((raw.parent / 'words.json').read_bytes()).hexdigest()[:8]})"

    def told(recipe, **changes):
        [result] = curate(config(raw, recipe, **changes), Console(file=(out := io.StringIO()), width=1000))
        lines = [line for line in out.getvalue().splitlines() if "tokens are counted by" in line]
        card = json.loads((result.folder / "card.json").read_text())
        assert card["tokens_by"] == result.funnel["tokens_by"]
        return result, lines

    recipe = (*RECIPE[:2], Step("judge"))
    _, lines = told(recipe)
    assert lines == []
    again, [line] = told(recipe, tokenizer=file)
    assert not again.built
    assert f"s: its tokens are counted by bytes / 4, not by {name}; to count them again, remove" in line
    # Another last step: its tokens are counted by the tokenizer, those before it were not.
    edited = (*RECIPE[:2], Step("judge", ending="?"))
    mixed, [line] = told(edited, tokenizer=file)
    assert mixed.funnel["tokens_by"] == f"mixed: acquire, decode-utf8, shout by bytes / 4; judge by {name}"
    # The remedy is the one that the line names, and leaves the documents as they were.
    folders = line.split(" remove ")[1].split(" and start")[0].split()
    assert len(folders) == 1
    assert str(mixed.folder) not in folders
    before = records(mixed.folder / "documents")
    for folder in folders:
        shutil.rmtree(folder)
    counted, lines = told(edited, tokenizer=file)
    assert lines == []
    assert counted.funnel["tokens_by"] == name
    assert records(counted.folder / "documents") == before


def test_another_process_at_the_same_source_is_told(raw):
    folder = raw.parent / "root" / "curated" / "s"
    folder.mkdir(parents=True)
    program = (
        f"import fcntl; file = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(DataError, match="is being curated by another process"):
            run(config(raw))
        other.stdin.close()
    assert run(config(raw)).built


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (Step("drop-shrot"), r"sources\[s\].recipe\[1\] = 'drop-shrot': is no operation; did you mean 'drop-short'"),
        (Step("drop-short", caracters=1), r"recipe\[1\].drop-short.caracters: is an unknown field; did you mean"),
        (Step("drop-short", characters="many"), r"drop-short.characters = 'many': is not a whole number"),
        (Step("drop-short"), r"drop-short.characters: is missing"),
    ],
)
def test_a_step_that_cannot_be_is_told_before_anything_runs(raw, step, told):
    with pytest.raises(ConfigError, match=told):
        run(config(raw, (Step("decode-utf8"), step)))
    assert not CALLS
    assert not (raw.parent / "root").exists()


def test_a_kind_of_input_or_an_option_that_cannot_be_is_told(raw):
    for given, told in [
        (Input(kind="foldre", path=str(raw)), "'foldre': is no kind of input; did you mean 'folder'"),
        (Input(kind="folder", path=str(raw), options={"sufixes": [".a"]}), "sufixes: is an unknown field"),
    ]:
        source = CuratedSource(name="s", domain="D", level="L2", inputs=(given,), recipe=())
        with pytest.raises(ConfigError, match=told):
            run(CurationConfig(root=str(raw.parent), sources=(source,)))


def test_parameters_can_be_overridden_by_name(raw):
    made = apply_overrides(config(raw), ["sources.s.recipe.2.parameters.characters=20", "workers=2"])
    assert made.sources[0].recipe[2] == Step("drop-short", characters=20)
    assert made.workers == 2
    with pytest.raises(ConfigError, match="did you mean 'executor'"):
        apply_overrides(config(raw), ["executer=ray"])


@pytest.mark.slow
def test_documents_of_one_source_can_be_the_input_of_another(raw):
    first = run(config(raw))
    given = Input(kind="documents", path=str(raw.parent / "root/curated/s/current/documents"))
    source = CuratedSource(name="t", domain="D", level="L4", inputs=(given,), recipe=(Step("judge"),))
    second = run(CurationConfig(root=str(raw.parent / "root"), sources=(source,), workers=1))
    before, after = records(first.folder / "documents"), records(second.folder / "documents")
    assert [document["id"] for document in after] == [document["id"] for document in before]
    assert [step["operation"] for step in after[0]["lineage"]] == [
        "read-folder",
        *(step.operation for step in RECIPE),
        "read-documents",
        "judge",
    ]
    assert after[0]["level"] == "L4"


def test_documents_of_another_source_that_came_out_as_they_were_are_not_gone_through_again(raw):
    recipe = (RECIPE[0], Step("exact-duplicates"))
    given = (Input(kind="documents", path=str(raw.parent / "root/curated/s/current/documents"), name="in"),)
    then = CuratedSource(name="t", domain="D", level="L2", inputs=given, recipe=(Step("shout"),))

    made = config(raw, recipe)
    made = dataclasses.replace(made, sources=(*made.sources, then))

    def shouted():
        CALLS.clear()
        _, result = curate(made, Console(quiet=True))
        return CALLS["shout"], len(records(result.folder / "documents"))

    assert shouted() == (11, 11)
    (raw / "99.txt").write_text("text that is new")
    asked, documents = shouted()
    assert (0 < asked < 6, documents) == (True, 12)
    # Of a file that was changed by hand the counts say nothing.
    os.utime(raw.parent / "root/curated/s/current/documents/000000.jsonl.gz")
    asked, documents = shouted()
    assert (0 < asked < 6, documents) == (True, 12)
    assert shouted() == (0, 12)


def test_documents_read_as_they_were_written():
    document = Document(
        id="a",
        text="x\u2028y\n",
        group="g",
        level="L3",
        lineage=({"operation": "o", "level": "L0", "parameters": {}},),
        licence="MIT",
        questions=((0, 2),),
        parts=(("p", 0, 1),),
        metadata={"url": "http://x", "scores": [1, 2.5]},
        raw=b"\x00\xff",
    )
    assert Document.from_json(document.to_json()) == document
