"""L1: the text layer of PDF files. Scanned pages have none; they need character recognition, which is another step."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
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
      min_text_pages: smallest share of pages with text; below it a file counts as scanned and is rejected.
    """

    max_pages: int = 3000
    max_bytes: int = 128 * 2**20
    min_text_pages: float = 0.5
    name = "pdf-text"
    level = "L1"

    def __post_init__(self):
        if self.max_pages < 1 or self.max_bytes < 1 or not 0 <= self.min_text_pages <= 1:
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
                pages, count, title = self._pages(document.raw)
            except Exception as error:  # a damaged file makes the parser raise nearly anything
                if isinstance(error, (MemoryError, ImportError)):
                    raise
                reject(document, f"cannot be read as PDF ({type(error).__name__}: {error})"[:300])
                continue
            texts = [page for page in pages if page]
            if not texts or len(texts) < self.min_text_pages * len(pages):
                reject(document, f"{len(texts)} of {len(pages)} pages have text: scanned, needs character recognition")
                continue
            metadata = {**document.metadata, "pages": count, "pages_without_text": len(pages) - len(texts)}
            metadata |= {"pages_left_out": count - len(pages)} if count > len(pages) else {}
            metadata |= {"title": title} if title and "title" not in metadata else {}
            yield document.with_text("\n\n".join(texts), metadata=metadata)

    def _pages(self, raw: bytes) -> tuple[list[str], int, str]:
        """Returns the text of each page that is read, "" where there is none, how many there are, and the title."""
        reader = open_pdf(raw)
        count = len(reader.pages)
        pages = [_page_text(reader, number) for number in range(min(count, self.max_pages))]
        title = reader.metadata.title if reader.metadata else ""
        return pages, count, " ".join(str(title or "").split())


def open_pdf(raw: bytes) -> Any:
    """Returns pypdf's reader of PDF bytes; raises nearly anything where they are damaged or locked."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every slip that it mends
    reader = pypdf.PdfReader(io.BytesIO(raw))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it is encrypted")
    return reader


def _page_text(reader: Any, number: int) -> str:
    try:
        text = reader.pages[number].extract_text()
    except Exception as error:  # one bad page does not spoil the others
        if isinstance(error, MemoryError):
            raise
        return ""
    text = text.encode("utf-8", "replace").decode()
    return _BLANK_LINES.sub("\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()
