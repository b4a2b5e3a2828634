"""Documents files: what is read, and what is left out with its line and reason."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from davinci_jax.data.documents import DocumentReader, SeenIds, is_held_out
from davinci_jax.errors import DataError


def read(folder, *names):
    rejects = []
    reader = DocumentReader([folder / name for name in names], folder, "L3", rejects.append)
    return list(reader), rejects, reader


def test_documents_with_and_without_optional_fields(tmp_path):
    lines = [
        {
            "id": "a",
            "text": "zwölf\n",
            "level": "L5",
            "group": "g",
            "questions": [[3, 5], [0, 2]],
            "lineage": [{"name": "x"}],
        },
        {"id": "b", "text": "t", "lineage": {"name": "y"}, "url": "ignored"},
    ]
    (tmp_path / "d.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines))
    (a, b), rejects, reader = read(tmp_path, "d.jsonl")
    assert (a.id, a.text, a.text_bytes, a.level, a.group, a.file, a.line) == (
        "a",
        "zwölf\n",
        7,
        "L5",
        "g",
        "d.jsonl",
        1,
    )
    assert (b.level, b.group, b.line, b.lineage) == ("L3", "b", 3, [{"name": "y"}])
    assert a.questions.tolist() == [[0, 2], [3, 5]]
    assert b.questions.shape == (0, 2)
    assert rejects == []
    assert reader.bytes_read == (tmp_path / "d.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("line", "id", "reason"),
    [
        (b'{"id": "x", "text": "\xff"}', None, "not UTF-8"),
        (b'{"id": "x", "text": "\\ud800"}', "x", "not UTF-8"),
        (b'{"id": "\\udc00", "text": "t"}', None, "not UTF-8"),
        (b'{"id": "x", "text": "t", "group": 3}', "x", "bad group"),
        (b'{"id": "x", "text": "t"', None, "not JSON"),
        (b"[" * 100_000, None, "not JSON"),
        (b'["id"]', None, "not a JSON object"),
        (b'{"text": "t"}', None, "no id"),
        (b'{"id": 7, "text": "t"}', None, "no id"),
        (b'{"id": "x"}', "x", "no text"),
        (b'{"id": "x", "text": null}', "x", "no text"),
        (b'{"id": "x", "text": ""}', "x", "empty"),
        (b'{"id": "x", "text": " \\n"}', "x", "empty"),
        (b'{"id": "x", "text": "t", "level": "best"}', "x", "no Darwin level"),
        (b'{"id": "x", "text": "t", "questions": [[0, 2]]}', "x", "bad question spans"),
        (b'{"id": "x", "text": "t", "questions": [[1, 0]]}', "x", "bad question spans"),
        (b'{"id": "x", "text": "t", "questions": [["a", null]]}', "x", "bad question spans"),
        (b'{"id": "x", "text": "t", "questions": 1}', "x", "bad question spans"),
        (b'{"id": "x", "text": "t", "questions": [[NaN, 1]]}', "x", "bad question spans"),
        (b'{"id": "x", "text": "t", "questions": [[0, Infinity]]}', "x", "bad question spans"),
    ],
)
def test_lines_that_are_no_document(tmp_path, line, id, reason):
    good = b'{"id": "good", "text": "t"}\n'
    (tmp_path / "d.jsonl").write_bytes(good + line + b"\n" + good.replace(b"good", b"later"))
    documents, rejects, _ = read(tmp_path, "d.jsonl")
    assert [document.id for document in documents] == ["good", "later"]
    assert [(r.file, r.line, r.id, r.reason) for r in rejects] == [("d.jsonl", 2, id, reason)]


def test_compressed_files_and_files_in_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    with gzip.open(tmp_path / "sub" / "d.jsonl.gz", "wt") as out:
        out.writelines(json.dumps({"id": str(n), "text": "t" * n}) + "\n" for n in range(1, 2000))
    (tmp_path / "e.jsonl").write_text('{"id": "last", "text": "t"}')
    documents, _, reader = read(tmp_path, "sub/d.jsonl.gz", "e.jsonl")
    assert [document.id for document in documents] == [*map(str, range(1, 2000)), "last"]
    assert documents[0].file == "sub/d.jsonl.gz"
    assert reader.bytes_read == sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())


def test_a_compressed_file_that_is_cut_off_or_damaged(tmp_path):
    whole = gzip.compress(b"".join(b'{"id": "%d", "text": "%d"}\n' % (n, n * n) for n in range(5000)))
    for damaged in (whole[: len(whole) // 2], b"plain" + whole, whole[:200] + bytes(300) + whole[500:]):
        (tmp_path / "d.jsonl.gz").write_bytes(damaged)
        with pytest.raises(
            DataError, match=r"d.jsonl.gz, line \d+: is damaged or cut off \(.*\); write the file again"
        ):
            read(tmp_path, "d.jsonl.gz")


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 40).map(str), max_size=12), max_size=12))
def test_repeated_ids_are_found_across_batches(batches):
    seen, known = SeenIds(), set()
    for batch in batches:
        expected = []
        for id in batch:
            expected.append(id not in known)
            known.add(id)
        assert seen.add(batch).tolist() == expected


def test_seen_ids_stay_few_arrays():
    seen = SeenIds()
    for n in range(200):
        seen.add([f"{n}/{k}" for k in range(50)])
    assert sum(map(len, seen._sorted)) == 10_000
    assert len(seen._sorted) <= 10


def test_held_out_share():
    held = np.array([[is_held_out(f"document {n}", share) for n in range(20_000)] for share in (0.0, 0.01, 0.5)])
    assert held[0].sum() == 0
    # Binomial: 200 +- 4 x 14 and 10000 +- 4 x 71.
    assert abs(held[1].sum() - 200) < 57
    assert abs(held[2].sum() - 10_000) < 283
    assert held[2][held[1]].all(), "a larger share keeps what a smaller one held out"
