"""PDF files, notebooks and source files made here, whole and damaged."""

import io
import json
import signal
import time

import pypdf
import pytest
from pypdf.generic import DecodedStreamObject, NameObject
from raw_files import pdf, slow_lzw

from davinci_jax.curation.code import CodeFiles, language_of
from davinci_jax.curation.documents import Document
from davinci_jax.curation.notebooks import NotebookText, fenced
from davinci_jax.curation.pdf import PdfText
from davinci_jax.errors import ConfigError


def run(operation, raw, **metadata):
    rejects = []
    given = Document(id="d", raw=raw, metadata=metadata)
    kept = list(operation.apply(iter([given]), lambda document, reason: rejects.append(reason)))
    return (kept[0] if kept else None), (rejects[0] if rejects else None)


def test_the_text_layer_is_read_page_by_page():
    document, _ = run(PdfText(), pdf(["One line.", "Another."], ["Second page."], title=" A  title "), path="a.pdf")
    assert document.text == "One line.\nAnother.\n\nSecond page."
    assert document.metadata == {"path": "a.pdf", "pages": 2, "pages_without_text": 0, "title": "A title"}
    assert document.raw == b""


def test_a_scanned_file_is_told_from_one_with_some_empty_pages():
    assert run(PdfText(), pdf([], [], []))[1] == "0 of 3 pages have text: scanned, needs character recognition"
    assert run(PdfText(), pdf())[1] == "has no pages"
    assert run(PdfText(), pdf(["a"], [], []))[1].startswith("1 of 3 pages")
    assert run(PdfText(), pdf(["a"], ["b"], []))[0].metadata["pages_without_text"] == 1
    assert run(PdfText(min_text_pages=0.1), pdf(["a"], [], []))[0].text == "a"


def test_pages_are_bounded_and_told():
    document, _ = run(PdfText(max_pages=2), pdf(["a"], ["b"], ["c"]))
    assert document.text == "a\n\nb"
    assert (document.metadata["pages"], document.metadata["pages_left_out"]) == (3, 1)


def test_a_file_has_a_bound_on_its_processor_time():
    """One stream is the content of 3 pages, and pypdf takes some 10 seconds for each: it is damaged, but at its end."""
    writer, content = pypdf.PdfWriter(io.BytesIO(pdf(*[["a"]] * 3))), DecodedStreamObject()
    content.set_data(slow_lzw(10**7))
    content[NameObject("/Filter")] = NameObject("/LZWDecode")
    content = writer._add_object(content)
    for page in writer.pages:
        page[NameObject("/Contents")] = content
    out = io.BytesIO()
    writer.write(out)
    started = time.process_time()
    document, why = run(PdfText(max_seconds=0.5), out.getvalue())
    assert time.process_time() - started < 4
    assert (document, why) == (None, "takes more than 0.5 seconds of processor time")
    assert run(PdfText(), pdf(["a"]))[0].text == "a"
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header", "noise", "locked", "zeros"])
def test_damaged_files_are_rejected_with_a_reason(damage):
    whole = pdf(["One line."])
    raw = {
        "empty": b"",
        "text": b"this is no PDF at all",
        "cut": whole[:60],
        "header": b"%PDF-1.7\n",
        "noise": b"%PDF-1.7\n" + bytes(range(256)) * 20,
        "locked": pdf(["One line."], password="secret"),
        "zeros": b"%PDF-1.4" + b"\x00" * 5000,
    }[damage]
    document, why = run(PdfText(), raw)
    assert document is None
    assert "cannot be read as PDF" in why or "have text" in why
    assert run(PdfText(max_bytes=5), whole)[1] == f"{len(whole)} bytes of PDF, above 5"


def test_a_file_cut_in_the_middle_gives_what_is_left_or_a_reason():
    whole = pdf(*[[f"Line {n}."] for n in range(5)])
    for end in range(0, len(whole), 97):
        document, why = run(PdfText(), whole[:end])
        assert (document is None) != (why is None)


NOTEBOOK = {
    "nbformat": 4,
    "metadata": {"kernelspec": {"language": "python"}},
    "cells": [
        {"cell_type": "markdown", "source": ["# Title\n", "Some *text* ![plot](data:image/png;base64,AAAA)."]},
        {
            "cell_type": "code",
            "source": "print(6 * 7)",
            "outputs": [
                {"output_type": "stream", "text": ["\x1b[31m42\x1b[0m\n"]},
                {"output_type": "display_data", "data": {"image/png": "iVBORw0", "text/plain": ["<Figure>"]}},
                {"output_type": "error", "traceback": ["Traceback"]},
            ],
        },
        {"cell_type": "code", "source": [], "outputs": []},
        {"cell_type": "raw", "source": "raw cell"},
    ],
}


def dumped(notebook):
    return json.dumps(notebook).encode()


def test_cells_in_their_order_with_code_and_output_fenced():
    document, _ = run(NotebookText(), dumped(NOTEBOOK))
    assert document.text == (
        "# Title\nSome *text* plot.\n\n```python\nprint(6 * 7)\n```\n\n```output\n42\n```\n\n"
        "```output\n<Figure>\n```\n\nraw cell"
    )
    assert document.metadata["language"] == "python"
    assert "42" not in run(NotebookText(outputs=False), dumped(NOTEBOOK))[0].text


def test_notebooks_of_format_3():
    cells = [
        {"cell_type": "heading", "level": 2, "source": ["Head"]},
        {"cell_type": "code", "input": ["x = 1"], "outputs": [{"output_type": "pyout", "text": ["1"]}]},
    ]
    old = {"nbformat": 3, "metadata": {}, "worksheets": [{"cells": cells}]}
    assert run(NotebookText(), dumped(old))[0].text == "## Head\n\n```python\nx = 1\n```\n\n```output\n1\n```"


def test_long_output_is_cut_and_fences_hold():
    cell = {
        "cell_type": "code",
        "source": "s = '''\n```\n'''",
        "outputs": [{"output_type": "stream", "text": "y" * 99}],
    }
    text = run(NotebookText(max_output=10), dumped({"cells": [cell]}))[0].text
    assert text == "````python\ns = '''\n```\n'''\n````\n\n```output\nyyyyyyyyyy\n...\n```"
    assert fenced("a\n  ````b", "").startswith("`````\n")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'{"cells": 3}',
        b'{"cells": [3]}',
        b'{"worksheets": [{}]}',
        b"\xff",
        b'{"cells": [{"source": 4}]}',
    ],
)
def test_what_is_no_notebook_is_rejected(raw):
    document, why = run(NotebookText(), raw)
    assert document is None
    assert why == "no text" or why.startswith("is no notebook")


@pytest.mark.parametrize(
    ("path", "raw", "language"),
    [
        ("src/a.py", b"", "python"),
        ("a.tar!/lib/B.HPP", b"", "c++"),
        ("Makefile", b"", "makefile"),
        ("CMakeLists.txt", b"", "cmake"),
        ("bin/tool", b"#!/usr/bin/env python3.11\n", "python"),
        ("bin/tool", b"#!/bin/bash -e\n", "shell"),
        ("bin/tool", b"#!/usr/bin/env -S node --flag\n", "javascript"),
        ("bin/tool", b"\x7fELF", None),
        (".bashrc", b"x", None),
        ("notes.xyz", b"#!/bin/sh\n", None),
    ],
)
def test_languages_by_name_ending_and_first_line(path, raw, language):
    assert language_of(path, raw) == language


def test_source_files_keep_path_and_language():
    document, _ = run(CodeFiles(), b"\xef\xbb\xbfx = 1\r\ny = '\xc3\xa9'\r", path="pkg/a.py")
    assert document.text == "x = 1\ny = 'é'\n"
    assert document.metadata == {"path": "pkg/a.py", "language": "python"}


@pytest.mark.parametrize(
    ("operation", "path", "raw", "told"),
    [
        (CodeFiles(), "a.py", b"x\x00y", "zero byte"),
        (CodeFiles(), "a.py", b"caf\xe9", "not UTF-8 at byte 3"),
        (CodeFiles(), "a.py", b" \n", "empty"),
        (CodeFiles(), "a.bin", b"x", "no known programming language"),
        (CodeFiles(languages=("rust",)), "a.py", b"x", "language python"),
    ],
)
def test_what_is_no_source_is_rejected(operation, path, raw, told):
    assert told in run(operation, raw, path=path)[1]
    assert run(CodeFiles(unknown=True), b"text", path="a.bin")[0].text == "text"


def test_languages_that_no_file_would_be_in_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'python'"):
        CodeFiles(languages=("rust", "Python"))
    assert CodeFiles(languages=("dockerfile", "shell", "c++"))


def test_bounds_that_cannot_be_met():
    for wrong in ({"max_pages": 0}, {"max_bytes": 0}, {"min_text_pages": 2.0}):
        with pytest.raises(ConfigError):
            PdfText(**wrong)
    with pytest.raises(ConfigError):
        NotebookText(max_output=0)
