"""What the tasks of a stage leave, where it lies, and whether it still follows from the documents that it was made of.

A task of a stage reads what the same task of the stage before has written. Its counts name its documents by their
`output_digest`, and what they were made of, files or documents, by the `input_digest`, so that nothing is taken for
done that was made of documents that are not there any more: the stage before may have been removed and made again by a
model that answered otherwise.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from davinci_jax.curation.inputs import Plan
from davinci_jax.curation.stages import Stage
from davinci_jax.errors import DataError
from davinci_jax.experiment.curation import CuratedSource
from davinci_jax.files import write_atomically

REDUCE = "reduce"
_NOTES = "notes"
_RESULT = re.compile(r'(?<=", )(\d+, ")[0-9a-f]{16}/(?=[0-9a-f]{32}")')  # size and stamp of `DocumentsReader`


class Paths(NamedTuple):
    """Where the files of a stage lie.

    Attributes:
      folder: of the stage, named by its hash.
    """

    folder: pathlib.Path

    def documents(self, task: int) -> pathlib.Path:
        return self.folder / "documents" / f"{task:06d}.jsonl.gz"

    def counts(self, task: int) -> pathlib.Path:
        return self.folder / "counts" / f"{task:06d}.json"

    def progress(self, task: int) -> pathlib.Path:
        return self.folder / "progress" / f"{task:06d}"

    def rejects(self, label: str, task: int) -> pathlib.Path:
        return self.folder / "rejects" / label / f"{task:06d}.jsonl.gz"

    def temporary(self, task: int) -> pathlib.Path:
        return self.folder / "temporary" / f"{task:06d}.{os.uname().nodename}.{os.getpid()}"

    @property
    def plan(self) -> pathlib.Path:
        return self.folder / "plan.jsonl"

    def plan_line(self, task: int) -> str:
        with self.plan.open(encoding="utf-8") as lines:
            return next(itertools.islice(lines, task, None)).removesuffix("\n")

    @property
    def logs(self) -> pathlib.Path:
        return self.folder / "logs"


class CorpusPaths(NamedTuple):
    """Where the files of the first two passes of a corpus operation lie.

    Attributes:
      folder: of the operation.
    """

    folder: pathlib.Path

    def collected(self, task: int) -> pathlib.Path:
        return self.folder / "collected" / f"{task:06d}"

    def notes(self, of: str) -> pathlib.Path:
        return self.folder / _NOTES / f"{of}.json"

    @property
    def reduced(self) -> pathlib.Path:
        return self.folder / "reduced"

    @property
    def collect_logs(self) -> pathlib.Path:
        return self.folder / "logs-collect"

    @property
    def reduce_logs(self) -> pathlib.Path:
        return self.folder / "logs-reduce"


class StageJob(NamedTuple):
    """What the steps of a stage share; plain data, so that it travels to other processes.

    Attributes:
      source: the source.
      stage: steps, position and hashes; `operations` are left out and built where they run.
      folder: of the source.
      tokenizer: file that counts tokens, or `None`.
    """

    source: CuratedSource
    stage: Stage
    folder: pathlib.Path
    tokenizer: str | None

    @property
    def paths(self) -> Paths:
        return Paths(self.folder / self.stage.hash)

    @property
    def before(self) -> Paths | None:
        """Of the stage whose documents it reads; `None` where it reads the input."""
        return Paths(self.folder / self.stage.before) if self.stage.before else None

    @property
    def is_last(self) -> bool:
        """Whether its documents are those of the source."""
        return self.stage.first - 1 + len(self.stage.steps) == len(self.source.recipe)

    @property
    def corpus(self) -> CorpusPaths | None:
        """Of the corpus operation that it begins with, if it does."""
        return CorpusPaths(self.folder / f"corpus-{self.stage.corpus}") if self.stage.corpus else None


class Notes(NamedTuple):
    """What the last pass of a corpus operation must know of one before it.

    Attributes:
      seconds: that the pass took, for the funnel.
      failed: see `corpus.remembered`.
      input_digest: of the documents that it was made of.
      files: what the pass has left: name below its folder, bytes and digest of each.
    """

    seconds: float
    failed: dict[int, str]
    input_digest: str
    files: dict[str, tuple[int, str]]

    def write(self, file: pathlib.Path) -> None:
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(self._asdict()))

    @classmethod
    def load(cls, file: pathlib.Path) -> Notes | None:
        """Returns the notes in a file, `None` where none are there that this version can read."""
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            failed = {int(number): why for number, why in fields["failed"].items()}
            files = {name: (size, digest) for name, (size, digest) in fields["files"].items()}
            return cls(fields["seconds"], failed, fields["input_digest"], files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def fit(self, folder: pathlib.Path) -> bool:
        """Whether the files in a folder are there with their sizes."""
        try:
            return all((folder / name).stat().st_size == size for name, (size, _) in self.files.items())
        except OSError:
            return False


def read_counts(paths: Paths, task: int) -> dict[str, Any] | None:
    """Returns the counts of a task whose documents and rejects are there as it left them, else `None`."""
    try:
        counts = json.loads(paths.counts(task).read_text(encoding="utf-8"))
        sizes = {paths.documents(task): counts["file_bytes"]}
        sizes |= {paths.rejects(label, task): size for label, size in counts["rejects"].items()}
        same = all(file.stat().st_size == size for file, size in sizes.items())
        return counts if same and {"output_digest", "input_digest"} <= counts.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def all_counts(paths: Paths, tasks: int) -> list[dict[str, Any] | None]:
    """Returns the counts of a stage's tasks, in order."""
    return [read_counts(paths, task) for task in range(tasks)]


def bytes_out(paths: Paths, tasks: int) -> int:
    """Returns the bytes of the documents of a stage, 0 for tasks that a cluster has still to run."""
    counts = filter(None, all_counts(paths, tasks))
    return sum(task["steps"][-1]["bytes_out"] if task["steps"] else task["file_bytes"] for task in counts)


def file_digest(file: pathlib.Path) -> str:
    """Returns 32 hex digits of a file's bytes."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()[:32]


def folder_files(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Returns the files of a folder as `Notes` holds them."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): (file.stat().st_size, file_digest(file)) for file in files}


def joint_digest(digests: Sequence[str | None]) -> str | None:
    """Returns one digest of those of all tasks in their order, `None` where one is missing."""
    if None in digests:
        return None
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:32]


def files_digest(line: str) -> str:
    """Returns the digest of the files of a task, given its line of the plan.

    Where they are documents of another source it does not matter which of its results holds them.
    """
    return hashlib.sha256(_RESULT.sub(r"\1", line).encode()).hexdigest()[:32]


def digests_before(job: StageJob, plan: Plan) -> list[str | None]:
    """Returns for each task the digest of the documents that the stage before has for it, `None` where it has none.

    For a stage that reads the input it is the digest of the task's files.
    """
    if job.before is None:
        return [files_digest(line) for line in plan.to_lines()]
    return [counts and counts["output_digest"] for counts in all_counts(job.before, len(plan.tasks))]


def input_digests(job: StageJob, before: Sequence[str | None]) -> list[str | None]:
    """Returns for each task the digest of all that decides its documents, given `digests_before`.

    In the last pass of a corpus operation that is the documents of all tasks.
    """
    return [joint_digest(before)] * len(before) if job.corpus else list(before)


def is_done(paths: Paths, task: int, input_digest: str | None) -> bool:
    """Whether a task has left its documents, made of what there is to read."""
    counts = read_counts(paths, task)
    return counts is not None and counts["input_digest"] == input_digest


def is_collected(corpus: CorpusPaths, task: int, input_digest: str | None) -> bool:
    """Whether the first pass of a corpus operation has left what it collects of a task's documents."""
    folder, known = corpus.collected(task), Notes.load(corpus.notes(f"{task:06d}"))
    return known is not None and known.input_digest == input_digest and folder.is_dir() and known.fit(folder)


def is_reduced(corpus: CorpusPaths, input_digest: str | None) -> bool:
    """Whether the second pass of a corpus operation has left what it makes of all that was collected."""
    folder, known = corpus.reduced, Notes.load(corpus.notes(REDUCE))
    return known is not None and known.input_digest == input_digest and folder.is_dir() and known.fit(folder)


def is_whole(job: StageJob, plan: Plan) -> bool:
    """Whether all tasks of a stage are done."""
    digests = input_digests(job, digests_before(job, plan))
    return all(is_done(job.paths, task, digest) for task, digest in enumerate(digests))


def remove_rejects(paths: Paths, task: int) -> None:
    """Removes what an attempt that ended half way has moved: the next may drop nothing there, and keep the document."""
    rejects = paths.folder / "rejects"
    for label in rejects.iterdir() if rejects.is_dir() else ():
        if not label.is_symlink():  # a link leads to the rejects of an earlier stage
            paths.rejects(label.name, task).unlink(missing_ok=True)


def forget_if_damaged(paths: Paths, task: int, error: Exception) -> None:
    """Has the next start make the documents of a task again where they could not be read, being others than it wrote.

    Raises:
      DataError: the file is damaged; its counts have gone. Otherwise the trouble is not the file's.
    """
    file, counts = paths.documents(task), read_counts(paths, task)
    if counts is None or file_digest(file) == counts["output_digest"]:
        return
    paths.counts(task).unlink()
    problem = f"is damaged ({type(error).__name__}: {error})"
    raise DataError(str(file), None, problem, "start the same command again, which makes this file anew") from error
