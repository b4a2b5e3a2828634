"""The way back from a document to its file, where that has been moved, damaged, repeated or curated anew."""

import json
import pathlib
import shutil
import zipfile

import pytest
from rich.console import Console

from davinci_jax.curation.documents import read_documents
from davinci_jax.curation.origin import find_origin
from davinci_jax.curation.run import curate
from davinci_jax.data.manifest import file_entry
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step

DECODE = (Step("decode-utf8"),)


def made(root, given, recipe=()):
    """Folder of the documents of a source with one input, and its documents."""
    source = CuratedSource(name="s", domain="D", level="L1", inputs=(given,), recipe=recipe)
    curate(CurationConfig(root=str(root), sources=(source,), workers=1), Console(quiet=True))
    folder = root / "curated/s/current/documents"
    return folder, [document for file in sorted(folder.iterdir()) for document in read_documents(file)]


def write_lines(file, *texts, name="x"):
    file.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for text in texts))
    return file


def entries(folder):
    """What the manifest of shards says of documents files."""
    files = [file_entry(file) for file in sorted(folder.iterdir())]
    return [(pathlib.Path(entry.file).name, entry.bytes, entry.sha256) for entry in files]


def test_an_input_that_is_one_file_is_named_once(tmp_path):
    file = write_lines(tmp_path / "j.jsonl", "one text")
    folder, [document] = made(
        tmp_path / "out", Input(kind="jsonl", path=str(file)), (Step("drop-short", characters=1),)
    )
    assert find_origin(folder, document.lineage)[:2] == (f"{file} (x, line 1)", "unchanged")
    inside = tmp_path / "deep/j.jsonl"  # a folder of the name of its file
    inside.mkdir(parents=True)
    shutil.copy(file, inside / "j.jsonl")
    given = Input(kind="jsonl", path=str(inside))
    folder, [document] = made(tmp_path / "deep-out", given, (Step("drop-short", characters=1),))
    assert find_origin(folder, document.lineage).place == f"{inside}/j.jsonl (x, line 1)"


def test_lines_of_one_name_are_told_apart(tmp_path):
    file = write_lines(tmp_path / "j.jsonl", "text one", "text two")
    given = Input(kind="jsonl", path=str(file))
    folder, documents = made(tmp_path / "out", given, (Step("drop-short", characters=1),))
    origins = [find_origin(folder, document.lineage) for document in documents]
    assert [origin.place for origin in origins] == [f"{file} (x, line {n})" for n in (1, 2)]
    assert [origin.state for origin in origins] == ["unchanged", "unchanged"]
    write_lines(file, "text one", "another")
    states = [find_origin(folder, document.lineage).state for document in documents]
    assert states == ["unchanged", "has changed since"]


def test_a_damaged_file_is_one_line(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    with zipfile.ZipFile(raw / "a.zip", "w") as archive:
        archive.writestr("in.txt", "some text")
    folder, [document] = made(tmp_path / "out", Input(kind="folder", path=str(raw)), DECODE)
    (raw / "a.zip").write_bytes(b"PK\n\nno zip")
    state = find_origin(folder, document.lineage).state
    assert state.startswith("cannot be read (BadZipFile")
    assert "\n" not in state
    (raw / "a.zip").unlink()
    (raw / "a.zip").symlink_to("/etc/hostname")
    assert find_origin(folder, document.lineage).state == "is a link that leads out of the folder"


def test_a_file_of_a_package_is_one_of_this_machine(tmp_path):
    given = Input(kind="python-installation", path="rich")
    folder, documents = made(tmp_path, given, DECODE)
    origin = find_origin(folder, documents[-1].lineage)
    assert pathlib.Path(origin.place).is_file()
    assert origin.state == "unchanged"
    card = json.loads((folder.parent / "card.json").read_text())
    card["inputs"][0]["path"] = "package_of_elsewhere"
    (folder.resolve().parent / "card.json").write_text(json.dumps(card))
    place, state, _ = find_origin(folder, documents[-1].lineage)
    assert place.startswith("package_of_elsewhere/")
    assert state == "is not there any more"


def test_the_result_that_shards_were_made_from_is_followed(tmp_path):
    results = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"text of {name}")
        folder, [document] = made(tmp_path / "out", Input(kind="folder", path=str(tmp_path / name), name="raw"), DECODE)
        results.append((folder.resolve(), document, entries(folder)))
    folder = tmp_path / "out/curated/s/current/documents"
    (first, old, files), (_, new, others) = results
    assert find_origin(folder, new.lineage, others)[:2] == (f"{tmp_path}/new/a.txt", "unchanged")
    assert find_origin(folder, old.lineage, files)[:2] == (f"{tmp_path}/old/a.txt", "unchanged")
    shutil.rmtree(first.parent)
    place, state, _ = find_origin(folder, old.lineage, files)
    assert place == f"{tmp_path}/new/a.txt"
    assert state.startswith("has changed since, where the source is read now")


@pytest.mark.slow
def test_a_document_whose_results_have_all_gone_is_never_just_unchanged(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.txt").write_text("some text")
    folder, _ = made(tmp_path / "out", Input(kind="folder", path=str(raw), name="in"), DECODE)
    second = CuratedSource(
        name="t", domain="D", level="L1", inputs=(Input(kind="documents", path=str(folder), name="s"),), recipe=()
    )
    config = CurationConfig(root=str(tmp_path / "out"), sources=(second,), workers=1)
    [first] = curate(config, Console(quiet=True))
    [document] = read_documents(first.folder / "documents/000000.jsonl.gz")
    files, now = entries(first.folder / "documents"), tmp_path / "out/curated/t/current/documents"
    (raw / "b.txt").write_text("some other text")
    made(tmp_path / "out", Input(kind="folder", path=str(raw), name="in"), DECODE)
    curate(config, Console(quiet=True))
    assert find_origin(now, document.lineage, files)[:2] == (f"{raw}/a.txt", "unchanged")
    shutil.rmtree(first.folder)
    place, state, _ = find_origin(now, document.lineage, files)
    assert place == f"{raw}/a.txt"
    assert state.endswith("where the source is read now: what the shards were made from has been replaced since")


@pytest.mark.slow
def test_a_source_made_of_another_is_followed_through_the_result_it_was_made_from(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "old.txt").write_text("some text")
    made(tmp_path / "out", Input(kind="folder", path=str(raw), name="in"), DECODE)
    first = (tmp_path / "out/curated/s/current").resolve()
    path = str(tmp_path / "out/curated/s/current/documents")
    second = CuratedSource(
        name="t", domain="D", level="L1", inputs=(Input(kind="documents", path=path, name="s"),), recipe=()
    )
    [result] = curate(CurationConfig(root=str(tmp_path / "out"), sources=(second,), workers=1), Console(quiet=True))
    [document] = read_documents(result.folder / "documents/000000.jsonl.gz")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/other.txt").write_text("some other text")
    made(tmp_path / "out", Input(kind="folder", path=str(tmp_path / "new"), name="newer"), DECODE)
    for folder in (result.folder / "documents", tmp_path / "out/curated/t/current/documents"):
        assert find_origin(folder, document.lineage)[:2] == (f"{raw}/old.txt", "unchanged")
    shutil.rmtree(first)
    place, state, _ = find_origin(result.folder / "documents", document.lineage)
    assert place == "in/old.txt"
    assert state.endswith(f"where its source is read now: the result {first.name} that it was made from has gone")
