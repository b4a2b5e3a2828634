"""Pages that are joined to documents again: their order, those that are missing, and any cut into tasks."""

import asyncio
import base64
import dataclasses
import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib

import curated_corpus
import pypdf
import pytest
import scripted_server
from corpus_passes import run
from raw_files import scanned_pdf, slow_lzw
from rich.console import Console

from davinci_jax.curation import pages as page_module
from davinci_jax.curation import pdf_pages
from davinci_jax.curation.corpus import CorpusOperation
from davinci_jax.curation.documents import Document, read_documents
from davinci_jax.curation.generation.transcribe import Transcribe
from davinci_jax.curation.pages import JoinPages, split_name
from davinci_jax.curation.pdf_pages import PdfPages
from davinci_jax.curation.processor_time import Allowance, OverTime
from davinci_jax.curation.run import curate
from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def pages(name, texts, **more):
    """A page for each number -> text; of one without text the metadata say why."""
    return [
        Document(id=f"{name}/{number:04d}.png", text=text, metadata={"path": f"{name[3:]}/{number:04d}.png", **more})
        for number, text in texts.items()
    ]


def unread(page, why):
    return dataclasses.replace(page, text="", metadata={**page.metadata, "unread": why})


@pytest.mark.parametrize(
    ("name", "document", "number"),
    [
        ("in/book/0003.png", "in/book", 3),
        ("in/book12/0003.png", "in/book12", 3),
        ("in/book.zip!/Page-3.jpeg", "in/book.zip", 3),
        ("in/book.pdf#3", "in/book.pdf", 3),
        ("in/book_p12.webp", "in/book", 12),
        ("in/map3.png", "in/map", 3),
        ("in/3", "in", 3),
        ("in/cover.png", "in/cover.png", None),
        ("in/scan-" + "7" * 30, "in/scan-" + "7" * 30, None),
        ("-" * 100_000 + "x", "-" * 100_000 + "x", None),
        ("7", "7", None),
    ],
)
def test_names_of_pages(name, document, number):
    assert split_name(name) == (document, number)


def test_pages_in_any_order_and_any_tasks_become_one_document(tmp_path):
    assert isinstance(JoinPages(), CorpusOperation)
    one = pages("in/a", {n: f"text {n}\n" for n in (1, 2, 3, 10)}, pages=12)
    one[1] = dataclasses.replace(one[1], licence="MIT", lineage=({"operation": "x"},))
    one[0], one[2] = unread(one[0], "blank page"), unread(one[2], "truncated")
    two, other = pages("in/b", {5: "five", 6: "six"}), Document(id="in/notes.txt", text="notes")
    given = [other, one[3], two[1], one[2], one[0], two[0], one[1]]
    outcomes = []
    for n, cut in enumerate([(given,), (given[:2], [], given[2:5], given[5:])]):
        kept, rejects = run(JoinPages(), cut, tmp_path / str(n))
        assert rejects == []
        outcomes.append([document for task in kept for document in task])
    assert outcomes[0] == outcomes[1]
    notes, second, first = outcomes[0]
    assert notes == other
    assert (second.id, second.text) == ("in/b", "five\n\nsix\n")
    assert second.metadata == {"path": "b", "pages": 2}
    assert first.text == "text 2\n\ntext 10\n"
    assert (first.licence, first.lineage, first.group) == ("MIT", one[1].lineage, "in/a")
    assert [(name, first.text[a:b]) for name, a, b in first.parts] == [(one[1].id, "text 2"), (one[3].id, "text 10")]
    absent = [{"page": a, "to": b, "why": "is not among the pages"} for a, b in ((4, 9), (11, 12))]
    assert first.metadata == {
        "path": "a", "pages": 12, "pages_missing": [{"page": 3, "why": "truncated"}, *absent],
    }  # fmt: skip
    assert Document.from_json(first.to_json()) == first


def test_numbers_far_apart_count_no_pages(tmp_path):
    ((document,),), _ = run(JoinPages(), [pages("in/a", {20260101: "x", 20260731: "y"}, pages=10**15)], tmp_path)
    assert document.text == "x\n\ny\n"
    assert document.metadata["pages"] == 2
    assert "pages_missing" not in document.metadata


def test_a_document_none_of_whose_pages_has_text_is_rejected_page_by_page(tmp_path):
    given = [
        unread(page, why) for page, why in zip(pages("in/a", {1: "", 2: ""}), ("endless", "blank page"), strict=True)
    ]
    kept, rejects = run(JoinPages(), [given], tmp_path)
    assert kept == [[]]
    none = "no page of its document has text; this one:"
    assert rejects == [("in/a/0001.png", f"{none} endless"), ("in/a/0002.png", f"{none} blank page")]


def test_missing_pages_are_told_however_many_where_their_number_is_known(tmp_path):
    """Of a file of 900 pages 5 were taken, of which one came through."""
    given = [*pages("in/a", {4: "four"}, pages=900, pages_left_out=895), *pages("in/b", {3: "x", 90: "y"}, pages=5)]
    ((first, second),), _ = run(JoinPages(), [given], tmp_path)
    assert first.metadata == {"path": "a", "pages": 900, "pages_missing": [
        {"page": 1, "to": 3, "why": "is not among the pages"},
        {"page": 5, "why": "is not among the pages"},
        {"page": 6, "to": 900, "why": "is not read: its file has more than max_pages"},
    ]}  # fmt: skip
    assert second.metadata == {"path": "b", "pages": 2}  # of 5 pages none is page 90


def test_a_document_may_lack_a_share_of_its_pages(tmp_path):
    one, three, two = pages("in/a", {1: "", 2: "two", 4: "four"}, pages=4)
    given = [unread(one, "truncated"), three, two]
    ((book,),), _ = run(JoinPages(max_missing=0.5), [given], tmp_path / "half")
    assert book.metadata["pages"] == 4
    kept, rejects = run(JoinPages(max_missing=0.4), [given], tmp_path / "less")
    why = "2 of 4 pages of its document are missing, above a share of 0.4"
    assert kept == [[]]
    assert rejects == [
        (f"in/a/{n:04d}.png", why + more) for n, more in ((1, "; this one: truncated"), (2, ""), (4, ""))
    ]
    with pytest.raises(ConfigError, match="max_missing"):
        JoinPages(max_missing=1.1)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"max_pages": 2}, "its document has 3 pages, above 2"),
        ({"max_bytes": 14}, "its document has 15 bytes of text, above 14"),
    ],
)
def test_a_document_has_a_bound_on_its_pages_and_bytes(settings, why, tmp_path, monkeypatch):
    first, *more = [*pages("in/a", {1: "first", 2: "zweité", 3: "123"}), *pages("in/b", {1: "b"})]
    (books,), rejects = run(JoinPages(max_pages=3, max_bytes=15), [[first, *more]], tmp_path / "within")
    assert ([book.id for book in books], rejects) == (["in/a", "in/b"], [])
    texts, real = [], page_module._read
    monkeypatch.setattr(page_module, "_read", lambda *place: texts.append(place) or real(*place))
    kept, rejects = run(JoinPages(**settings), [[first], more], tmp_path / "above")
    assert [[book.text for book in books] for books in kept] == [[], ["b\n"]]
    assert rejects == [(f"in/a/{n:04d}.png", why) for n in (1, 2, 3)]
    assert len(texts) == 2  # the pages of a document that is too large never come together in memory


def test_of_two_pages_of_one_number_one_stays_and_the_other_is_told(tmp_path):
    one, two, three = pages("in/a", {1: "one", 2: "two", 3: ""})
    given = [dataclasses.replace(page, id=page.id.replace("png", "jpg")) for page in (one, two, three)]
    given = [three, two, one, given[0], unread(given[1], "truncated"), given[2].with_text("three"), one.with_text("1")]
    for n, cut in enumerate([(given,), (given[:3], given[3:])]):
        kept, rejects = run(JoinPages(), cut, tmp_path / str(n))
        [book] = [book for books in kept for book in books]
        names = ["in/a/0001.jpg", "in/a/0002.png", "in/a/0003.jpg"]
        assert [(name, book.text[a:b]) for name, a, b in book.parts] == list(
            zip(names, ("one", "two", "three"), strict=True)
        )
        assert "pages_missing" not in book.metadata
        other = {"in/a/0003.png": names[2], "in/a/0001.png": names[0], "in/a/0002.jpg": names[1]}
        told = {id: f"is page {id[8]} of in/a, and so is {stays}" for id, stays in other.items()}
        assert dict(rejects) == told
        assert sorted(id for id, _ in rejects) == sorted([*other, "in/a/0001.png"])


def test_documents_whose_names_differ_in_marks_alone_stay_apart(tmp_path):
    names = ["book/1.png", "book/2.png", "book_1.png", "book_2.png", "book-page1.png", "other/1.png"]
    given = [Document(id=f"in/{name}", text=name, metadata={"path": name}) for name in names]
    (books,), rejects = run(JoinPages(), [given], tmp_path)
    assert rejects == []
    assert {book.id: (book.metadata["path"], len(book.parts)) for book in books} == {
        "in/book/": ("book/", 2),
        "in/book_": ("book_", 2),
        "in/book-page": ("book-page", 1),
        "in/other": ("other", 1),
    }
    assert {book.group for book in books} == {book.id for book in books}


def test_no_page_is_lost_where_its_document_cannot_be_made(tmp_path):
    given = [*pages("in/a", {1: "", 2: "two", 3: "three"}), *pages("in/b", {1: "b"})]
    given[1] = dataclasses.replace(given[1], metadata={"score": b"no JSON"})
    (books,), rejects = run(JoinPages(), [given], tmp_path)
    assert [book.id for book in books] == ["in/b"]
    why = "its document cannot be made (TypeError: Object of type bytes is not JSON serializable)"
    assert rejects == [(f"in/a/{n:04d}.png", why) for n in (2, 1, 3)]


@pytest.mark.slow
def test_scanned_pages_come_out_as_one_document(tmp_path):
    """From pictures through the model and back: a page fails, a picture is none, and one is blank."""
    (tmp_path / "scans/book").mkdir(parents=True)
    for n in range(1, 7):
        (tmp_path / f"scans/book/{n}.png").write_bytes(PICTURE + bytes([n]))
    (tmp_path / "scans/book/4.png").write_bytes(b"no picture")

    def script(payload, times):
        n = base64_end(payload)
        said = {2: "no marks", 5: "<PAGE>\n</PAGE>"}
        return said.get(n, f"<PAGE>This is what page {n} says.</PAGE>")

    with scripted_server.serve(script) as server:
        recipe = (Step("transcribe", endpoint=server.url, model="m", unread="keep"), Step("join-pages"))
        given = Input(kind="folder", path=str(tmp_path / "scans"), licence="MIT")
        source = CuratedSource(name="s", domain="D", level="L1", inputs=(given,), recipe=recipe)
        config = CurationConfig(root=str(tmp_path / "out"), sources=(source,), workers=1, task_bytes=900)
        [result] = curate(config, Console(quiet=True))
        asked = len(server.payloads)
    assert asked == 4 + 2  # a blank page is not asked for again
    found = [d for file in sorted((result.folder / "documents").iterdir()) for d in read_documents(file)]
    [book] = found
    assert book.id == "scans/book"
    assert book.text == "".join(f"This is what page {n} says.\n\n" for n in (1, 3, 6)).rstrip() + "\n"
    assert [name for name, _, _ in book.parts] == [f"scans/book/{n}.png" for n in (1, 3, 6)]
    assert book.metadata["pages"] == 6
    missing = [{"page": 2, "why": "malformed"}, {"page": 4, "why": "is no picture in PNG, JPEG or WebP"}]
    assert book.metadata["pages_missing"] == missing
    assert [record["operation"] for record in book.lineage] == ["read-folder", "transcribe", "join-pages"]
    assert (book.level, book.licence) == ("L1", "MIT")
    assert result.funnel["steps"][-1]["documents_in"] == 6
    assert not list(result.folder.rglob("rejects/*/*.gz"))


JPEG = b"\xff\xd8\xff\xe0" + bytes(200)
FULL = (600, 800)
CONFIG = """
from davinci_jax.experiment import CuratedSource, CurationConfig, Input, Step


def config():
    recipe = (
        Step("pdf-pages", max_pages=4),
        Step("transcribe", endpoint={url!r}, model="m", unread="keep"),
        Step("join-pages"),
    )
    source = CuratedSource(
        name="s", domain="D", level="L1", inputs=(Input(kind="pdf", path={scans!r}, name="in"),), recipe=recipe
    )
    return CurationConfig(root={root!r}, sources=(source,), workers={workers}, task_bytes=1)
"""
KILLED = """
import os, signal, sys
from rich.console import Console
from davinci_jax.curation.pages import JoinPages
from davinci_jax.curation.processor_time import Allowance, OverTime
from davinci_jax.curation.run import curate
from davinci_jax.experiment import load_any

JoinPages.reduce = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
curate(load_any(sys.argv[1]), Console(quiet=True))
"""


@pytest.mark.slow
def test_joined_pages_depend_on_no_number_of_workers_and_no_kill(tmp_path):
    """From PDF files through the model and back; one run is killed between the collect and the reduce pass.

    Pictures and texts are large enough that each pass gets its two workers.
    """
    (tmp_path / "scans").mkdir()
    for n in range(3):
        shown = [[(JPEG + bytes(500_000) + bytes([n, page]), *FULL)] for page in range(5)]
        (tmp_path / f"scans/{n}.pdf").write_bytes(scanned_pdf(*shown[:2], [], *shown[3:]))
    texts = [" ".join(random.Random(page).choices(curated_corpus.WORDS, k=120_000)) for page in range(4)]
    with scripted_server.serve(lambda payload, _: f"<PAGE>{texts[base64_end(payload)]}</PAGE>") as server:

        def config(root, workers):
            file = tmp_path / f"{root}.py"
            values = {"url": server.url, "scans": str(tmp_path / "scans"), "root": str(tmp_path / root)}
            file.write_text(CONFIG.format(**values, workers=workers))
            return file

        one, two = (curated_corpus.run(config(root, n)) for n, root in enumerate(("one", "two"), 1))
        killed = config("killed", 1)
        ended = subprocess.run([sys.executable, "-c", KILLED, killed], capture_output=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        [corpus] = (tmp_path / "killed/curated/s").glob("corpus-*")
        assert len(list((corpus / "collected").iterdir())) == 3
        assert not (corpus / "reduced").exists()
        before, asked = {path: path.stat().st_mtime_ns for path in corpus.rglob("*.jsonl")}, len(server.payloads)
        continued = curated_corpus.run(killed)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert len(server.payloads) == asked
    assert curated_corpus.content(one.folder) == curated_corpus.content(two.folder)
    assert curated_corpus.content(one.folder) == curated_corpus.content(continued.folder)
    found = [d for file in sorted((one.folder / "documents").iterdir()) for d in read_documents(file)]
    said = f"{texts[0]}\n\n{texts[1]}\n\n{texts[3]}\n"
    assert [(book.id, book.text == said) for book in found] == [(f"in/{n}.pdf", True) for n in range(3)]
    missing = [(run["page"], run["why"]) for run in found[0].metadata["pages_missing"]]
    assert missing == [
        (3, "is no picture in PNG, JPEG or WebP"),
        (5, "is not read: its file has more than max_pages"),
    ]


def divided(raw, **settings):
    """Pages of a PDF file, or why it is rejected."""
    rejects = []
    document = Document(id="in/a1.pdf", raw=raw, metadata={"path": "a1.pdf"})
    made = list(PdfPages(**settings).apply(iter([document]), lambda _, why: rejects.append(why)))
    return made or rejects[0]


def test_a_scanned_pdf_is_divided_and_joined_again(tmp_path):
    raw = scanned_pdf(
        [(JPEG + b"1", *FULL), (JPEG + b"logo", 99, 99)], [], [(JPEG + b"3", *FULL)], [(JPEG, 10**5, 10**5)]
    )
    made = divided(raw)
    assert [page.id for page in made] == [f"in/a1.pdf#{n}" for n in range(1, 5)]
    assert [page.raw for page in made] == [JPEG + b"1", b"", JPEG + b"3", b""]
    assert {page.group for page in made} == {"in/a1.pdf"}
    read = [page.with_text(f"page {n}\n") for n, page in enumerate(made, 1)]
    read[1] = unread(read[1], "is no picture")
    ((book,),), rejects = run(JoinPages(), [read[:3]], tmp_path)  # the last page got lost on the way
    assert rejects == []
    assert (book.id, book.text) == ("in/a1.pdf", "page 1\n\npage 3\n")
    missing = [{"page": 2, "why": "is no picture"}, {"page": 4, "why": "is not among the pages"}]
    assert book.metadata == {"path": "a1.pdf", "pages": 4, "pages_missing": missing}


def test_pictures_that_are_no_jpeg_become_png():
    image = pytest.importorskip("PIL.Image")
    grey = bytes(range(200)) * 3 * 800
    raw = with_pages(scanned_pdf([(grey, *FULL)], [(grey, *FULL)]), lambda page: page.rotate(90 * page.page_number))
    straight, turned = (image.open(io.BytesIO(page.raw)) for page in divided(raw))
    assert (straight.format, straight.size, straight.tobytes()) == ("PNG", FULL, grey)
    assert turned.size == FULL[::-1]
    assert turned.getpixel((0, 5)) == straight.getpixel((5, 799))


def test_bounds_on_the_pages_of_a_pdf(monkeypatch):
    raw = scanned_pdf(*[[(JPEG, *FULL)]] * 4)
    assert divided(raw, max_bytes=len(raw) - 1).endswith(f"above {len(raw) - 1}")
    assert len(divided(raw, max_pages=2)) == 2
    assert "cannot be read as PDF" in divided(b"%PDF-1.7\n")
    shared = scanned_pdf(*[[(JPEG + bytes(10**6), *FULL)]] * 3)
    assert len(shared) < 1_100_000
    assert [len(page.raw) > 0 for page in divided(shared, max_bytes=2_100_000)] == [True, True, False]
    assert divided(scanned_pdf()) == "has no pages"
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match="pip install pillow"):
        divided(scanned_pdf([(bytes(480_000), *FULL)]))


def test_a_file_has_a_bound_on_all_that_its_pages_unpack_to(monkeypatch):
    unpacked = []
    monkeypatch.setattr(pdf_pages, "_png", lambda page, name: unpacked.append(name) or b"\x89PNG" + bytes(96))
    raw = scanned_pdf(*[[(bytes(480_000), *FULL)]] * 5)
    made = divided(raw, max_file_pixels=3 * 480_000 - 1)
    assert [bool(page.raw) for page in made] == [True, True, False, False, False]
    assert len(unpacked) == 2
    assert {page.metadata.get("unread") for page in made[2:]} == {"is not read: its file has more than max_file_pixels"}
    assert "unread" not in made[1].metadata
    calls, real = [], PdfPages._picture
    monkeypatch.setattr(PdfPages, "_picture", lambda self, *_: calls.append(1) or real(self, *_))
    shared = scanned_pdf(*[[(JPEG + bytes(10**6), *FULL)]] * 5)
    made = divided(shared, max_bytes=2_100_000)
    assert len(calls) == 3
    assert made[4].metadata["unread"] == "is not read: its file has more than max_bytes"


def test_a_picture_that_unpacks_without_end_counts_as_the_largest():
    endless = zlib.compress(bytes(10**8))  # pypdf stops at 75 MB
    raw = with_pages(
        scanned_pdf(*[[(endless + bytes([n]), *FULL)] for n in range(3)]), lambda page: packed(page, "/FlateDecode")
    )
    made = divided(raw, max_pixels=10**6, max_file_pixels=2 * 10**6)
    assert [page.raw for page in made] == [b""] * 3
    assert ["unread" in page.metadata for page in made] == [False, True, True]


def test_a_file_has_a_bound_on_its_processor_time():
    """One picture of 1 MB on 40 pages, which pypdf unpacks anew for each: it is damaged, but at its end."""
    raw = with_pages(scanned_pdf(*[[(slow_lzw(10**6), *FULL)]] * 40), lambda page: packed(page, "/LZWDecode"))
    started = time.process_time()
    made = divided(raw, max_seconds=2.5)
    assert time.process_time() - started < 5
    reasons = [page.metadata.get("unread") for page in made]
    assert reasons[0] is None
    assert set(reasons[10:]) == {"is not read: its file takes more than max_seconds"}
    with pytest.raises(ConfigError, match="max_seconds"):
        PdfPages(max_seconds=0)


def test_the_program_for_jbig2_has_a_bound_on_its_processor_time(tmp_path, monkeypatch):
    """pypdf starts it and waits for as long as it runs."""
    program = tmp_path / "jbig2dec"
    program.write_text("#!/bin/sh\nwhile :; do :; done\n")
    program.chmod(0o700)
    raw = with_pages(scanned_pdf(*[[(b"picture", *FULL)]] * 3), lambda page: packed(page, "/JBIG2Decode"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    made = divided(raw, max_seconds=1)
    assert [page.raw for page in made] == [b""] * 3
    assert {page.metadata["unread"] for page in made} == {"is not read: its file takes more than max_seconds"}
    program.write_text("#!/bin/sh\nexit 1\n")
    assert ["unread" in page.metadata for page in divided(raw, max_seconds=1)] == [False] * 3


def test_the_script_for_jbig2_is_made_once_for_a_file(tmp_path, monkeypatch):
    program = tmp_path / "jbig2dec"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    looked, real = [], shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: looked.append(name) or real(name))
    assert len(divided(scanned_pdf(*[[(JPEG, *FULL)]] * 5))) == 5
    assert looked == ["jbig2dec"]


def test_time_that_is_up_is_told_again_where_python_drops_it(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda *_: None)

    def burn(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    class Finalised:
        def __del__(self):
            burn(0.15)

    def work():
        with Allowance(0.05).spend():
            Finalised()
            burn(5)

    before = signal.getsignal(signal.SIGPROF)
    started = time.process_time()
    with pytest.raises(OverTime):
        work()
    assert time.process_time() - started < 2
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert signal.getsignal(signal.SIGPROF) == before


def test_a_full_disk_is_no_fault_of_a_page(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pdf_pages, "_images", full)
    with pytest.raises(OSError, match="No space left"):
        divided(scanned_pdf([(JPEG, *FULL)]))


def packed(page, name):
    for picture in page["/Resources"]["/XObject"].values():
        picture.get_object()[pypdf.generic.NameObject("/Filter")] = pypdf.generic.NameObject(name)


def test_the_reason_of_an_unread_page_stays_its_own(tmp_path):
    operation = Transcribe(endpoint="replay", model="m", unread="keep")
    page = Document(id="a.pdf#3", metadata={"unread": "is not read"})
    assert asyncio.run(operation.rollout(page, None)) == (None, "is not read")


def test_a_picture_larger_than_the_file_says_is_not_unpacked():
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new("L", (2000, 1000)).save(out, "JPEG")
    turned = with_pages(scanned_pdf([(out.getvalue(), *FULL)]), lambda page: page.rotate(90))
    assert [bool(page.raw) for page in divided(turned)] == [True]
    assert [bool(page.raw) for page in divided(turned, max_pixels=1_000_000)] == [False]


def test_pictures_of_modes_that_png_lacks_become_rgb():
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new("CMYK", FULL, (0, 0, 0, 255)).save(out, "JPEG")
    (page,) = divided(with_pages(scanned_pdf([(out.getvalue(), *FULL)]), lambda page: page.rotate(180)))
    assert image.open(io.BytesIO(page.raw)).mode == "RGB"


def with_pages(raw, change):
    writer = pypdf.PdfWriter(io.BytesIO(raw))
    for page in writer.pages:
        change(page)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def base64_end(payload):
    (content,) = payload["messages"][1]["content"]
    return base64.b64decode(content["image_url"]["url"].split(",")[1])[-1]


def test_unread_pages_are_rejected_or_kept(tmp_path):
    with pytest.raises(ConfigError, match="unread"):
        Transcribe(endpoint="replay", model="m", unread="drop")
    with scripted_server.serve(lambda *_: "<PAGE></PAGE>") as server:
        operation = Transcribe(endpoint=server.url, model="m", store=str(tmp_path))
        rejects = []
        assert not list(operation.apply(iter([Document(id="d", raw=PICTURE)]), lambda d, why: rejects.append(why)))
    assert rejects == ["blank page"]
