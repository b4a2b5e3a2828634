"""From documents to a shard set: same input, same bytes; bad input is counted and named; nothing half made."""

import gzip
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from shard_sets import ByteTokenizer

from davinci_jax.data import build
from davinci_jax.data.build import build_shards, token_spans
from davinci_jax.data.documents import is_held_out
from davinci_jax.data.lineage import trace
from davinci_jax.data.manifest import sha256_of, shard_folder
from davinci_jax.data.rows import open_rows
from davinci_jax.data.shards import ShardSet
from davinci_jax.errors import DataError
from davinci_jax.experiment import DataConfig, Source

SOURCE = Source(name="web", domain="General", level="L2", tokens=1e5, loss="answers")
SMALL = {"block_tokens": 64, "shard_bytes": 64 * 2 * 20}


def config(root, source=SOURCE, **fields):
    return DataConfig(**{"root": str(root), "sources": (source,), "heldout": 0.1, "sequence_length": 32, **fields})


def documents(count=300, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for n in range(count):
        text = "".join(rng.choice(list("abcé \n"), rng.integers(1, 120))) + "."
        questions = [[0, len(text) // 3]] if n % 4 == 0 else []
        found.append({"id": f"doc/{n}", "text": text, "questions": questions, "lineage": [{"n": n}, {"name": "made"}]})
    return found


def write(root, lines, name="part.jsonl"):
    folder = pathlib.Path(root) / "documents" / "web"
    folder.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / name).write_bytes(b"\n".join(texts) + b"\n")


def contents(folder):
    return {file.name: sha256_of(file) for file in sorted(pathlib.Path(folder).iterdir()) if file.is_file()}


def test_the_stream_is_the_documents(tmp_path):
    given = documents()
    write(tmp_path, given)
    data = config(tmp_path)
    manifest = build_shards(data, SOURCE, ByteTokenizer(), **SMALL)
    assert manifest.dtype == "uint16"
    assert manifest.lineage == ({"name": "made"},)
    assert (manifest.source, manifest.domain, manifest.level, manifest.rejected) == ("web", "General", "L2", {})
    for split, held in (("train", False), ("heldout", True)):
        mine = [one for one in given if is_held_out(one["id"], 0.1) == held]
        assert mine
        shards = ShardSet(tmp_path / "web", split)
        entry = manifest.splits[split]
        stream = np.concatenate([block.tokens[:-1] for block in shards.read_blocks(np.arange(entry.blocks))])
        expected = [token for one in mine for token in (*one["text"].encode(), 256)]
        assert stream.tolist() == expected
        assert (entry.tokens, entry.documents) == (len(expected), len(mine))
        records = shards.document_records(range(len(mine)))
        assert [(r["id"], r["lineage"], r["level"]) for r in records] == [(o["id"], o["lineage"], "L2") for o in mine]
    assert len(manifest.splits["train"].shards) > 3


def test_questions_are_masked_where_the_source_trains_on_answers(tmp_path):
    text = "What is é? It is a letter."
    write(tmp_path, [{"id": "0", "text": text, "questions": [[0, 10]]}])
    build_shards(config(tmp_path, heldout=0), SOURCE, ByteTokenizer())
    for loss, targets in (("answers", " It is a letter."), ("all", text[1:])):
        source = Source(name="web", domain="General", level="L2", tokens=1e5, loss=loss)
        row = open_rows(config(tmp_path, source, sequence_length=64), 0).read(np.array([0]))
        kept = [label for label in row.labels[0].tolist() if label >= 0]
        assert kept == [*targets.encode(), 256]


def test_a_token_belongs_to_a_question_by_its_first_character():
    offsets = np.array([[0, 3], [3, 6], [6, 9], [9, 12], [12, 12]])
    assert token_spans(offsets, np.array([[2, 4], [5, 6]])).tolist() == [[1, 2]]
    assert token_spans(offsets, np.array([[0, 6], [9, 20]])).tolist() == [[0, 2], [3, 5]]
    assert token_spans(offsets[:0], np.array([[0, 6]])).tolist() == []


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name, workers in (("a", 1), ("b", 3)):
        write(tmp_path / name, documents())
        build_shards(config(tmp_path / name), SOURCE, ByteTokenizer(), workers=workers, **SMALL)
    assert contents(tmp_path / "a" / "web") == contents(tmp_path / "b" / "web")
    assert len(contents(tmp_path / "a" / "web")) > 7


def test_many_batches_keep_the_order(tmp_path, monkeypatch):
    write(tmp_path, documents())
    expected = build_shards(config(tmp_path), SOURCE, ByteTokenizer(), **SMALL)
    (tmp_path / "web").rename(tmp_path / "before")
    monkeypatch.setattr(build, "_BATCH_DOCUMENTS", 7)
    done = []
    assert build_shards(config(tmp_path), SOURCE, ByteTokenizer(), done.append, workers=4, **SMALL) == expected
    assert [progress.documents for progress in done[:-1]] == [7 * n for n in range(1, len(done))]
    assert done[-1].documents == 300
    assert done[-1].tokens == sum(split.tokens for split in expected.splits.values())
    assert done[-1].bytes_read == done[-1].bytes_total


def test_a_set_of_the_same_inputs_is_left_as_it_is(tmp_path):
    write(tmp_path, documents())
    data = config(tmp_path)
    first = build_shards(data, SOURCE, ByteTokenizer(), **SMALL)
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "web").iterdir()}
    assert build_shards(data, SOURCE, ByteTokenizer(), **SMALL) == first
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "web").iterdir()} == times
    with pytest.raises(DataError, match=r"web: holds a shard set that differs in tokenizer; remove the folder"):
        build_shards(data, SOURCE, ByteTokenizer(300), **SMALL)
    with pytest.raises(DataError, match=r"differs in data.heldout"):
        build_shards(config(tmp_path, heldout=0.2), SOURCE, ByteTokenizer(), **SMALL)
    write(tmp_path, documents(seed=1))
    with pytest.raises(DataError, match=r"differs in documents"):
        build_shards(data, SOURCE, ByteTokenizer(), **SMALL)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "web").iterdir()} == times


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    write(tmp_path, documents(20))
    assert build_shards(config(tmp_path), SOURCE, ByteTokenizer(2**16), **SMALL).dtype == "uint16"
    (tmp_path / "web").rename(tmp_path / "16")
    assert build_shards(config(tmp_path), SOURCE, ByteTokenizer(2**16 + 1), **SMALL).dtype == "uint32"
    for folder in ("16", "web"):
        assert (
            ShardSet(tmp_path / folder).read_blocks(np.array([0]))[0].tokens[0] == documents(1)[0]["text"].encode()[0]
        )


def test_bad_lines_are_counted_and_listed(tmp_path):
    good = documents(30)
    bad = [b'{"id": "u", "text": "\xff"}', {"id": "e", "text": ""}, b"{", good[3], {"id": "doc/99"}]
    write(tmp_path, [*good[:10], *bad, *good[10:]])
    write(tmp_path, [good[4], {"id": "new", "text": "t"}], "z.jsonl")
    manifest = build_shards(config(tmp_path), SOURCE, ByteTokenizer(), **SMALL)
    assert manifest.rejected == {"not UTF-8": 1, "empty": 1, "not JSON": 1, "no text": 1, "repeated id": 2}
    assert sum(split.documents for split in manifest.splits.values()) == 31
    listed = [json.loads(line) for line in (tmp_path / "web" / "rejects.jsonl").read_text().splitlines()]
    assert {(r["file"], r["line"], r["id"], r["reason"]) for r in listed} == {
        ("part.jsonl", 11, None, "not UTF-8"),
        ("part.jsonl", 12, "e", "empty"),
        ("part.jsonl", 13, None, "not JSON"),
        ("part.jsonl", 14, "doc/3", "repeated id"),
        ("part.jsonl", 15, "doc/99", "no text"),
        ("z.jsonl", 1, "doc/4", "repeated id"),
    }
    # The documents that are left are those of a clean file.
    write(tmp_path / "clean", [*good, {"id": "new", "text": "t"}])
    clean = build_shards(config(tmp_path / "clean"), SOURCE, ByteTokenizer(), **SMALL)
    assert clean.splits == manifest.splits


def test_no_document_left(tmp_path):
    write(tmp_path, [b"\xff", {"id": "e", "text": " "}, b"{", b"{"])
    with pytest.raises(
        DataError, match=r"has no document to train on \(1 not UTF-8, 1 empty, 2 not JSON\); write one JSON"
    ):
        build_shards(config(tmp_path), SOURCE, ByteTokenizer())
    write(tmp_path, [])
    with pytest.raises(DataError, match=r"has no document to train on \(the files are empty\)"):
        build_shards(config(tmp_path), SOURCE, ByteTokenizer())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["documents"]
    with pytest.raises(DataError, match="does not exist"):
        build_shards(config(tmp_path / "nowhere"), SOURCE, ByteTokenizer())


def test_groups_are_held_out_whole(tmp_path):
    write(tmp_path, [{"id": f"{n}/{k}", "text": "t", "group": f"g{n}"} for n in range(60) for k in range(4)])
    build_shards(config(tmp_path, heldout=0.3), SOURCE, ByteTokenizer())
    groups = {}
    for split in ("train", "heldout"):
        shards = ShardSet(tmp_path / "web", split)
        groups[split] = {r["id"].split("/")[0] for r in shards.document_records(range(shards.entry.documents))}
    assert groups["train"] | groups["heldout"] == {str(n) for n in range(60)}
    assert not groups["train"] & groups["heldout"]
    assert groups["heldout"] == {str(n) for n in range(60) if is_held_out(f"g{n}", 0.3)}


def test_a_damaged_file_leaves_nothing_behind(tmp_path):
    write(tmp_path, documents())
    file = tmp_path / "documents" / "web" / "z.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"id": "z", "text": "z"}\n' * 1000)[:-9])
    with pytest.raises(DataError, match=r"z.jsonl.gz, line \d+: is damaged or cut off"):
        build_shards(config(tmp_path), SOURCE, ByteTokenizer(), **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents"]


def test_a_folder_in_the_way(tmp_path):
    write(tmp_path, documents(5))
    (tmp_path / "web").mkdir()
    build_shards(config(tmp_path), SOURCE, ByteTokenizer())
    other = Source(name="web", domain="General", level="L2", tokens=1e5, path="documents")
    with pytest.raises(DataError, match=r"documents: is in the way: it holds no shard set; move it"):
        build_shards(config(tmp_path, other), other, ByteTokenizer())


def test_paths_of_sources(tmp_path):
    here = Source(name="a", domain="x", level="L0", tokens=1)
    assert shard_folder(config(tmp_path), here) == tmp_path / "a"
    for path, folder in (("pool/a", tmp_path / "pool" / "a"), ("/pool/a", pathlib.Path("/pool/a"))):
        source = Source(name="a", domain="x", level="L0", tokens=1, path=path)
        assert shard_folder(config(tmp_path), source) == folder
    with pytest.raises(DataError, match=r"data.sources\[web\] = '.*/web': does not exist; make it with `davinci shard"):
        open_rows(config(tmp_path), 0)


_KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from shard_sets import ByteTokenizer
from test_data_build import SMALL, SOURCE, config
from davinci_jax.data import build

build._BATCH_DOCUMENTS = 10
def slow(progress):
    print(progress.documents, flush=True)
    time.sleep({pause})
build.build_shards(config({root!r}), SOURCE, ByteTokenizer(), slow, **SMALL)
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    write(tmp_path, documents())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(
            DataError, match=r"train-00000.array_record: cannot be written \(.*File too large\); free the"
        ):
            build_shards(config(tmp_path), SOURCE, ByteTokenizer(), **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents"]


@pytest.mark.slow
def test_a_killed_build_leaves_no_set_and_the_next_one_is_whole(tmp_path):
    write(tmp_path, documents())
    here = os.path.dirname(__file__)
    script = _KILLED.format(tests=here, root=str(tmp_path), pause=60)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline()
    with pytest.raises(DataError, match="web: is being made by another process; wait"):
        build_shards(config(tmp_path), SOURCE, ByteTokenizer(), **SMALL)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "web").exists()
    with pytest.raises(DataError, match="does not exist; make it"):
        open_rows(config(tmp_path), 0)
    time.sleep(0.1)
    again = build_shards(config(tmp_path), SOURCE, ByteTokenizer(), **SMALL)
    write(tmp_path / "whole", documents())
    assert build_shards(config(tmp_path / "whole"), SOURCE, ByteTokenizer(), **SMALL) == again
    assert contents(tmp_path / "web") == contents(tmp_path / "whole" / "web")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "web", "whole"]


def test_no_other_build_gets_in_before_the_end(tmp_path, monkeypatch):
    """A build that starts just when another gives its folder the final name must not empty that folder."""
    tries = []

    def rename(old, new):
        with pytest.raises(DataError, match="web: is being made by another process"), build._new_folder(new):
            pass
        tries.append(new)
        return real(old, new)

    real = pathlib.Path.rename
    monkeypatch.setattr(pathlib.Path, "rename", rename)
    write(tmp_path, documents())
    build_shards(config(tmp_path), SOURCE, ByteTokenizer(), **SMALL)
    assert tries == [tmp_path / "web"]
    ShardSet(tmp_path / "web", "train").verify()
    with pytest.raises(DataError, match="web: was just made by another process"), build._new_folder(tmp_path / "web"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "web"]


def test_a_licence_goes_with_its_document(tmp_path):
    lines = documents(40)
    lines[0]["licence"] = "MIT"
    lines[1]["licence"] = ["MIT"]
    write(tmp_path, lines)
    made = build_shards(config(tmp_path, heldout=0.0), SOURCE, ByteTokenizer(), **SMALL)
    assert made.rejected == {"bad licence": 1}
    rows = open_rows(config(tmp_path, heldout=0.0), 0)
    traced = {document.id: document.licence for row in range(rows.num_rows) for document in trace(rows, row)}
    assert {name: licence for name, licence in traced.items() if licence} == {"doc/0": "MIT"}


def test_best_fit_is_planned_when_shards_are_made(tmp_path):
    write(tmp_path, documents())
    build_shards(config(tmp_path, packing="best_fit"), SOURCE, ByteTokenizer(), **SMALL)
    assert [path.name[:18] for path in (tmp_path / "web").glob("best-fit-*")] == ["best-fit-train-32-"]
    rows = open_rows(config(tmp_path, packing="best_fit"), 0)
    assert type(rows).__name__ == "BestFitRows"
    assert rows.fill > 0.9
    assert type(open_rows(config(tmp_path, packing="best_fit"), 0, "heldout")).__name__ == "ConcatRows"
