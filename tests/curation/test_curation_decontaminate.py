"""Benchmark text in documents: planted passages, a plain search, both texts of a hit, and files that are none."""

import collections
import dataclasses
import gzip
import json
import pathlib
import random
import re
import time

import pytest
from rich.console import Console

from davinci_jax.curation import decontaminate
from davinci_jax.curation.account import Account
from davinci_jax.curation.decontaminate import MAX_HITS, Decontaminate, NgramIndex, benchmark_files, read_records
from davinci_jax.curation.documents import Document
from davinci_jax.curation.funnel import add_steps, summarise
from davinci_jax.curation.normalise import normalise
from davinci_jax.curation.pipeline import FunnelStep, through
from davinci_jax.curation.run import curate
from davinci_jax.curation.stages import funnel_step
from davinci_jax.curation.tokens import TokenCounter
from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step


def words(generator, count):
    return " ".join("".join(generator.choice("abcdefghij") for _ in range(5)) for _ in range(count))


def write(folder, records, name="gsm8k.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def run(operation, *texts):
    rejects = []
    documents = [Document(id=f"d{n}", text=text) for n, text in enumerate(texts)]
    kept = list(operation.apply(iter(documents), lambda document, reason: rejects.append((document, reason))))
    return kept, rejects


@pytest.fixture
def benchmark(tmp_path):
    generator = random.Random(1)
    return [{"id": n, "question": words(generator, 30), "answer": words(generator, 15)} for n in range(20)], tmp_path


def test_planted_passages_are_found_exactly(benchmark):
    records, folder = benchmark
    operation = Decontaminate(benchmarks=(write(folder, records),), fields=("question", "answer"))
    generator = random.Random(2)
    texts, planted = [], []
    for n in range(200):
        source = f"{records[n % 20]['question']} {records[n % 20]['answer']}".split()
        length = n % 40
        start = generator.randrange(len(source) - length)
        passage = " ".join(source[start : start + length]).upper()
        texts.append(f"{words(generator, 50)}\n{passage}; {words(generator, 50)}")
        planted.append(length)
    kept, rejects = run(operation, *texts)
    assert {document.id for document, _ in rejects} == {f"d{n}" for n, length in enumerate(planted) if length >= 20}
    reported = {document.id for document in kept if "contamination" in document.metadata}
    assert reported == {f"d{n}" for n, length in enumerate(planted) if 13 <= length < 20}
    for document, reason in rejects:
        number = int(document.id[1:])
        (hit,) = document.metadata["contamination"]
        assert (hit["benchmark"], hit["record"]) == ("gsm8k.jsonl", str(number % 20))
        assert hit["words"] == planted[number]
        assert hit["document_text"].lower().rstrip(";").split() == hit["benchmark_text"].split()
        assert hit["benchmark_text"][:50] in reason
        assert hit["document_text"][:50] in reason


def test_hits_are_those_of_a_plain_search():
    generator = random.Random(3)
    vocabulary = ["Der", "rot", "Mond", "3", "4.5"]
    texts = [" ".join(generator.choice(vocabulary) for _ in range(30)) for _ in range(60)]
    records = [("b", str(n), text) for n, text in enumerate(texts[:20])]
    for numbers in (False, True):
        index = NgramIndex(records, 5, numbers)
        grams = [
            [tuple(w[n : n + 5]) for n in range(len(w) - 4)] for w in (normalise(t, numbers).split() for t in texts)
        ]
        known = {gram for row in grams[:20] for gram in row}
        assert [bool(index.find(text).hits) for text in texts] == [not known.isdisjoint(row) for row in grams]
        assert len(index) == len(known)


def test_hits_cover_all_that_a_benchmark_shares_and_nothing_else(monkeypatch):
    monkeypatch.setattr(decontaminate, "MAX_HITS", 99)
    generator = random.Random(4)
    texts = [" ".join(generator.choices(["Der,", "rot", "Mond", "- ist", "+"], k=40)) for _ in range(90)]
    records = [(f"b{n % 3}", str(n), text) for n, text in enumerate(texts[:30])]
    index = NgramIndex(records, 4, False)
    plain = [normalise(text, False).split() for text in texts]
    known = {f"b{k}": {tuple(w[n : n + 4]) for w in plain[k:30:3] for n in range(len(w) - 3)} for k in range(3)}
    assert known["b0"] & known["b1"]
    for text, spelt in zip(texts[30:], plain[30:], strict=True):
        found = index.find(text)
        assert found.counts == collections.Counter(hit.benchmark for hit in found.hits)
        for hit in found.hits:
            assert hit.benchmark_text in texts[int(hit.record)]
            assert hit.document_text in text
            wanted = normalise(hit.document_text, False).split()
            assert wanted == normalise(hit.benchmark_text, False).split()
            assert len(wanted) == hit.words
        for name, grams in known.items():
            own = [normalise(hit.document_text, False).split() for hit in found.hits if hit.benchmark == name]
            covered = collections.Counter(tuple(w[n : n + 4]) for w in own for n in range(len(w) - 3))
            shared = [gram for n in range(len(spelt) - 3) if (gram := tuple(spelt[n : n + 4])) in grams]
            assert covered == collections.Counter(shared)  # each in one hit alone


@pytest.mark.parametrize(("times", "hits"), [(1, 1600), (20, 85)])
def test_one_sentence_over_and_over_takes_no_longer_than_another_text(times, hits):
    sentence = words(random.Random(5), 30)
    record = f"{words(random.Random(6), 3000)} {f'{sentence} ' * times}"
    index = NgramIndex([("b", "0", record), ("c", "0", record)], 13, False)
    started = time.process_time()
    found = index.find(f"{sentence}. " * 1600)  # 300 kB
    assert time.process_time() - started < 10  # 0.2 s; with a search of the record for every n-gram more than a minute
    assert found.counts == {"b": hits, "c": hits}
    assert len(found.hits) == MAX_HITS
    assert found.hits[0].document_text == " ".join([f"{sentence}."] * times)


def test_a_passage_across_problem_and_solution_is_a_hit(benchmark):
    records, folder = benchmark
    passage = " ".join([*records[0]["question"].split()[-10:], *records[0]["answer"].split()[:10]])
    file = write(folder, records)
    assert len(run(Decontaminate(benchmarks=(file,), fields=("question", "answer")), passage)[1]) == 1
    assert len(run(Decontaminate(benchmarks=(file,), fields=("question",)), passage)[1]) == 0


def test_the_hits_of_a_dropped_document_are_kept_with_it(benchmark):
    records, folder = benchmark
    operation = Decontaminate(benchmarks=(write(folder, records),))
    step = FunnelStep(operation.name, operation.level, operation.parameters())
    (folder / "task").mkdir()
    account = Account(folder / "task", [step], 0, TokenCounter(None), folder / "progress")
    given = Document(id="d", text=records[2]["question"], metadata={"url": "http://x", "odd": b"no JSON"})
    assert list(through(operation, step, iter([given]), account)) == []
    account.close()
    with gzip.open(folder / "task" / "00-decontaminate" / "rejects.jsonl.gz", "rt") as lines:
        (record,) = map(json.loads, lines)
    (hit,) = record["metadata"]["contamination"]
    assert (hit["benchmark"], hit["record"], hit["words"]) == ("gsm8k.jsonl", "2", 30)
    assert hit["document_text"] == hit["benchmark_text"] == records[2]["question"]
    assert record["metadata"]["url"] == "http://x"


def test_report_keeps_the_document_with_its_hits(benchmark):
    records, folder = benchmark
    operation = Decontaminate(benchmarks=(write(folder, records),), action="report")
    ((document,), rejects) = run(operation, f"Some text. {records[3]['question']}")
    assert rejects == []
    assert document.metadata["contamination"][0]["record"] == "3"
    json.dumps(document.metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        *({"contamination": odd} for odd in (0.1, True, "none", ["a", "b"], [{}], {"gsm8k.jsonl": 1})),
        *({"contamination_counts": odd} for odd in (0, {"old": 3}, {"old": {"20": None}}, ["old"])),
        {"contamination_counts": {"old": {"20": 1}}},
        {"contamination": "none", "contamination_counts": {"gsm8k.jsonl": {"20": 1}}},
        {"contamination": [{"benchmark": []}], "contamination_counts": {"old": {"20": 1}}},
    ],
)
def test_what_a_stranger_has_noted_under_the_same_name_is_none_of_ours(benchmark, metadata):
    records, folder = benchmark
    operation = Decontaminate(benchmarks=(write(folder, records),), action="report")
    given = [Document("clean", "nothing of it", metadata=metadata), Document("hit", records[3]["question"])]
    given[1] = dataclasses.replace(given[1], metadata=metadata)
    rejects = []
    clean, hit = operation.apply(iter(given), lambda *_: rejects.append(_))
    assert clean.metadata == metadata
    assert operation.findings(clean) is None
    assert [found["record"] for found in hit.metadata["contamination"]] == ["3"]
    assert hit.metadata["contamination_counts"] == {"gsm8k.jsonl": {"13": 1, "20": 1}}
    assert operation.findings(hit).counts
    assert rejects == []


def test_the_funnel_counts_documents_and_hits_of_each_benchmark(benchmark):
    records, folder = benchmark
    named = (("gsm8k.jsonl", records[:10]), ("math.jsonl", records[10:19]), ("aime.jsonl", records[19:]))
    files = [write(folder, own, name) for name, own in named]
    operation = Decontaminate(benchmarks=tuple(files), fields=("question",))
    step = funnel_step(operation)
    (folder / "task").mkdir()
    account = Account(folder / "task", [step], 0, TokenCounter(None), folder / "progress")
    part = " ".join(records[11]["question"].split()[:15])
    texts = [
        " - ".join(records[n]["question"] for n in range(8)),  # more hits than are listed
        f"{records[8]['question']} and then {records[12]['question']}",
        f"Some words, then {part}.",
        "nothing of it",
    ]
    earlier = {
        "contamination": [{"benchmark": "old"}],
        "contamination_counts": {"old": {"20": 9}, "math.jsonl": {"20": 7}},
    }
    given = [Document(id=f"d{n}", text=text) for n, text in enumerate(texts)]
    given += [Document("e", "clean by now", metadata=earlier), Document("f", "x", metadata={"contamination_counts": 5})]
    kept = list(through(operation, step, iter(given), account))
    assert [document.id for document in kept] == ["d2", "d3", "e", "f"]
    assert kept[2].metadata == {"contamination": [{"benchmark": "old"}], "contamination_counts": {"old": {"20": 9}}}
    columns = ("documents, 13 words", "hits, 13 words", "documents, 20 words", "hits, 20 words")
    table = {"aime.jsonl": (0, 0, 0, 0), "gsm8k.jsonl": (2, 9, 2, 9), "math.jsonl": (2, 2, 1, 1)}
    assert step.counts == {name: dict(zip(columns, row, strict=True)) for name, row in table.items()}
    counts = json.loads(json.dumps(account.close()))
    found = {record["id"]: record["found"] for record in counts["found"][0]}
    assert {name: len(texts) for name, texts in found.items()} == {"d0": 5, "d1": 2, "d2": 1}
    assert found["d2"] == [["15 words in a row of math.jsonl, 11", f"{part}.", part]]
    (row,) = summarise(add_steps([counts, counts]), [counts])["steps"]
    assert row["counts"]["math.jsonl"] == dict(zip(columns, (4, 4, 2, 2), strict=True))


def test_a_record_with_the_same_words_in_another_order_is_a_hit():
    index = NgramIndex([("b", "0", "one two three, and two three four")], 3, False)
    found = index.find("see: one two three four")
    assert [hit.document_text for hit in found.hits] == ["one two three", "two three four"]
    assert found.counts == {"b": 2}


def test_a_passage_of_two_benchmarks_counts_for_both_and_for_one_record_of_either(benchmark):
    records, folder = benchmark
    files = [write(folder, records[:5], "a.jsonl"), write(folder, records[3:], "b.jsonl")]
    copied = [*records[:5], {**records[3], "id": "copy"}]
    files.append(write(folder, copied, "c.jsonl"))
    operation = Decontaminate(benchmarks=tuple(files))
    [(document, _)] = run(operation, f"{records[3]['question']} and {records[9]['question']}")[1]
    hits = [(hit["benchmark"], hit["record"]) for hit in document.metadata["contamination"]]
    assert hits == [("a.jsonl", "3"), ("b.jsonl", "3"), ("c.jsonl", "3"), ("b.jsonl", "9")]
    counts = document.metadata["contamination_counts"]
    assert counts == {f"{name}.jsonl": {"13": hits, "20": hits} for name, hits in (("a", 1), ("b", 2), ("c", 1))}


def test_a_passage_goes_on_over_words_that_an_earlier_record_has_too():
    shared = "one two three four"
    index = NgramIndex([("b", "0", shared), ("b", "1", f"zero {shared} five")], 3, False)
    [hit] = index.find(f"Zero {shared} five").hits
    assert (hit.record, hit.words) == ("1", 6)
    assert [(hit.record, hit.words) for hit in index.find(f"{shared} five").hits] == [("0", 4), ("1", 3)]


def test_numbers_tell_problems_of_one_template_apart(tmp_path):
    problem = "Tom has {} apples and gives {} of them to his sister and then he buys {} more apples at the market today"
    file = write(tmp_path, [{"question": problem.format(3, 1, 5)}])
    other = problem.format(8, 2, 9)
    assert run(Decontaminate(benchmarks=(file,)), other)[1] == []
    assert len(run(Decontaminate(benchmarks=(file,), normalise_numbers=True), other)[1]) == 1


def test_equal_hashes_of_other_words_are_no_hit(monkeypatch):
    real = decontaminate.ngram_hashes
    monkeypatch.setattr(decontaminate, "ngram_hashes", lambda found, n: real(found, n) % 4)
    index = NgramIndex([("b", "0", "one two three four five six")], 3, False)
    assert index.find("seven eight nine ten eleven twelve") == ([], {})


def test_every_text_of_a_record_counts_where_no_field_is_named(tmp_path):
    record = {"q": "one two", "choices": ["three four", {"text": "five six"}], "n": 7}
    ((name, number, text),) = read_records(tmp_path / write(tmp_path, [record]), ())
    assert (name, number, text.split()) == ("gsm8k.jsonl", "line 1", ["one", "two", "three", "four", "five", "six"])


def test_folders_and_compressed_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"question": "x y z"}\n\n'))
    (tmp_path / "b.jsonl").write_text('{"question": "u v w"}\n')
    (tmp_path / "notes.txt").write_text("not this")
    operation = Decontaminate(benchmarks=(str(tmp_path),), ngram=3, report_ngram=0)
    assert [file.name for file in benchmark_files(str(tmp_path))] == ["a.jsonl.gz", "b.jsonl"]
    assert [reason[:41] for _, reason in run(operation, "a X, Y; z", "u v w", "x y w")[1]] == [
        "3 words in a row of a.jsonl.gz, line 1: '",
        "3 words in a row of b.jsonl, line 1: 'u v",
    ]


def test_short_hits_beside_a_long_one_are_listed_too(benchmark):
    records, folder = benchmark
    files = [write(folder, records[:1], "a.jsonl"), write(folder, records[1:3], "b.jsonl")]
    part = " ".join(records[0]["question"].split()[5:20])
    files.append(write(folder, [{"q": part}], "c.jsonl"))
    long = " so. ".join([records[0]["question"]] * 7)  # more hits than are listed
    short = " and ".join(" ".join(records[n]["question"].split()[:15]) for n in (1, 2))
    [(document, _)] = run(Decontaminate(benchmarks=tuple(files[:2])), f"{long} and {short}")[1]
    hits = [(hit["benchmark"], hit["record"], hit["words"]) for hit in document.metadata["contamination"]]
    # Of a.jsonl there are 13 words in a row within each of the long hits, which say so already.
    assert hits == [("a.jsonl", "0", 30)] * MAX_HITS + [("b.jsonl", "1", 15), ("b.jsonl", "2", 15)]
    [(document, _)] = run(Decontaminate(benchmarks=tuple(files)), f"{records[0]['question']} and {part}")[1]
    hits = [(hit["benchmark"], hit["words"]) for hit in document.metadata["contamination"]]
    assert hits == [("a.jsonl", 30), ("c.jsonl", 15), ("a.jsonl", 15), ("c.jsonl", 15)]
    beginning = {"q": " ".join(records[0]["question"].split()[:15])}
    file = write(folder, [beginning, records[0]])
    [(document, _)] = run(Decontaminate(benchmarks=(file,)), records[0]["question"])[1]
    assert [hit["words"] for hit in document.metadata["contamination"]] == [30]


def test_the_recipe_knows_the_benchmarks_by_content(benchmark):
    records, folder = benchmark
    file = write(folder, records)
    before = Decontaminate(benchmarks=(file,)).parameters()
    write(folder, records[1:])
    after = Decontaminate(benchmarks=(file,)).parameters()
    assert before != after
    assert str(folder) not in json.dumps(before)


def test_benchmarks_of_one_name_are_told_apart(benchmark):
    records, folder = benchmark
    files = []
    for n, name in enumerate(("gsm8k/main", "math/main", "aime")):
        (folder / name).mkdir(parents=True)
        files.append(write(folder / name, records[n : n + 1], "test.jsonl"))
    operation = Decontaminate(benchmarks=tuple(files))
    before = operation.parameters()
    names = ["aime/test.jsonl", "gsm8k/main/test.jsonl", "math/main/test.jsonl"]
    assert [name for name, _ in before["benchmarks"]] == names
    _, rejects = run(operation, *(record["question"] for record in records[:3]))
    assert [document.metadata["contamination"][0]["benchmark"] for document, _ in rejects] == [*names[1:], names[0]]
    for n, name in enumerate(("gsm8k/main", "math/main", "aime")):
        file = write(folder / name, records[n : n + 2], "test.jsonl")
        changed = Decontaminate(benchmarks=tuple(files)).parameters()
        assert changed != before, file
        before = changed
    twice = Decontaminate(benchmarks=(str(folder / "aime"), files[2]))
    assert [name for name, _ in twice.parameters()["benchmarks"]] == ["test.jsonl"]
    (folder / "blob").write_bytes(gzip.compress(pathlib.Path(files[2]).read_bytes()))
    (folder / "linked.jsonl.gz").symlink_to("blob")
    _, rejects = run(Decontaminate(benchmarks=(str(folder / "linked.jsonl.gz"),)), records[2]["question"])
    assert rejects[0][0].metadata["contamination"][0]["benchmark"] == "linked.jsonl.gz"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "decontaminate.benchmarks = '{file}, line 1': is no JSON (Expecting"),
        ('{"question": "one"}\n[1]', "decontaminate.benchmarks = '{file}, line 2': is no JSON object; "),
        ('{"other": 1}', "decontaminate.fields = 'question': is no field of {file}, line 1; it has other"),
        ("\xff", "decontaminate.benchmarks = '{file}, line 1': is no JSON ("),
        ("[" * 100_000, "decontaminate.benchmarks = '{file}, line 1': is no JSON ("),
        ('{"question": " "}\n{"question": null}', "decontaminate.benchmarks = '{file}': holds no text in question; "),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, told):
    (tmp_path / "b.jsonl").write_bytes(line.encode("latin-1"))
    operation = Decontaminate(benchmarks=(str(tmp_path / "b.jsonl"),), fields=("question",))
    told = f"^{re.escape(told.format(file=tmp_path / 'b.jsonl'))}"
    with pytest.raises(DataError, match=told):
        run(operation, "text")
    with pytest.raises(DataError, match=told):
        operation.parameters()


def test_a_record_is_read_however_deeply_it_is_nested():
    value = "one"
    for _ in range(5000):
        value = [value, {"more": "two"}]
    assert list(decontaminate._texts(value)) == ["one"] + ["two"] * 5000


def test_a_file_without_records_is_named(benchmark):
    records, folder = benchmark
    (folder / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.jsonl.*holds no record"):
        run(Decontaminate(benchmarks=(write(folder, records), str(folder / "empty.jsonl"))), "text")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"question": "x y z"}\n' * 99)[:-12])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz.*cannot be read"):
        run(Decontaminate(benchmarks=(str(tmp_path),)), "text")


@pytest.mark.parametrize(("lengths", "least"), [((20, 13), 13), ((20, 0), 20), ((8, 13), 8)])
def test_a_benchmark_that_can_never_be_found_is_told(tmp_path, lengths, least):
    generator = random.Random(1)
    records = [{"question": words(generator, n), "answer": "1"} for n in (least - 5, least - 2, 1)]
    long = write(tmp_path, [*records, {"question": words(generator, least), "answer": "1"}], "long.jsonl")
    short = write(tmp_path, records, "short.jsonl")
    ngram, report = lengths
    Decontaminate((long,), ("question",), ngram, report_ngram=report).parameters()
    told = f"{short}': can never be found: its longest record has {least - 2} words, fewer than {least}; leave it out"
    with pytest.raises(DataError, match=re.escape(f"decontaminate.benchmarks = '{told}")):
        Decontaminate((long, short), ("question",), ngram, report_ngram=report).parameters()


@pytest.mark.parametrize("line", ['{"question": ', '{"question": ""}', None], ids=["no JSON", "no text", "a folder"])
def test_a_bad_file_is_told_before_any_document_is_read(tmp_path, line):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("text")
    bad = tmp_path / "bad.jsonl"
    bad.mkdir() if line is None else bad.write_text(line)
    recipe = (Step("decode-utf8"), Step("exact-duplicates"), Step("decontaminate", benchmarks=[str(bad)]))
    given = (Input(kind="folder", path=str(tmp_path / "texts")),)
    source = CuratedSource(name="s", domain="D", level="L2", inputs=given, recipe=recipe)
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        curate(CurationConfig(root=str(tmp_path / "root"), sources=(source,), workers=1), Console(quiet=True))
    assert not list((tmp_path / "root").rglob("*.jsonl.gz"))


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Decontaminate(benchmarks=(str(tmp_path / "gone.jsonl"),)).parameters()
    with pytest.raises(ConfigError, match="action"):
        Decontaminate(benchmarks=("b.jsonl",), action="delete")
    with pytest.raises(ConfigError, match="empty"):
        Decontaminate(benchmarks=())


def test_empty_and_short_documents_pass(benchmark):
    records, folder = benchmark
    kept, rejects = run(Decontaminate(benchmarks=(write(folder, records),)), "", "a few words", "\ud800 odd")
    assert len(kept) == 3
    assert rejects == []
