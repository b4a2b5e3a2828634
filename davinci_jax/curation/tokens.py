"""How many tokens a funnel shows: counted on a sample of the documents, bytes tell the rest."""

from __future__ import annotations

import functools
import hashlib
import pathlib

from davinci_jax.curation.documents import Document
from davinci_jax.errors import DataError
from davinci_jax.files import version

BYTES_PER_TOKEN = 4.0  # where no tokenizer is named; English text with a vocabulary of 150,000 comes close to it
_FIRST, _SHARE = 32, 16  # the first 32 documents of a task are counted, then one in 16


def counted_by(file: str | None) -> str:
    """Returns what funnels and cards call a way to count: the `tokenizer.json`, or bytes where there is none.

    A few digits tell its content from that of another file that lies there another time.
    """
    return f"{file} ({_digest(version(pathlib.Path(file)))})" if file else "bytes / 4"


@functools.cache
def _digest(at: tuple[str, int, int]) -> str:
    return hashlib.sha256(pathlib.Path(at[0]).read_bytes()).hexdigest()[:8]


class TokenCounter:
    """Counts tokens of documents; those left out of the sample get the tokens per byte of the sample so far.

    Which documents are counted depends on their order and ids alone, so every run counts the same.

    Args:
      file: a `tokenizer.json`; `None` takes four bytes for a token.
    """

    def __init__(self, file: str | None):
        self._tokenizer = _load(pathlib.Path(file)) if file else None
        self._known: dict[tuple[str, int], float] = {}
        self._sampled, self._bytes, self._tokens = 0, 0, 0

    def count(self, document: Document) -> float:
        """Returns the tokens of a document, exact or estimated; bytes that are no text yet are estimated."""
        if self._tokenizer is None or not document.text:
            return document.size / (self._bytes / self._tokens if self._tokens else BYTES_PER_TOKEN)
        key = document.id, len(document.text)
        if key not in self._known:
            if len(self._known) >= 64:
                self._known.clear()  # a document goes through all operations of a stage before the next one comes
            self._known[key] = self._count(document)
        return self._known[key]

    def _count(self, document: Document) -> float:
        chosen = hashlib.blake2b(document.id.encode("utf-8", "replace"), digest_size=4).digest()[0] % _SHARE == 0
        if self._sampled >= _FIRST and not chosen:
            return document.size * self._tokens / self._bytes
        tokens = len(self._tokenizer.encode(document.text, add_special_tokens=False).ids)
        self._sampled, self._bytes, self._tokens = (
            self._sampled + 1,
            self._bytes + document.size,
            self._tokens + tokens,
        )
        return tokens


def _load(file: pathlib.Path):
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(
            "curation.tokenizer", str(file), f"cannot be read ({error})", "name a tokenizer.json"
        ) from error
