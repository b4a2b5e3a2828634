"""Errors a user can mend: each names the field, the value and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, told in one line.

    Args:
      field: what is wrong, as the user wrote it (dotted config field, file path, argument).
      value: the offending value; `None` where the field itself is the trouble.
      problem: why the value cannot be used.
      remedy: what to write or do instead.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str):
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        shown = "" if value is None else f" = {value!r}"
        super().__init__(f"{field}{shown}: {problem}; {remedy}")

    def __reduce__(self):
        # By its fields: an exception pickles its message, which is not what the constructor takes.
        return type(self), (self.field, self.value, self.problem, self.remedy)


class ConfigError(UserError):
    """A config, an override or a combination of fields that cannot describe a run."""


class DataError(UserError):
    """Documents, a tokenizer or token shards that are missing, damaged or do not fit the run."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or belongs to another experiment."""


class TrainingError(UserError):
    """A run that cannot go on, with the step and batch where it stopped."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a remedy that offers the known name closest to a mistyped one."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known names: {', '.join(known)}"
