"""Whether an answer is right: mathematics by value, choices by letter, programs by running their tests."""

from __future__ import annotations

import dataclasses
import re
import zlib

from davinci_jax.curation import sandbox
from davinci_jax.curation.documents import Document
from davinci_jax.curation.sandbox import Limits
from davinci_jax.errors import ConfigError

CHECKERS = ("math", "choice", "code")
_LETTER = re.compile(r"(?:\bAnswer:\s*\**\(?|\\boxed\{\s*(?:\\text\{)?\(?)([A-Z])\b(?![\w'])", re.IGNORECASE)
_PROGRAM = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Where the answer to a problem of mathematics stands; what comes before is not read.
_END = 4000


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
        return (answer, None) if _parse(_boxed(answer)) else ("", "has no mathematics for an answer")

    def is_right(self, answer: str, truth: str) -> bool:
        """Whether an answer agrees with the ground truth."""
        if self.kind == "choice":
            return _letter(answer) == truth
        if self.kind == "code":
            return self._runs(answer, truth)
        from math_verify import verify

        return bool(verify(_parse(_boxed(truth)), _parse(answer[-_END:])))

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


def _parse(text: str) -> list:
    from math_verify import parse

    return parse(text)


def _boxed(answer: str) -> str:
    """Returns a ground truth in the form in which solutions end; the last line of a worked one (GSM8K's "#### 5")."""
    if "\\boxed" in answer:
        return answer[-_END:]
    return f"\\boxed{{{answer.rsplit('####', 1)[-1].strip().strip('$')}}}"
