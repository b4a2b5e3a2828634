"""Whether an answer is right: mathematics by value, choices by letter, programs by running their tests."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import signal
import zlib
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation import sandbox
from davinci_jax.curation.documents import Document
from davinci_jax.curation.sandbox import Limits
from davinci_jax.errors import ConfigError

CHECKERS = ("math", "choice", "code")
_LETTER = re.compile(r"(?:\bAnswer:\s*\**\(?|\\boxed\{\s*(?:\\text\{)?\(?)([A-Z])\b(?![\w'])", re.IGNORECASE)
_PROGRAM = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Where the answer to a problem of mathematics stands; what comes before is not read.
_END = 4000
_SECONDS = 5.0  # of the processor for reading an answer, and for comparing two expressions


@dataclasses.dataclass(frozen=True)
class Checker:
    """Compares answers with a ground truth.

    Attributes:
      kind: one of `CHECKERS`.
      limits: what a program may use.
      isolation: how it is kept from the machine, see `sandbox.run`.
    """

    kind: str
    limits: Limits = Limits()
    isolation: str = "namespaces"

    def truth(self, document: Document, answer: str) -> tuple[str, str | None]:
        """Returns (the ground truth of a document, why there is none or `None`).

        It is the answer itself, or for code `metadata["tests"]`: a program of assertions that runs after the
        answer's.
        """
        if self.kind == "code":
            tests = document.metadata.get("tests")
            return (tests, None) if isinstance(tests, str) and tests.strip() else ("", "has no tests")
        if not answer:
            return "", "has no answer to compare with"
        if self.kind == "choice":
            letter = answer.strip("() .").upper() if len(answer) < 6 else _letter(answer)
            return (letter, None) if letter and len(letter) == 1 and letter.isalpha() else ("", "has no letter")
        return (answer, None) if _mathematics(_boxed(answer)) else ("", "has no mathematics for an answer")

    def is_right(self, answer: str, truth: str) -> bool:
        """Whether an answer agrees with the ground truth."""
        if self.kind == "choice":
            return _letter(answer) == truth
        if self.kind == "code":
            return self._runs(answer, truth)
        return _are_equal(_mathematics(_boxed(truth)), _mathematics(answer[-_END:]))

    def _runs(self, answer: str, tests: str) -> bool:
        programs = _PROGRAM.findall(answer)
        if not programs:
            return False
        # Printed after the last test: an exit status of 0 alone is also that of a program that leaves early.
        done = f"passed {zlib.crc32(tests.encode('utf-8', 'surrogatepass'))}"
        program = f"{programs[-1]}\n\n{tests}\n\nprint({done!r})\n"
        outcome = sandbox.run({"program.py": program}, ("program.py",), self.limits, self.isolation)
        return outcome.status == "ok" and outcome.output.rstrip().endswith(done)


def check_kind(field: str, kind: str) -> None:
    """Raises `ConfigError` unless `kind` is a checker."""
    if kind not in CHECKERS:
        raise ConfigError(field, kind, f"is not one of {', '.join(CHECKERS)}", "name one of them")


def _letter(answer: str) -> str | None:
    """Returns the last letter that an answer commits itself to."""
    found = _LETTER.findall(answer)
    return found[-1].upper() if found else None


def _mathematics(text: str) -> list[Any]:
    """Returns the expressions of a text; none where that takes more than `_SECONDS`."""
    from math_verify import parse

    with _limited(_SECONDS):
        return parse(text, parsing_timeout=None)
    return []


def _are_equal(one: list[Any], other: list[Any]) -> bool:
    """Whether an expression of one list has the value of one of the other, as far as `_SECONDS` tell for each pair."""
    from math_verify import verify

    with _limited(_SECONDS):
        return bool(verify(one, other, timeout_seconds=None))
    return False


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends what runs in it after so many seconds of processor time, in the main thread of a process alone.

    math-verify's own limit is one of the clock on the wall: on a busy machine it takes a slow start for an endless
    problem, and right answers for wrong ones. Like its own, this one comes again for what goes on behind it, since
    math-verify keeps the exception to itself and turns to the next pair of expressions.
    """
    from math_verify.errors import TimeoutException

    def end(number: int, frame: Any) -> None:
        raise TimeoutException

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the limit that it is not given
    before = signal.signal(signal.SIGPROF, end)
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
        yield
    except TimeoutException:
        return
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _boxed(answer: str) -> str:
    """Returns a ground truth in the form in which solutions end; the last line of a worked one (GSM8K's "#### 5")."""
    if "\\boxed" in answer:
        return answer[-_END:]
    return f"\\boxed{{{answer.rsplit('####', 1)[-1].strip().strip('$')}}}"
