"""L1: the text layer of PDF files. Scanned pages have none; they need character recognition, which is another step."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import pathlib
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject, is_fatal
from davinci_jax.curation.processor_time import Allowance, OverTime
from davinci_jax.curation.versions import installed
from davinci_jax.errors import ConfigError

_BLANK_LINES = re.compile(r"\n{3,}")


@dataclasses.dataclass(frozen=True)
class PdfText:
    """Extracts the text layer of PDF bytes with pypdf, page by page.

    `metadata["pages"]` counts the pages, `metadata["pages_without_text"]` those that have no text or cannot be read.

    Attributes:
      max_pages: pages that are read of a file; the rest is left out and told in `metadata["pages_left_out"]`.
      max_bytes: a file with more is rejected unread.
      max_seconds: of processor time; a file that takes more is rejected. No file should: the work that a small one can
        make has no end that pypdf would know of.
      min_text_pages: smallest share of pages with text; below it a file counts as scanned and is rejected.
    """

    max_pages: int = 3000
    max_bytes: int = 128 * 2**20
    max_seconds: float = 1800
    min_text_pages: float = 0.5
    name = "pdf-text"
    level = "L1"

    def __post_init__(self):
        bounds = (self.max_pages, self.max_bytes, self.max_seconds)
        if min(bounds) <= 0 or not 0 <= self.min_text_pages <= 1:
            raise ConfigError(
                "pdf-text", dataclasses.asdict(self), "cannot be met", "give positive bounds, a share <= 1"
            )

    def parameters(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "extractor": installed(self.name, "pypdf")}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            if len(document.raw) > self.max_bytes:
                reject(document, f"{len(document.raw)} bytes of PDF, above {self.max_bytes}")
                continue
            try:
                with Bounded(self.max_seconds) as bounded:
                    pages, count, title = self._pages(document.raw, bounded)
            except OverTime:
                reject(document, over_time(self.max_seconds))
                continue
            except Exception as error:  # a damaged file makes the parser raise nearly anything
                if is_trouble(error):
                    raise
                reject(document, f"cannot be read as PDF ({type(error).__name__}: {error})"[:300])
                continue
            if not count:
                reject(document, "has no pages")
                continue
            texts = [page for page in pages if page]
            if not texts or len(texts) < self.min_text_pages * len(pages):
                reject(document, f"{len(texts)} of {len(pages)} pages have text: scanned, needs character recognition")
                continue
            metadata = {**document.metadata, "pages": count, "pages_without_text": len(pages) - len(texts)}
            metadata |= {"pages_left_out": count - len(pages)} if count > len(pages) else {}
            metadata |= {"title": title} if title and "title" not in metadata else {}
            yield document.with_text("\n\n".join(texts), metadata=metadata)

    def _pages(self, raw: bytes, bounded: Bounded) -> tuple[list[str], int, str]:
        """Returns the text of each page that is read, "" where there is none, how many there are, and the title."""
        pages = []
        with bounded.spend():
            reader = open_pdf(raw)
            count = len(reader.pages)
            title = reader.metadata.title if reader.metadata else ""
        for number in range(min(count, self.max_pages)):
            with bounded.spend():
                pages.append(_page_text(reader, number))
        return pages, count, " ".join(str(title or "").split())


def open_pdf(raw: bytes) -> Any:
    """Returns pypdf's reader of PDF bytes; raises nearly anything where they are damaged or locked."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every slip that it mends
    reader = pypdf.PdfReader(io.BytesIO(raw))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it is encrypted")
    return reader


class Bounded:
    """Has pypdf take no more than its time of a file, and the program that it starts for a stream of JBIG2.

    The program has no bound of its own: it is started through a script, made once for a file, that lets it take as
    much as the whole file may. What it takes counts.

    Args:
      seconds: of processor time.
    """

    def __init__(self, seconds: float):
        self._allowance, self._seconds, self._stack = Allowance(seconds), seconds, contextlib.ExitStack()
        self._settings: dict[str, str] = {}

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._allowance.left

    def __enter__(self) -> Bounded:
        program = shutil.which("jbig2dec")
        if program:
            file = pathlib.Path(self._stack.enter_context(tempfile.TemporaryDirectory()), "jbig2dec")
            seconds = math.ceil(self._seconds) + 1  # so that nothing is left when it is stopped
            file.write_text(f'#!/bin/sh\nulimit -t {seconds}\nexec {shlex.quote(program)} "$@"\n', encoding="utf-8")
            file.chmod(0o700)
            self._settings = {"jbig2dec_binary": str(file)}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def spend(self) -> Iterator[None]:
        """Takes what the block uses off what is left; raises `OverTime` in it when nothing is."""
        import pypdf

        with pypdf.apply_configuration(**self._settings), self._allowance.spend():
            yield


def is_trouble(error: Exception) -> bool:
    """Whether an exception is no fault of the file: memory, a disk without room, a package that is not there."""
    return isinstance(error, MemoryError) or is_fatal(error)


def over_time(seconds: float) -> str:
    """Returns the reason of a file that has used up its time."""
    return f"takes more than {seconds:g} seconds of processor time"


def _page_text(reader: Any, number: int) -> str:
    try:
        text = reader.pages[number].extract_text()
    except Exception as error:  # one bad page does not spoil the others
        if is_trouble(error):
            raise
        return ""
    text = text.encode("utf-8", "replace").decode()
    return _BLANK_LINES.sub("\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()
