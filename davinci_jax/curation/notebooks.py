"""L1: Jupyter notebooks to text: prose as it is, code and its printed output as fenced blocks."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
from davinci_jax.errors import ConfigError

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_IMAGE = re.compile(r"!\[([^\]]{0,500})\]\((?:data:|attachment:)[^)]*\)")


@dataclasses.dataclass(frozen=True)
class NotebookText:
    """Reads .ipynb bytes of format 3 or 4; nothing is run, and images are left out.

    Attributes:
      outputs: whether what the cells printed is kept; tracebacks and pictures are not.
      max_output: characters that are kept of one output.
    """

    outputs: bool = True
    max_output: int = 2000
    name = "notebook-text"
    level = "L1"

    def __post_init__(self):
        if self.max_output < 1:
            raise ConfigError("notebook-text.max_output", self.max_output, "is no bound", "or set outputs=False")

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            try:
                text, language = self._read(document.raw)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                reject(document, f"is no notebook ({error})"[:300])
                continue
            if text:
                yield document.with_text(text, metadata={**document.metadata, "language": language})
            else:
                reject(document, "no text")

    def _read(self, raw: bytes) -> tuple[str, str]:
        """Returns the text and the programming language; raises what wrong JSON makes it raise."""
        notebook = json.loads(raw.decode("utf-8-sig"))
        if not isinstance(notebook, dict) or not ("cells" in notebook or "worksheets" in notebook):
            raise ValueError("it has no cells")
        about = notebook.get("metadata") or {}
        named = (about.get("kernelspec") or {}).get("language") or (about.get("language_info") or {}).get("name")
        language = named if isinstance(named, str) else "python"
        cells = notebook.get("cells")
        if cells is None:
            cells = [cell for sheet in notebook["worksheets"] for cell in sheet["cells"]]
        blocks = [block for cell in cells for block in self._blocks(cell, language)]
        return "\n\n".join(blocks), language.lower()

    def _blocks(self, cell: dict[str, Any], language: str) -> Iterator[str]:
        kind, source = cell.get("cell_type"), _joined(cell.get("source", cell.get("input"))).strip("\n")
        if kind == "code":
            if source.strip():
                yield fenced(source, language.lower())
            for output in cell.get("outputs") or () if self.outputs else ():
                shown = self._output(output)
                if shown:
                    yield fenced(shown, "output")
        elif kind == "heading" and source.strip():
            yield f"{'#' * int(cell.get('level', 1))} {source.strip()}"
        elif source.strip():
            yield _IMAGE.sub(r"\1", source).strip()

    def _output(self, output: dict[str, Any]) -> str:
        if output.get("output_type") in ("error", "pyerr"):
            return ""
        data = output.get("data") or {}
        text = _joined(output.get("text") or data.get("text/plain"))
        text = _ANSI.sub("", text).strip("\n").encode("utf-8", "replace").decode()
        return text if len(text) <= self.max_output else f"{text[: self.max_output]}\n..."


def fenced(text: str, language: str) -> str:
    """Returns a fenced block whose fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"^\s*(`{3,})", text, re.MULTILINE)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _joined(source: Any) -> str:
    if source is None:
        return ""
    return source if isinstance(source, str) else "".join(source)
