"""L2: signals of source files and thresholds on them, after the heuristic rules of OpenCoder (Huang et al. 2024).

The paper calls code filtered by OpenCoder's rules L3. By operation they are rules, so they stand at L2 here, and a
source card shows both. What is here are the signals that its appendix names for every language and for some of them,
written anew; the published list has about 118, and its classifier of file types is not among these.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.rules import parse

_WORDS = re.compile(r"[A-Za-z_]\w*")
_GENERATED = re.compile(
    r"auto-?generated|generated (?:by|from|code)|do not (?:edit|modify)|this file (?:is|was) generated", re.I
)
_HEX = re.compile(r"\b0[xX][0-9a-fA-F]{2,}\b|\\x[0-9a-fA-F]{2}")
_BASE64 = re.compile(r"[A-Za-z0-9+/=]{64,}")
_TODO = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
_LINE_COMMENTS = {
    "#": "python shell ruby perl r yaml toml makefile cmake julia elixir nim dockerfile tcl awk powershell"
}
_LINE_COMMENTS |= {"//": "c c++ c# java javascript typescript go rust swift kotlin scala dart php cuda zig solidity d"}
_LINE_COMMENTS |= {
    "--": "sql haskell lua ada vhdl elm lean",
    "%": "tex erlang prolog",
    ";": "emacs-lisp scheme clojure",
}
_COMMENT_OF = {language: mark for mark, languages in _LINE_COMMENTS.items() for language in languages.split()}
_DATA = frozenset({"json", "yaml", "xml", "toml", "csv", "html", "css", "markdown", "tex", "restructuredtext", "sql"})


@dataclasses.dataclass(frozen=True)
class CodeQuality:
    """Drops source files that were not written by a person for persons; notes the signals in `metadata["code"]`.

    Attributes:
      min_lines, max_lines: lines that are not blank.
      max_line_length, max_mean_line_length: characters.
      min_letters: smallest share of characters that are letters.
      max_digits: largest share of characters that are digits.
      max_encoded: largest share of characters in hexadecimal or base64 runs.
      max_comment_lines: largest share of lines that are nothing but a comment.
      max_repeated_lines: largest share of lines, not blank and longer than 10 characters, that came before.
      min_distinct_words: smallest share of different words among the first 1,000.
      max_todo_lines: largest share of lines with TODO, FIXME or XXX.
      generated: whether files are kept that say they are generated.
      python: whether Python must parse and do more than assert, pass and import.
    """

    min_lines: int = 3
    max_lines: int = 50_000
    max_line_length: int = 1000
    max_mean_line_length: float = 100.0
    min_letters: float = 0.25
    max_digits: float = 0.4
    max_encoded: float = 0.4
    max_comment_lines: float = 0.8
    max_repeated_lines: float = 0.5
    min_distinct_words: float = 0.05
    max_todo_lines: float = 0.1
    generated: bool = False
    python: bool = True
    name = "code-quality"
    level = "L2"

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            language = document.metadata.get("language")
            language = language if isinstance(language, str) else ""
            signals = code_signals(document.text, language)
            reason = self._reason(signals, language) or (self._python(document.text) if language == "python" else None)
            noted = {name: round(value, 4) for name, value in signals.items()}
            document = dataclasses.replace(document, metadata={**document.metadata, "code": noted})
            if reason is None:
                yield document
            else:
                reject(document, reason)

    def _reason(self, signals: dict[str, float], language: str) -> str | None:
        if signals["lines"] < self.min_lines:
            return f"lines {signals['lines']:g}, below {self.min_lines}"
        if signals["generated"] and not self.generated:
            return "says that it is generated"
        if signals["letters"] < self.min_letters:
            return f"letters {signals['letters']:.3g}, below {self.min_letters:g}"
        limits = {
            "lines": self.max_lines,
            "longest_line": self.max_line_length,
            "mean_line": self.max_mean_line_length,
            "digits": self.max_digits,
            "encoded": self.max_encoded,
            "repeated_lines": self.max_repeated_lines,
            "todo_lines": self.max_todo_lines,
        }
        if language not in _DATA:
            limits["comment_lines"] = self.max_comment_lines
        for name, limit in limits.items():
            if signals[name] > limit:
                return f"{name} {signals[name]:.4g}, above {limit:g}"
        if signals["distinct_words"] < self.min_distinct_words:
            return f"distinct_words {signals['distinct_words']:.3g}, below {self.min_distinct_words:g}"
        return None

    def _python(self, text: str) -> str | None:
        if not self.python:
            return None
        try:
            body = parse(text).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"does not parse ({error})"[:200]
        idle = (ast.Import, ast.ImportFrom, ast.Pass, ast.Assert)
        if all(isinstance(node, idle) or _is_docstring(node) for node in body):
            return "nothing but imports, assertions and comments"
        return None


def code_signals(text: str, language: str = "") -> dict[str, float]:
    """Returns the signals of a source file by name; shares lie between 0 and 1.

    A line is one that is not blank. `encoded` counts characters of hexadecimal numbers, escapes and base64 runs.
    """
    lines = [line for line in text.splitlines() if line and not line.isspace()]
    size, count = max(len(text), 1), max(len(lines), 1)
    head = "\n".join(lines[:20])
    words = _WORDS.findall(text)[:1000]
    mark = _COMMENT_OF.get(language)
    comments = sum(line.lstrip().startswith(mark) for line in lines) if mark else 0
    long = collections.Counter(line.strip() for line in lines if len(line.strip()) > 10)
    encoded = sum(len(run) for pattern in (_HEX, _BASE64) for run in pattern.findall(text)) if lines else 0
    return {
        "lines": len(lines),
        "longest_line": max(map(len, lines), default=0),
        "mean_line": sum(map(len, lines)) / count,
        "letters": sum(map(str.isalpha, text)) / size,
        "digits": sum(map(str.isdigit, text)) / size,
        "encoded": min(encoded / size, 1.0),
        "comment_lines": comments / count,
        "repeated_lines": (long.total() - len(long)) / count,
        "todo_lines": sum(_TODO.search(line) is not None for line in lines) / count if _TODO.search(text) else 0.0,
        "distinct_words": len(set(words)) / len(words) if words else 1.0,
        "generated": float(_GENERATED.search(head) is not None),
    }  # fmt: skip


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
