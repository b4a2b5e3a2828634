"""A recipe as stages: what is computed in one go, where it lies, and the hash that says what it was made from."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from davinci_jax.curation.corpus import CorpusOperation
from davinci_jax.curation.inputs import Plan, Reader
from davinci_jax.curation.pipeline import FunnelStep, Operation
from davinci_jax.experiment import to_dict
from davinci_jax.experiment.curation import CuratedSource, Step

_PACKAGE = "davinci_jax.curation"


class Stage(NamedTuple):
    """A run of operations whose documents are kept.

    Attributes:
      steps: names and parameters of the operations, as the recipe gives them.
      operations: what they name; the first may be a corpus operation, no other.
      first: how many rows of the funnel come before them: L0 is the first row.
      hash: 16 hex digits of the input, all operations up to its end, and their code.
      before: the hash where it begins; "" where it reads the input.
      corpus: for a corpus operation the hash of what it has collected and reduced, else "".
      made_by: `hash` but for the files: where it is equal, equal files or documents become the same.
      collected_by: the same of `corpus`.
    """

    steps: tuple[Step, ...]
    operations: tuple[Operation | CorpusOperation, ...]
    first: int
    hash: str
    before: str
    corpus: str
    made_by: str
    collected_by: str


def is_corpus(operation: Operation | CorpusOperation) -> bool:
    """Whether an operation needs the whole source before it can decide."""
    return hasattr(operation, "reduce")


def split(
    source: CuratedSource,
    plan: Plan,
    readers: Sequence[Reader],
    operations: Sequence[Operation | CorpusOperation],
) -> list[Stage]:
    """Cuts a recipe into stages.

    A stage ends where a corpus operation begins, where the level first rises above all before it (from L1 on), and
    after operations of L3 and above unless the next has the same level. So an edit of a rule does not repeat an
    extraction or a model's work before it.

    Args:
      source: names inputs and steps.
      plan: the files.
      readers: of the inputs, in order.
      operations: of the recipe, in order.
    """
    found, begin = [], 0
    inputs = _inputs(source, readers)
    current, made_by = _hash("", [*inputs, _plan_digest(plan)]), _hash("", inputs)
    before = ""
    for end in [*_cuts(operations), len(operations)]:
        run = operations[begin:end]
        first = begin + 1
        described = [describe(operation) for operation in run]
        corpus = collected_by = ""
        if run and is_corpus(run[0]):
            corpus, collected_by = _hash(current, described[:1]), _hash(made_by, described[:1])
        current, made_by = _hash(current, described), _hash(made_by, described)
        steps = source.recipe[begin:end]
        found.append(Stage(steps, tuple(run), first, current, before, corpus, made_by, collected_by))
        begin, before = end, current
    return found


def describe(operation: Operation | CorpusOperation | Reader) -> list[Any]:
    """Returns all that decides the result of an operation: name, version, parameters and code."""
    version = getattr(operation, "version", 1)
    level = getattr(operation, "level", "L0")
    return [operation.name, level, version, operation.parameters(), code_hash(type(operation).__module__)]


def funnel_step(operation: Operation | CorpusOperation) -> FunnelStep:
    """Returns an empty row of the funnel."""
    counts = operation.counts() if hasattr(operation, "counts") else {}
    return FunnelStep(operation.name, operation.level, operation.parameters(), counts=counts)


@functools.cache
def code_hash(module: str) -> str:
    """Returns a hash of the source of a module and of the curation modules that it imports, directly or not."""
    digest, known, waiting = hashlib.sha256(), set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in known:
            known.add(name)
            waiting += _imported(name)
    for name in sorted(known):
        digest.update(_source(name) or b"")
    return digest.hexdigest()[:16]


def _imported(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_source(module) or b"")):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_PACKAGE):
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                if _source(name) is not None:
                    yield name


def _source(module: str) -> bytes | None:
    if module.startswith(f"{_PACKAGE}."):
        stem = pathlib.Path(__file__).parent.joinpath(*module.removeprefix(f"{_PACKAGE}.").split("."))
        file = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    else:  # an operation of a test or of somebody else's package
        file = pathlib.Path(getattr(sys.modules.get(module), "__file__", None) or "/")
    return file.read_bytes() if file.is_file() else None


def _cuts(operations: Sequence[Operation | CorpusOperation]) -> Iterator[int]:
    """Yields the positions where a new stage begins."""
    highest = "L0"
    for n, operation in enumerate(operations):
        last = operations[n - 1].level if n else "L0"
        rises = operation.level > highest >= "L1"
        costly = last >= "L3" and operation.level != last
        if (n or is_corpus(operation)) and (is_corpus(operation) or rises or costly):
            yield n
        highest = max(highest, operation.level)


def _inputs(source: CuratedSource, readers: Sequence[Reader]) -> list[Any]:
    inputs = [[given.kind, given.label, given.licence] for given in source.inputs]
    return [source.name, inputs, [describe(reader) for reader in readers]]


def _plan_digest(plan: Plan) -> str:
    digest = hashlib.sha256()
    for line in plan.to_lines():
        digest.update(line.encode())
    return digest.hexdigest()


def _hash(before: str, described: list[Any]) -> str:
    text = before + json.dumps(described, sort_keys=True, default=to_dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
