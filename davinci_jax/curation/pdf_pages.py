"""L1: scanned PDF files as pictures of their pages, for a model that reads them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pdf import open_pdf
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.versions import installed
from davinci_jax.errors import DataError
from davinci_jax.experiment import checks


@dataclasses.dataclass(frozen=True)
class PdfPages:
    """Divides PDF bytes into pages: of each the largest picture that it shows, nothing else of it.

    Page 3 of "a.pdf" is the document "a.pdf#3", and `metadata["pages"]` counts the pages of the file, so that
    `join-pages` can put them together again. A page without a picture that fills it goes on without bytes: who reads
    it says that it is none. JPEG stays as it is; other pictures, and turned ones, become PNG with the package Pillow.

    Attributes:
      max_pages: pages that are taken of a file.
      max_bytes: a file with more is rejected unread; of its pictures no more is taken either.
      min_pixels, max_pixels: pictures with fewer are ornaments; ones with more are not unpacked.
    """

    max_pages: int = 3000
    max_bytes: int = 128 * 2**20
    min_pixels: int = 250_000
    max_pixels: int = 100_000_000
    name = "pdf-pages"
    level = "L1"

    def __post_init__(self):
        checks.positive(self.name, **dataclasses.asdict(self))

    def parameters(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "extractor": installed(self.name, "pypdf")}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            if len(document.raw) > self.max_bytes:
                reject(document, f"{len(document.raw)} bytes of PDF, above {self.max_bytes}")
                continue
            try:
                pdf = open_pdf(document.raw)
                count = len(pdf.pages)
            except Exception as error:  # a damaged file makes the parser raise nearly anything
                if isinstance(error, (MemoryError, ImportError)):
                    raise
                reject(document, f"cannot be read as PDF ({type(error).__name__}: {error})"[:300])
                continue
            metadata, group, left = {**document.metadata, "pages": count}, document.group or document.id, self.max_bytes
            for n in range(min(count, self.max_pages)):
                picture = self._picture(pdf, n)
                left -= len(picture)
                raw = picture if left >= 0 else b""  # one picture may be on every page
                page = {"id": f"{document.id}#{n + 1}", "group": group, "metadata": metadata}
                yield document.with_text("", raw=raw, **page)

    def _picture(self, pdf: Any, number: int) -> bytes:
        """Returns the picture of a page as JPEG or PNG, b"" where there is none that can be read."""
        try:
            page = pdf.pages[number]
            found = [(name, image) for name, image in _images(page) if self._fits(image)]
            if not found:
                return b""
            name, image = max(found, key=lambda item: _pixels(item[1]))
            filters = image.get("/Filter")
            last = filters[-1] if isinstance(filters, list) and filters else filters
            if last == "/DCTDecode" and not page.rotation:
                return image.get_data()
            return _png(page, name)
        except DataError:
            raise
        except Exception as error:  # one bad page does not spoil the others
            if isinstance(error, MemoryError):
                raise
            return b""

    def _fits(self, image: Any) -> bool:
        return self.min_pixels <= _pixels(image) <= self.max_pixels


def _images(page: Any) -> Iterator[tuple[str, Any]]:
    """Yields (name, image) of the pictures that a page itself shows."""
    found = page.get("/Resources", {}).get_object().get("/XObject", {}).get_object()
    for name, reference in found.items():
        image = reference.get_object()
        if image.get("/Subtype") == "/Image":
            yield name, image


def _pixels(image: Any) -> int:
    return int(image.get("/Width", 0)) * int(image.get("/Height", 0))


def _png(page: Any, name: str) -> bytes:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        problem = "needs the package pillow for pictures that are no upright JPEG"
        raise DataError(PdfPages.name, None, problem, "pip install pillow") from error
    out = io.BytesIO()
    # Rotations of PDF turn right, those of Pillow left.
    page.images[name].image.rotate(-page.rotation, expand=True).save(out, "PNG")
    return out.getvalue()
