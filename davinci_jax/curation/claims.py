"""Runs inside the sandbox, never outside: the examples, tests and assertions of one document, told as JSON.

A script of its own, with nothing but the standard library: `python claims.py module` imports claims_under_test.py,
`python claims.py text` runs the examples in claims_under_test.txt. What the document prints is kept out of the report.
A document that sets out to forge its own report can do so; one that is merely wrong cannot.
"""

from __future__ import annotations

import doctest
import io
import json
import os
import sys
import traceback
from typing import Any

NAME = "claims_under_test"
_MOST = 500
_LONGEST = 2000


class _Recorder(doctest.DocTestRunner):
    """Keeps what each example gave instead of printing it."""

    def __init__(self):
        super().__init__(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
        self.examples: list[dict[str, Any]] = []

    def _keep(self, test: doctest.DocTest, example: doctest.Example, got: str, holds: bool) -> None:
        line = (test.lineno or 0) + example.lineno + 1
        record = {"line": line, "source": example.source.strip(), "want": example.want.strip(), "got": got.strip()}
        self.examples.append({key: _short(value) for key, value in record.items()} | {"holds": holds})

    def report_start(self, out, test, example):
        """Says nothing."""

    def report_success(self, out, test, example, got):
        # An example without an expected output claims no more than that it runs.
        self._keep(test, example, got, True)

    def report_failure(self, out, test, example, got):
        self._keep(test, example, got, False)

    def report_unexpected_exception(self, out, test, example, exc_info):
        self._keep(test, example, "".join(traceback.format_exception_only(*exc_info[:2])), False)


def main(kind: str) -> dict[str, Any]:
    """Returns what the claims of the document came to."""
    recorder = _Recorder()
    if kind == "text":
        with open(f"{NAME}.txt", encoding="utf-8") as file:
            text = file.read()
        test = doctest.DocTestParser().get_doctest(text, {"__name__": NAME}, NAME, None, 0)
        recorder.run(test, out=_Silent())
        return {"examples": recorder.examples, "tests": []}
    sys.path.insert(0, os.getcwd())
    import claims_under_test

    for test in doctest.DocTestFinder(exclude_empty=True).find(claims_under_test, NAME)[:_MOST]:
        recorder.run(test, out=_Silent())
    found = sorted(name for name in vars(claims_under_test) if name.startswith("test_"))
    tests = [_run_test(name, getattr(claims_under_test, name)) for name in found[:_MOST]]
    return {"examples": recorder.examples, "tests": [test for test in tests if test]}


def _run_test(name: str, function: Any) -> dict[str, Any] | None:
    """Calls a test that takes no arguments; `None` for anything else of that name."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_argcount or code.co_kwonlyargcount:
        return None
    try:
        function()
    except Exception as error:
        return {"name": name, "holds": False, "got": _short("".join(traceback.format_exception_only(error)).strip())}
    return {"name": name, "holds": True, "got": ""}


class _Silent:
    """Takes the text that doctest would print."""

    def __call__(self, text: str) -> None:
        """Nothing to do with it."""

    write = __call__


def _short(value: Any) -> Any:
    return value if not isinstance(value, str) or len(value) <= _LONGEST else value[:_LONGEST] + " [...]"


if __name__ == "__main__":
    report = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        outcome = main(sys.argv[1])
    except BaseException as error:
        outcome = {"error": _short("".join(traceback.format_exception_only(error)).strip())}
    report.write(json.dumps(outcome))
    report.close()
