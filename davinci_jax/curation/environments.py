"""L7: documents whose claims are executed, with the outcome beside them."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation import sandbox
from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.rules import parse
from davinci_jax.curation.sandbox import Limits
from davinci_jax.experiment import checks

KEEP = ("all", "executed", "holding")
_DRIVER = pathlib.Path(__file__).with_name("claims.py")
_NAME = "claims_under_test"
# Failures that are told, and characters of each piece of them.
_TOLD, _WIDTH = 10, 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunClaims:
    """Executes what a Python file or a text with interactive examples claims, and annotates it with the outcome.

    Claims are the examples of docstrings, assertions that run on import, and functions `test_...` without parameters;
    of a text, its `>>>` examples. Each document runs twice in sandboxes of its own: an output that differs between
    the two is not told, and a claim holds if it held in both: the same documents give the same result again.

    Attributes:
      keep: "all" documents, those whose claims were "executed", or those of which all claims are "holding".
      annotate: write the outcome below the text as well as into `metadata["claims"]`.
      wall_seconds, memory_bytes: what a document may use.
      isolation: see `sandbox.run`.
    """

    keep: str = "all"
    annotate: bool = True
    wall_seconds: float = 20.0
    memory_bytes: int = 2 << 30
    isolation: str = "namespaces"
    name = "run-claims"
    level = "L7"

    def __post_init__(self):
        checks.one_of(self.name, KEEP, keep=self.keep)
        checks.one_of(self.name, sandbox.ISOLATIONS, isolation=self.isolation)
        checks.positive(self.name, wall_seconds=self.wall_seconds, memory_bytes=self.memory_bytes)

    def parameters(self) -> dict[str, Any]:
        code = hashlib.sha256(_DRIVER.read_bytes() + sandbox.CHILD.read_bytes()).hexdigest()
        return {**dataclasses.asdict(self), "python": platform.python_version(), "driver": code}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            claims = self.execute(document)
            told = claims["outcome"]
            document = dataclasses.replace(document, metadata={**document.metadata, "claims": claims})
            if self.keep == "executed" and told not in ("hold", "fail"):
                reject(document, claims.get("error") or "makes no claim that can be executed")
            elif self.keep == "holding" and told != "hold":
                reject(document, f"claims {told}")
            elif self.annotate and told in ("hold", "fail"):
                # Added at the end, so that spans of the text stay where they are.
                yield dataclasses.replace(document, text=document.text + annotation(claims, _is_python(document)))
            else:
                yield document

    def execute(self, document: Document) -> dict[str, Any]:
        """Returns what the claims of a document came to, as JSON values.

        "outcome" is "hold", "fail", "error" (it did not run; "error" says why) or "none"; "examples", "tests" and
        "assertions" are [those that hold, all]; "failures" tell what the first ones gave.
        """
        kind, assertions = _claims(document)
        if kind is None:
            return {"outcome": "none"}
        first = self._run(document.text, kind)
        if first.get("timeout"):
            return {"outcome": "error", "error": first["error"]}
        second = self._run(document.text, kind)
        if "error" in first:
            return {"outcome": "error", "error": first["error"] if first == second else "ends differently each time"}
        examples = [_steady(a, b) for a, b in zip(first["examples"], second.get("examples", ()), strict=False)]
        tests = [_steady(a, b) for a, b in zip(first["tests"], second.get("tests", ()), strict=False)]
        failures = [item for item in (*examples, *tests) if not item["holds"]]
        if not examples and not tests and not assertions:
            return {"outcome": "none"}
        return {
            "outcome": "fail" if failures else "hold",
            "python": platform.python_version(),
            "examples": [sum(item["holds"] for item in examples), len(examples)],
            "tests": [sum(item["holds"] for item in tests), len(tests)],
            "assertions": [assertions, assertions],
            "failures": [{key: item[key] for key in item if key != "holds"} for item in failures[:_TOLD]],
        }

    def _run(self, text: str, kind: str) -> dict[str, Any]:
        files = {"claims.py": _DRIVER.read_text(), f"{_NAME}.{'py' if kind == 'module' else 'txt'}": text}
        limits = Limits(wall_seconds=self.wall_seconds, memory_bytes=self.memory_bytes)
        outcome = sandbox.run(files, ("claims.py", kind), limits, self.isolation)
        if outcome.status == "timeout":
            return {"error": f"does not end in {self.wall_seconds:g} s", "timeout": True}
        try:
            return json.loads(outcome.output)
        except ValueError:
            return {"error": f"ended with status {outcome.code} before its claims were through"}


def annotation(claims: dict[str, Any], is_python: bool) -> str:
    """Returns the outcome in words, as comments below a program."""
    counted = [
        f"{held} of {total} {name}"
        for name, (held, total) in (
            ("examples give the output shown", claims["examples"]),
            ("tests pass", claims["tests"]),
            ("assertions on import hold", claims["assertions"]),
        )
        if total
    ]
    lines = [f"Executed with Python {claims['python']}: {', '.join(counted)}."]
    for failure in claims["failures"]:
        place = f"Line {failure['line']}: {_line(failure['source'])}" if "line" in failure else failure["name"]
        lines.append(f"{place} gives {_line(failure['got']) or 'no output'}")
    mark = "# " if is_python else ""
    return "\n" + "".join(f"{mark}{line}\n" for line in lines)


def _steady(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Returns an example or test that ran twice: it holds if it held both times, and tells what came both times."""
    got = first["got"] if first["got"] == second["got"] else "something else each time"
    return {**first, "holds": first["holds"] and second["holds"], "got": got}


def _claims(document: Document) -> tuple[str | None, int]:
    """Returns (how the document is run or `None`, assertions that run on import)."""
    if not _is_python(document):
        return ("text" if ">>> " in document.text else None), 0
    try:
        tree = parse(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return None, 0
    assertions = sum(isinstance(node, ast.Assert) for node in tree.body)
    tests = any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)
    return ("module" if assertions or tests or ">>> " in document.text else None), assertions


def _is_python(document: Document) -> bool:
    path = str(document.metadata.get("path", document.id))
    return path.endswith(".py") or str(document.metadata.get("language", "")).lower() == "python"


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else line[:_WIDTH] + "..."
