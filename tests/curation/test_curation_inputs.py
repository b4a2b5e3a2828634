"""L0: every kind of input against files that other programs wrote, and inputs that are damaged, hostile or gone."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import random
import tarfile
import tracemalloc
import types
import uuid
import zipfile

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from fastwarc.warc import ArchiveIterator
from hypothesis import given as cases
from hypothesis import strategies as st
from raw_files import git, warc
from rich.console import Console

from davinci_jax.curation import archives, inputs, readers, unpacking
from davinci_jax.curation.documents import Document
from davinci_jax.curation.inputs import acquire, make_plan
from davinci_jax.curation.places import Item
from davinci_jax.curation.registry import build_reader
from davinci_jax.curation.run import curate
from davinci_jax.errors import DataError
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step


def read(kind, path, **options):
    """Returns documents by id, and rejects as id -> reason."""
    given = Input(kind=kind, path=str(path), name="in", options=options)
    source = CuratedSource(name="s", domain="D", level="L0", inputs=(given,), recipe=())
    rejects = {}
    documents = {}
    for task in make_plan(source, build_reader, 2**30).tasks:
        for _, item in task.items:
            for document in acquire(
                source, given, build_reader(given), item, lambda d, why: rejects.update({d.id: why})
            ):
                assert document.id not in documents
                documents[document.id] = document
    return documents, rejects


def test_files_of_a_folder_whatever_compresses_them(tmp_path):
    zst = zstandard.ZstdCompressor().compress
    for ending, compress in {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zst,
    }.items():
        (tmp_path / f"a{len(ending)}{ending[1:]}.txt{ending}").write_bytes(compress(f"text{ending}".encode()))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.HTML").write_bytes(b"<p>")
    documents, rejects = read("folder", tmp_path)
    assert not rejects
    assert {id: document.raw for id, document in documents.items()} == {
        "in/a0.txt": b"text",
        "in/a3gz.txt": b"text.gz",
        "in/a4bz2.txt": b"text.bz2",
        "in/a3xz.txt": b"text.xz",
        "in/a4zst.txt": b"text.zst",
        "in/sub/b.HTML": b"<p>",
    }
    record = documents["in/a3gz.txt"].lineage[0]["parameters"]
    assert record["file"] == "a3gz.txt.gz"
    assert record["native"] == "a3gz.txt"
    assert record["sha256"] == hashlib.sha256(b"text.gz").hexdigest()
    assert set(read("html", tmp_path)[0]) == {"in/sub/b.HTML"}
    assert set(read("folder", tmp_path, suffixes=[".txt"])[0]) == set(documents) - {"in/sub/b.HTML"}


def test_a_single_file_is_an_input(tmp_path):
    (tmp_path / "one.txt").write_text("x")
    assert set(read("folder", tmp_path / "one.txt")[0]) == {"in/one.txt"}


def test_what_is_no_file_of_the_folder_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "good.txt").write_text("x")
    (folder / "inner.txt").symlink_to("good.txt")
    (folder / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "linked").symlink_to(outside)
    (folder / "broken.txt").symlink_to("nothing")
    (folder / "empty.txt").write_text("")
    os.mkfifo(folder / "pipe.txt")
    pathlib.Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("x")
    documents, rejects = read("folder", folder)
    assert sorted(documents) == ["in/good.txt", "in/inner.txt"]
    assert rejects == {
        "in/link.txt": "is a link that leads out of the folder",
        "in/linked/": "is a link to a folder",
        "in/broken.txt": "cannot be read (No such file or directory)",
        "in/empty.txt": "empty",
        "in/pipe.txt": "is no regular file",
        "in/caf\\xe9.txt": "has a name that is not UTF-8",
    }


def test_a_link_to_a_folder_is_told_whatever_is_read(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/sub/linked").symlink_to(tmp_path / "outside")
    (tmp_path / "in/a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "in/a.html").write_text("<p>")
    for kind in ("jsonl", "html"):
        documents, rejects = read(kind, tmp_path / "in")
        assert len(documents) == 1
        assert rejects == {"in/sub/linked/": "is a link to a folder"}


def test_a_file_that_vanished_or_cannot_be_read_is_a_reject(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    given = Input(kind="folder", path=str(tmp_path), name="in")
    source = CuratedSource(name="s", domain="D", level="L0", inputs=(given,), recipe=())
    [task] = make_plan(source, build_reader, 2**30).tasks
    (tmp_path / "a.txt").unlink()
    real = pathlib.Path.open

    def opened(path, *args, **kwargs):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", opened)
    rejects, found = {}, []
    for _, item in task.items:
        found += acquire(source, given, build_reader(given), item, lambda d, why: rejects.update({d.id: why}))
    assert [document.id for document in found] == ["in/c.txt"]
    assert rejects == {
        "in/a.txt": "vanished since it was listed",
        "in/b.txt": "cannot be read (PermissionError: [Errno 13] Permission denied)",
    }


def test_a_folder_that_cannot_be_listed_is_a_reject(tmp_path, monkeypatch):
    (tmp_path / "closed" / "inner").mkdir(parents=True)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.txt").write_text("a")
    real = os.scandir
    closed = [str(tmp_path / "closed")]

    def scandir(path):
        if str(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    documents, rejects = read("folder", tmp_path)
    assert list(documents) == ["in/open/a.txt"]
    assert rejects == {"in/closed/": "cannot be read (Permission denied)"}
    assert read("folder", tmp_path, suffixes=(".txt",))[1] == rejects
    closed.append(str(tmp_path))
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        read("folder", tmp_path)


@pytest.mark.parametrize("ending", ["TXT.GZ", "txt.Bz2", "TGZ", "Tar.XZ", "ZIP"])
def test_endings_are_known_in_capitals_too(tmp_path, ending):
    file = tmp_path / f"A.{ending}"
    kind = ending.lower()
    if kind == "zip":
        write_zip(file, {"a.txt": b"text"})
    elif kind in ("tgz", "tar.xz"):
        write_tar(file, {"a.txt": b"text"}, "w:" + kind.removeprefix("tar.").replace("tgz", "gz"))
    else:
        file.write_bytes({"txt.gz": gzip, "txt.bz2": bz2}[kind].compress(b"text"))
    documents, _ = read("folder", tmp_path)
    assert [document.raw for document in documents.values()] == [b"text"]


def test_a_full_disk_is_no_reject(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def opened(path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inputs.Place, "open", opened)
    with pytest.raises(OSError, match="No space"):
        read("folder", tmp_path)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "warc", "git", "html", "documents"])
def test_a_source_that_is_not_there_is_told(tmp_path, kind):
    with pytest.raises(DataError, match=r"sources\[s\].inputs\[in\].*does not exist"):
        read(kind, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        read(kind, tmp_path / "empty")


def test_a_document_of_a_hundred_megabytes_is_a_reject_and_is_not_held_in_memory(tmp_path):
    page = b"<html><body>" + b"<p>text</p>" * 100
    with gzip.open(tmp_path / "big.html.gz", "wb", compresslevel=1) as out:
        for _ in range(100):
            out.write(page * 1000)
    (tmp_path / "small.html").write_bytes(page)
    tracemalloc.start()
    documents, rejects = read("html", tmp_path, max_bytes=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(documents) == ["in/small.html"]
    assert rejects == {"in/big.html": "more than 1048576 bytes"}
    assert peak < 8 * 2**20


def write_zip(file, members):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(zipfile.ZipInfo(name), raw, zipfile.ZIP_DEFLATED)


def write_tar(file, members, mode):
    with tarfile.open(file, mode) as archive:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


HOSTILE = {
    "/etc/passwd": "an absolute path",
    "../up.txt": "a path that leads out of the archive",
    "a/../../up.txt": "a path that leads out of the archive",
    "..\\up.txt": "a path that leads out of the archive",
    "C:\\x.txt": "an absolute path",
    "inner.zip": "an archive within an archive",
}


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tgz", "tar.xz", "tar.bz2"])
def test_archives_are_read_and_never_unpacked(tmp_path, ending):
    file = tmp_path / f"pack.{ending}"
    members = {"a.txt": b"first", "sub/b.txt": b"second", "big.txt": b"x" * 5000} | dict.fromkeys(HOSTILE, b"evil")
    if ending == "zip":
        write_zip(file, members)
    else:
        write_tar(file, members, "w:" + {"tar": "", "tgz": "gz"}.get(ending, ending.removeprefix("tar.")))
    documents, rejects = read("folder", tmp_path, max_bytes=4000)
    assert {id: document.raw for id, document in documents.items()} == {
        f"in/pack.{ending}!/a.txt": b"first",
        f"in/pack.{ending}!/sub/b.txt": b"second",
    }
    expected = {f"in/pack.{ending}!/{name}": why for name, why in HOSTILE.items()}
    expected[f"in/pack.{ending}!/big.txt"] = "more than 4000 bytes"
    if ending != "zip":
        expected[f"in/pack.{ending}!/link"] = "no regular file"
    assert rejects == expected
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_a_bomb_ends_where_it_passes_its_bound(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(unpacking, "ALLOWANCE", 2**20)
    members = {f"{n:03d}.txt": bytes(2**20) for n in range(60)}
    file = tmp_path / f"bomb.{ending}"
    if ending == "zip":
        write_zip(file, members)
    else:
        write_tar(file, members, "w:gz")
    limit = max(2**20, unpacking.RATIO * file.stat().st_size)
    documents, rejects = read("folder", tmp_path)
    assert sum(len(document.raw) for document in documents.values()) <= limit
    [reason] = rejects.values()
    assert f"holds more than {unpacking.RATIO} times as much" in reason


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_members_that_are_refused_count_towards_the_bound(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(unpacking, "ALLOWANCE", 2**17)
    monkeypatch.setattr(unpacking, "RATIO", 10)
    members = {f"{n:03d}.txt": bytes(2**15) for n in range(60)}
    file = tmp_path / f"bomb.{ending}"
    if ending == "zip":
        write_zip(file, members)
    else:
        write_tar(file, members, "w:gz")
    _, rejects = read("folder", tmp_path, max_bytes=2**14)
    assert "holds more than 10 times as much" in rejects.pop(f"in/{file.name}")
    assert set(rejects.values()) == {"more than 16384 bytes"}
    assert len(rejects) < 20


def hostile_file(folder, kind, count):
    """A file of one kind whose documents are all alike, some a thousand times longer than it."""
    text = "a" * 2**17
    if kind in ("jsonl", "documents"):
        file = folder / "a.jsonl.gz"
        file.write_bytes(gzip.compress("".join(f"{Document(str(n), text).to_json()}\n" for n in range(count)).encode()))
    elif kind == "stack-exchange":
        file = folder / "Posts.xml.gz"
        rows = "".join(f'<row Id="{n}" PostTypeId="1" Title="{text}" />\n' for n in range(count))
        file.write_bytes(gzip.compress(f"<posts>{rows}</posts>".encode()))
    elif kind == "warc":
        file = folder / "a.warc.gz"
        file.write_bytes(warc(*[("response", f"http://x/{n}", b"text/html", text.encode()) for n in range(count)]))
    else:
        file = folder / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": [text] * count}), file, use_dictionary=kind == "parquet")
    return file


@pytest.mark.parametrize("kind", ["jsonl", "documents", "stack-exchange", "warc", "parquet", "parquet-plain"])
def test_a_file_of_lines_or_records_may_not_unpack_to_any_amount(tmp_path, monkeypatch, kind):
    file = hostile_file(tmp_path, kind, 40)
    packed, declared, kind = file.stat().st_size, kind == "parquet-plain", kind.split("-plain")[0]
    assert packed < 2**18
    legitimate = read(kind, tmp_path)  # it is small
    monkeypatch.setattr(unpacking, "ALLOWANCE", 2**21)
    monkeypatch.setattr(readers, "_TABLE_ROWS", 4)
    monkeypatch.setattr(unpacking, "RATIO", 10)
    documents, rejects = read(kind, tmp_path)
    assert sum(len(document.raw or document.text) for document in documents.values()) <= (0 if declared else 2**21)
    assert f"a file of {packed} bytes unpacks to more than 10 times as much" in rejects[f"in/{file.name}"]
    assert len(legitimate[0]) == 40
    assert not legitimate[1]


def test_where_no_size_is_known_what_was_read_counts(monkeypatch):
    monkeypatch.setattr(unpacking, "ALLOWANCE", 2**10)
    data = os.urandom(2**18)
    assert unpacking.unpacked(io.BytesIO(gzip.compress(data)), "a.gz", 0).read() == data
    with pytest.raises(unpacking.Bomb):
        unpacking.unpacked(io.BytesIO(gzip.compress(bytes(2**24))), "a.gz", 0).read()


def test_lines_before_a_damage_are_read(tmp_path):
    lines = "".join(json.dumps({"id": str(n), "text": os.urandom(30).hex()}) + "\n" for n in range(4000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-1000])
    documents, rejects = read("jsonl", tmp_path)
    assert len(documents) > 3900
    assert "EOFError" in rejects["in/a.jsonl.gz"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_bomb_of_headers_is_not_read_into_memory(tmp_path, kind):
    value = b"x" * (32 * 2**20)
    head = tarfile.TarInfo("head")
    head.type, head.size = kind, len(value)
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.addfile(tarfile.TarInfo("first.txt"))
        archive.addfile(head, io.BytesIO(value))
        archive.addfile(tarfile.TarInfo("last.txt"))
    tracemalloc.start()
    _, rejects = read("folder", tmp_path, max_bytes=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rejects.pop("in/bomb.tar.gz!/first.txt") == "empty"
    assert list(rejects) == ["in/bomb.tar.gz"]
    assert "its headers have more than" in rejects["in/bomb.tar.gz"]
    assert peak < 8 * 2**20


def test_long_names_and_many_members_of_a_tar(tmp_path):
    names = {f"{'d/' * 1000}{n}.txt": b"x" * 3000 for n in range(400)}
    write_tar(tmp_path / "pack.tar.gz", names | {"y" * 5000: b"y", "last.txt": b"z"}, "w:gz")
    documents, rejects = read("folder", tmp_path)
    assert len(documents) == 401
    assert f"in/pack.tar.gz!/{'y' * 100}...{'y' * 100}" in rejects
    assert "a name of more than 4096 bytes" in rejects.values()


def test_a_zip_of_another_method_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("a.txt", b"x" * 1000, zipfile.ZIP_BZIP2)
        archive.writestr("b.txt", b"y")
    documents, rejects = read("folder", tmp_path)
    assert [*documents] == ["in/pack.zip!/b.txt"]
    assert rejects == {"in/pack.zip!/a.txt": "compressed by a method that is not read"}


def test_damaged_archives_and_files_are_rejects(tmp_path):
    write_zip(tmp_path / "good.zip", {"a.txt": b"x" * 1000})
    whole = (tmp_path / "good.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    (tmp_path / "no.tar.gz").write_bytes(b"no archive")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:-900])
    documents, rejects = read("folder", tmp_path)
    assert sorted(documents) == ["in/good.zip!/a.txt"]
    assert sorted(rejects) == ["in/cut.txt.gz", "in/cut.zip", "in/no.tar.gz"]
    assert all(reason.startswith("cannot be read (") for reason in rejects.values())


@cases(st.text(min_size=1, max_size=30))
def test_a_safe_name_stays_below_its_folder(name):
    if not archives.unsafe(name):
        base = pathlib.PurePosixPath("/base")
        joined = os.path.normpath(base / name.replace("\\", "/"))
        assert joined == "/base" or joined.startswith("/base/")


def test_json_lines(tmp_path):
    lines = [
        b'{"id": "a", "text": "one", "url": "http://x", "licence": "MIT", "metadata": {"score": 2.5}}',
        b'{"text": "two"}',
        b"",
        b"{",
        b"[1]",
        b'{"id": "b"}',
        b'{"id": "c", "text": "\\ud800"}',
        b'{"id": "d", "text": ""}',
        b'{"text": "' + b"x" * 300 + b'"}',
        '{"id": 7, "text": "é"}'.encode("latin-1"),
        b'{"id": 7, "text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    documents, rejects = read("jsonl", tmp_path, max_bytes=200)
    assert {id: document.text for id, document in documents.items()} == {
        "in/a": "one",
        "in/a.jsonl#2": "two",
        "in/7": "last",
    }
    first = documents["in/a"]
    assert first.licence == "MIT"
    assert first.metadata["url"] == "http://x"
    assert first.metadata["score"] == 2.5
    assert first.lineage[0]["parameters"]["line"] == 1
    assert {id.rpartition("#")[2] or id: reason[:30] for id, reason in rejects.items()} == {
        "4": "line 4 is no JSON (Expecting p",
        "5": "line 5 is no JSON object",
        "6": "no text in 'text'",
        "in/c": "holds half of a surrogate pair",
        "in/d": "empty",
        "9": "line of more than 200 bytes",
        "10": "line 10 is no JSON ('utf-8' co",
    }
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"content": "x"}\n'))
    assert read("jsonl", tmp_path / "b.jsonl.gz", text="content")[0]["in/b.jsonl.gz#1"].text == "x"


def test_parquet(tmp_path):
    import datetime

    table = pyarrow.table(
        {
            "id": ["a", "b", None],
            "text": ["one", "two", "three"],
            "date": [datetime.date(2026, 1, 2)] * 3,
            "raw": [b"\x00"] * 3,
            "tags": [["x", "y"]] * 3,
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    documents, rejects = read("parquet", tmp_path)
    assert {id: document.text for id, document in documents.items()} == {
        "in/a": "one",
        "in/b": "two",
        "in/t.parquet#3": "three",
    }
    assert documents["in/a"].metadata["date"] == "2026-01-02"
    assert documents["in/a"].metadata["tags"] == ["x", "y"]
    json.dumps(dict(documents["in/a"].metadata))
    assert list(rejects) == ["in/bad.parquet"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_level_of_a_stranger_is_believed_where_its_field_is_named(kind, tmp_path):
    rows = [{"id": id, "text": "text", "level": level} for id, level in (("a", "L5"), ("b", "Level 3"))]
    if kind == "jsonl":
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    outcomes = []
    for options in ({}, {"level": "level"}):
        documents, rejects = read(kind, tmp_path, **options)
        assert rejects == {}
        outcomes.append({id: (found.level, found.metadata.get("level")) for id, found in documents.items()})
    assert outcomes[0] == {"in/a": ("L0", "L5"), "in/b": ("L0", "Level 3")}
    assert outcomes[1] == {"in/a": ("L5", None), "in/b": ("L0", "Level 3")}


def test_metadata_that_is_no_json_costs_its_document_alone(tmp_path, monkeypatch):
    columns = {"text": ["one", "two"], "name": pyarrow.array([b"0" * 16, None], pyarrow.uuid())}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    documents, rejects = read("parquet", tmp_path)
    assert [document.metadata.get("name") for document in documents.values()] == [str(uuid.UUID(bytes=b"0" * 16)), None]
    assert rejects == {}
    monkeypatch.setattr(readers, "_plain", lambda value: value)  # a reader that is less careful
    documents, rejects = read("parquet", tmp_path)
    assert list(documents) == ["in/t.parquet#2"]
    assert rejects == {"in/t.parquet#1": "has metadata that is no JSON (Object of type UUID is not JSON serializable)"}


def test_a_line_that_is_no_document_costs_itself_alone(tmp_path):
    whole = {"id": "a", "text": "one", "level": "L4", "group": "a", "lineage": []}
    whole |= {"licence": "MIT", "questions": [[0, 1]], "parts": [["p", 1, 3]], "metadata": {}, "raw": "eA=="}
    odd = [{"level": 7}, {"level": None}, {"text": None}, {"id": 3}, {"metadata": []}, {"other": 1}]
    odd += [{"licence": ["MIT"]}, {"licence": 1}, {"lineage": [1]}, {"lineage": 1}, {"lineage": "abc"}, {"raw": 1}]
    odd += [{"questions": spans} for spans in (3, [3], [[0]], [[0, 4]], [[-1, 2]], [[2, 1]], [[0, 1.0]], [["p", 0, 1]])]
    odd += [{"parts": spans} for spans in ([[0, 1]], [[1, 0, 1]], [["p", 0, "1"]], [["p", 0, 4]], [[["p"], 0, 1]])]
    lines = [
        json.dumps(whole).encode(),
        b"{",
        json.dumps({**whole, "other": "x" * 10}).encode().replace(b"x", b"\xff"),
        json.dumps({**whole, "text": "x" * 500}).encode(),
        b"[]",
        *(json.dumps({**whole, **field}).encode() for field in odd),
        json.dumps({**whole, "id": "b"}).encode(),
    ]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines[0].replace(b'"a"', b'"c"') + b"\n"))
    documents, rejects = read("documents", tmp_path, max_bytes=400)
    assert {id: document.level for id, document in documents.items()} == {"a": "L4", "b": "L4", "c": "L4"}
    assert list(rejects) == [f"in/d.jsonl#{n}" for n in range(2, len(lines))]
    assert rejects["in/d.jsonl#4"] == "line of more than 400 bytes"
    assert rejects["in/d.jsonl#6"] == "is no document of curation (its level is 7)"
    assert documents["a"].parts == (("p", 1, 3),)


@pytest.fixture
def result(tmp_path):
    """The documents of a source of three tasks, and what curates it."""
    (tmp_path / "raw").mkdir()
    for name in "abc":
        (tmp_path / "raw" / f"{name}.txt").write_text(f"text {name}")
    given = Input(kind="folder", path=str(tmp_path / "raw"), name="raw")
    recipe = (Step("decode-utf8"),)
    source = CuratedSource(name="first", domain="D", level="L1", inputs=(given,), recipe=recipe)
    other = Input(kind="documents", path=str(tmp_path / "root/curated/first/current/documents"), name="first")
    second = CuratedSource(name="second", domain="D", level="L1", inputs=(other,), recipe=())

    def run(*sources):
        config = CurationConfig(root=str(tmp_path / "root"), sources=sources, workers=1, task_bytes=1)
        return curate(config, Console(quiet=True))

    run(source)
    return tmp_path / "root/curated/first/current/documents", source, second, run


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "line", "gone"])
def test_a_damaged_file_of_another_source_ends_the_run_and_can_be_made_again(result, damage):
    folder, first, second, run = result
    file = folder / "000001.jsonl.gz"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "line":
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()) + b'{"id": "x"}\n'))
    else:
        file.unlink()
    with pytest.raises(DataError, match=r"000001\.jsonl\.gz'.*remove it and run `davinci curate`") as told:
        run(second)
    assert "\n" not in str(told.value)
    file.unlink(missing_ok=True)
    assert [made.funnel["documents"] for made in run(first, second)] == [3, 3]


def test_warc(tmp_path):
    data = warc(
        ("response", "http://x/a", b"text/html; charset=latin-1", b"<p>caf\xe9</p>"),
        ("request", "http://x/b", b"text/html", b"no page"),
        ("response", "http://x/c", b"image/png", b"\x89PNG"),
        ("response", "http://x/d", b"text/html", b"<p>" * 200),
    )
    (tmp_path / "a.warc.gz").write_bytes(data)
    assert len(list(ArchiveIterator(io.BytesIO(data)))) == 4
    documents, rejects = read("warc", tmp_path, max_bytes=500)
    [page] = documents.values()
    assert page.raw == b"<p>caf\xe9</p>"
    assert page.metadata["url"] == "http://x/a"
    assert page.metadata["charset"] in ("latin-1", "iso-8859-1")
    assert page.metadata["time"] == "2026-01-02T03:04:05Z"
    assert page.lineage[0]["parameters"]["url"] == "http://x/a"
    assert list(rejects.values()) == ["more than 500 bytes"]


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repositories" / "one"
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    (folder / "a.py").write_text("x = 1\n")
    (folder / "sub").mkdir()
    (folder / "sub/with space é.py").write_text("y = 2\n")
    (folder / "data.bin").write_bytes(b"\x00" * 5000)
    (folder / "link.py").symlink_to("/etc/passwd")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_git_repositories(repository, tmp_path):
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "a.py").write_text("not committed")
    git(tmp_path / "repositories", "clone", "-q", "--bare", "one", "two.git")
    broken = tmp_path / "repositories" / "broken"
    git(tmp_path / "repositories", "init", "-q", "broken")
    documents, rejects = read("git", tmp_path / "repositories", max_bytes=4000)
    names = [f"in/{name}/{path}" for name in ("one", "two.git") for path in ("a.py", "sub/with space é.py")]
    assert sorted(documents) == sorted(names)
    assert documents["in/one/a.py"].raw == b"x = 1\n"
    assert documents["in/one/a.py"].metadata["path"] == "a.py"
    assert documents["in/one/a.py"].lineage[0]["parameters"]["commit"] == commit
    assert rejects == {
        "in/broken": "has no revision 'HEAD'",
        "in/one/data.bin": "more than 4000 bytes",
        "in/two.git/data.bin": "more than 4000 bytes",
    }
    assert broken.is_dir()
    assert set(read("git", repository, suffixes=[".py"])[0]) == {"in/a.py", "in/sub/with space é.py"}


def test_a_broken_repository_is_not_taken_for_the_one_around_it(repository):
    inner = repository / "vendor" / "inner"
    (inner / ".git").mkdir(parents=True)
    (inner / "b.py").write_text("z = 3\n")
    git(repository, "add", "-f", "vendor/inner/b.py")
    git(repository, "commit", "-q", "-m", "second")
    documents, rejects = read("git", repository / "vendor")
    assert documents == {}
    assert rejects == {"in/inner": "has no revision 'HEAD'"}


def test_worktrees_and_submodules_are_repositories(repository, tmp_path):
    git(repository, "worktree", "add", "-q", "-b", "other", str(tmp_path / "trees" / "other"))
    documents, _ = read("git", tmp_path / "trees")
    assert sorted(documents) == ["in/other/a.py", "in/other/data.bin", "in/other/sub/with space é.py"]


def test_a_repository_runs_no_program_of_its_own(repository, tmp_path):
    mark = tmp_path / "ran"
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\ntouch {mark}\n")
    script.chmod(0o755)
    for name in (
        "core.fsmonitor",
        "core.sshCommand",
        "core.pager",
        "diff.external",
        "filter.x.smudge",
        "filter.x.clean",
    ):
        git(repository, "config", name, str(script))
    (repository / ".git/hooks/post-checkout").write_bytes(script.read_bytes())
    (repository / ".gitattributes").write_text("* filter=x diff=x\n")
    assert len(read("git", repository)[0]) == 3
    assert not mark.exists()


def test_an_address_is_read_like_a_folder():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/a.txt": b"one", "/bucket/sub/b.txt": b"two", "/other/c.txt": b"three"})
    documents, rejects = read("folder", "memory://bucket")
    assert {id: document.raw for id, document in documents.items()} == {"in/a.txt": b"one", "in/sub/b.txt": b"two"}
    assert not rejects
    assert documents["in/a.txt"].metadata["time"]
    assert set(read("folder", "memory://bucket/a.txt")[0]) == {"in/a.txt"}
    with pytest.raises(DataError, match="does not exist or is empty"):
        read("folder", "memory://nothing")
    with pytest.raises(DataError, match="cannot be opened"):
        read("folder", "nosuchscheme://x")


def test_tasks_are_cut_by_bytes_and_hold_every_file_once(tmp_path):
    for n in range(10):
        (tmp_path / f"{n}.txt").write_bytes(bytes(10 * n))
    given = Input(kind="folder", path=str(tmp_path))
    source = CuratedSource(name="s", domain="D", level="L0", inputs=(given,), recipe=())
    plan = make_plan(source, build_reader, 100)
    names = [[item.path for _, item in task.items] for task in plan.tasks]
    assert [name for task in names for name in task] == [f"{n}.txt" for n in range(10)]
    assert all(sum(item.size for _, item in task.items) <= 100 for task in plan.tasks)
    assert [plan.read_task(line) for line in plan.to_lines()] == list(plan.tasks)
    assert (plan.files, plan.bytes) == (10, 450)


@pytest.mark.parametrize(
    "sizes", [(1,), (7, 17), (10,), (12,), (12, 16), (20,), (22,), (25,), (22, 31), (31,), (1, 64)]
)
def test_a_file_more_or_less_leaves_most_tasks_as_they_were(sizes):
    """However many files of these sizes make a task of 64 bytes."""
    given = Input(kind="folder", path="any")
    source = CuratedSource(name="s", domain="D", level="L0", inputs=(given,), recipe=())
    chance = random.Random(0)
    items = [Item(f"{n:03d}.txt", chance.randint(sizes[0], sizes[-1])) for n in range(400)]
    reader = types.SimpleNamespace(items=lambda _: items)

    def tasks():
        return set(make_plan(source, lambda *_: reader, 64).to_lines())

    before = tasks()
    total = sum(item.size for item in items)
    assert total / 64 <= len(before) < 2 * total / 64
    new = []
    for n in range(0, 400, 10):
        items.insert(n, Item(f"{n:03d}-new.txt", sizes[0]))
        new.append(len(tasks() - before))
        del items[n]
    assert max(new) < 8
    assert sum(new) / len(new) < 3
