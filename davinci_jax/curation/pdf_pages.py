"""L1: scanned PDF files as pictures of their pages, for a model that reads them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pages import LEFT_OUT, UNREAD
from davinci_jax.curation.pdf import Bounded, is_trouble, open_pdf, over_time
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.processor_time import OverTime
from davinci_jax.curation.versions import installed
from davinci_jax.errors import DataError
from davinci_jax.experiment import checks

_SAMPLES = (None, "/FlateDecode", "/RunLengthDecode")  # filters behind which lie samples, no other format
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


@dataclasses.dataclass(frozen=True)
class PdfPages:
    """Divides PDF bytes into pages: of each the largest picture that it shows, nothing else of it.

    Page 3 of "a.pdf" is the document "a.pdf#3", and `metadata["pages"]` counts the pages of the file, so that
    `join-pages` can put them together again. A page without a picture that fills it goes on without bytes: who reads
    it says that it is none. JPEG stays as it is; other pictures, and turned ones, become PNG with the package Pillow.
    Where a file has used up what may be taken of it, the other pages go on without bytes and `metadata["unread"]` tells
    why.

    Attributes:
      max_pages: pages that are taken of a file; how many are left out is told in `metadata["pages_left_out"]`.
      max_bytes: a file with more is rejected unread; of its pictures no more is taken either.
      min_pixels, max_pixels: pictures with fewer are ornaments; ones with more are not unpacked.
      max_file_pixels: pixels that are unpacked of a file, all its pages together.
      max_seconds: of processor time for a file. None should take it: a small one can make any amount of work.
    """

    max_pages: int = 3000
    max_bytes: int = 128 * 2**20
    min_pixels: int = 250_000
    max_pixels: int = 100_000_000
    max_file_pixels: int = 10_000_000_000
    max_seconds: float = 1800
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
            with Bounded(self.max_seconds) as time:
                yield from self._divided(document, reject, _Left(self.max_bytes, self.max_file_pixels, time))

    def _divided(self, document: Document, reject: Reject, left: _Left) -> Iterator[Document]:
        try:
            with left.time.spend():
                pdf = open_pdf(document.raw)
                count = len(pdf.pages)
        except OverTime:
            reject(document, over_time(self.max_seconds))
            return
        except Exception as error:  # a damaged file makes the parser raise nearly anything
            if is_trouble(error):
                raise
            reject(document, f"cannot be read as PDF ({type(error).__name__}: {error})"[:300])
            return
        if not count:
            reject(document, "has no pages")
            return
        yield from self._pages(document, pdf, count, left)

    def _pages(self, document: Document, pdf: Any, count: int, left: _Left) -> Iterator[Document]:
        metadata, group = {**document.metadata, "pages": count}, document.group or document.id
        metadata |= {LEFT_OUT: count - self.max_pages} if count > self.max_pages else {}
        for n in range(min(count, self.max_pages)):
            # One picture may be on every page, and unpack to a thousand times its bytes.
            raw = b"" if left.spent else self._picture(pdf, n, left)
            known = {**metadata, UNREAD: f"is not read: its file {left.spent}"} if left.spent else metadata
            yield document.with_text("", raw=raw, id=f"{document.id}#{n + 1}", group=group, metadata=known)

    def _picture(self, pdf: Any, number: int, left: _Left) -> bytes:
        """Returns the picture of a page as JPEG or PNG, b"" where there is none that can be read."""
        from pypdf.errors import LimitReachedError

        try:
            with left.time.spend():
                picture = self._largest(pdf.pages[number], left)
            left.bytes -= len(picture)
            return b"" if left.spent else picture
        except OverTime:
            return b""
        except Exception as error:  # one bad page does not spoil the others
            if is_trouble(error):
                raise
            if isinstance(error, LimitReachedError):  # after as much work as the largest picture is
                left.pixels -= self.max_pixels
            return b""

    def _largest(self, page: Any, left: _Left) -> bytes:
        found = [(name, image) for name, image in _images(page) if self._fits(image)]
        if not found:
            return b""
        name, image = max(found, key=lambda item: _pixels(item[1]))
        if _filter(image) == "/DCTDecode" and not page.rotation:
            return image.get_data()
        return _png(page, name) if self._may_unpack(image, left) else b""

    def _may_unpack(self, image: Any, left: _Left) -> bool:
        """Whether a picture and its masks are within the bounds; their pixels are taken off what is left."""
        for layer in _layers(image):
            left.pixels -= _pixels(layer)
            if left.spent or _pixels(layer) > self.max_pixels:
                return False
            data = layer.get_data()  # pypdf bounds it, and keeps it
            opened = _opened_pixels(layer, data)
            left.pixels -= max(0, opened - _pixels(layer), len(data) - 4 * _pixels(layer))
            if left.spent or opened > self.max_pixels:
                return False
        return True

    def _fits(self, image: Any) -> bool:
        return self.min_pixels <= _pixels(image) <= self.max_pixels


@dataclasses.dataclass
class _Left:
    """What may still be taken of a file."""

    bytes: int
    pixels: int
    time: Bounded

    @property
    def spent(self) -> str:
        """What of it has run out, by the parameter's name; "" for nothing."""
        if self.time.left <= 0:
            return "takes more than max_seconds"
        if self.bytes < 0:
            return "has more than max_bytes"
        return "has more than max_file_pixels" if self.pixels < 0 else ""


def _images(page: Any) -> Iterator[tuple[str, Any]]:
    """Yields (name, image) of the pictures that a page itself shows."""
    found = page.get("/Resources", {}).get_object().get("/XObject", {}).get_object()
    for name, reference in found.items():
        image = reference.get_object()
        if image.get("/Subtype") == "/Image":
            yield name, image


def _pixels(image: Any) -> int:
    return int(image.get("/Width", 0)) * int(image.get("/Height", 0))


def _filter(image: Any) -> str | None:
    """Returns the last filter, which tells the format that the others pack."""
    filters = image.get("/Filter")
    return filters[-1] if isinstance(filters, list) and filters else filters


def _layers(image: Any) -> Iterator[Any]:
    """Yields a picture and the masks on it, which pypdf unpacks with it."""
    met = []
    while image is not None and all(image is not other for other in met):
        met.append(image)
        yield image
        image = image.get("/SMask")
        image = None if image is None else image.get_object()


def _opened_pixels(image: Any, data: bytes) -> int:
    """Returns the pixels that a picture of another format has by its own head, which may say more than the PDF does."""
    if _filter(image) in _SAMPLES:
        return 0
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(data)) as opened:
            return opened.width * opened.height
    except pillow.UnidentifiedImageError:  # samples after all
        return 0


def _png(page: Any, name: str) -> bytes:
    _pillow()
    # Rotations of PDF turn right, those of Pillow left.
    image = page.images[name].image.rotate(-page.rotation, expand=True)
    out = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(out, "PNG")
    return out.getvalue()


def _pillow() -> ModuleType:
    try:
        import PIL.Image
    except ImportError as error:
        problem = "needs the package pillow for pictures that are no upright JPEG"
        raise DataError(PdfPages.name, None, problem, "pip install pillow") from error
    return PIL.Image
