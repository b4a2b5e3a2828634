"""L2: rules that drop documents and never change one; no learned model."""

from __future__ import annotations

import abc
import ast
import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject

_TEST_FOLDERS = frozenset({"test", "tests", "_tests", "idle_test"})
# Control characters other than tab, newline, form feed and carriage return; surrogates, private use, U+FFFD.
_GARBLED = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff\ufffd\U000f0000-\U0010ffff]")


class Rule(abc.ABC):
    """A rule that looks at one document at a time.

    Attributes:
      reads_text: a document whose bytes no step has read yet only seems empty to it.
    """

    level = "L2"
    reads_text = True

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @abc.abstractmethod
    def reason(self, document: Document) -> str | None:
        """Returns why the document is dropped, or `None` to keep it."""

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            reason = self.reason(document)
            if reason is None:
                yield document
            elif self.reads_text and document.raw and not document.text:
                reject(document, "no text yet: put a step that reads its bytes before (decode-utf8, html-text, ...)")
            else:
                reject(document, reason)


@dataclasses.dataclass(frozen=True)
class DropPaths(Rule):
    """Drops files by name: test suites, whose data is broken on purpose, and files named one by one.

    Attributes:
      paths: ids of files that are dropped besides.
    """

    paths: tuple[str, ...] = ()
    name = "drop-paths"
    reads_text = False

    def parameters(self) -> dict[str, Any]:
        return {"folders": sorted(_TEST_FOLDERS), "paths": list(self.paths)}

    def reason(self, document: Document) -> str | None:
        folders = _TEST_FOLDERS.intersection(document.id.split("/")[:-1])
        if folders:
            return f"test suite (folder {min(folders)})"
        return "named by the recipe" if document.id in self.paths else None


@dataclasses.dataclass(frozen=True)
class DropShort(Rule):
    """Drops documents with fewer than `characters` characters, blanks at the ends not counted."""

    characters: int
    name = "drop-short"

    def reason(self, document: Document) -> str | None:
        length = len(document.key.strip())
        return f"{length} characters, below {self.characters}" if length < self.characters else None


@dataclasses.dataclass(frozen=True)
class DropGarbled(Rule):
    """Drops documents in which more than `share` of the characters are no text."""

    share: float = 0.01
    name = "drop-garbled"

    def reason(self, document: Document) -> str | None:
        count = len(_GARBLED.findall(document.text))
        if count > self.share * len(document.text):
            return f"{count} of {len(document.text)} characters are garbled"
        return None


@dataclasses.dataclass(frozen=True)
class DropUnparsable(Rule):
    """Drops Python source that is no program to the Python that runs."""

    name = "drop-unparsable"

    def reason(self, document: Document) -> str | None:
        try:
            parse(document.text)
        except (SyntaxError, ValueError, RecursionError) as error:
            return f"does not parse ({error})"
        return None


def parse(text: str) -> ast.Module:
    """Returns the syntax tree of Python source, silent about escapes that Python only warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)
