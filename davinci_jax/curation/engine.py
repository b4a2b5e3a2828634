"""The steps of a stage on datatrove: the same list runs in this process, on a pool of processes, on Ray or on Slurm.

A stage has as many tasks as its source has been cut into, whatever runs them. A task writes below a temporary name and
moves its files in place at its end, counts last: a task with counts is whole. datatrove's own marks of completion
follow from that before every launch, so they can never speak for another recipe, or for files that have gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

from datatrove.pipeline.base import PipelineStep

from davinci_jax.curation.account import Account
from davinci_jax.curation.corpus import LastPass, remembered
from davinci_jax.curation.documents import Document, GzipText, read_documents
from davinci_jax.curation.executors import Work
from davinci_jax.curation.inputs import Plan, acquire
from davinci_jax.curation.interrupt import check
from davinci_jax.curation.pipeline import FunnelStep, Timed, begin, through
from davinci_jax.curation.registry import build, build_reader
from davinci_jax.curation.stages import funnel_step
from davinci_jax.curation.tasks import (
    REDUCE,
    CorpusPaths,
    Notes,
    Paths,
    StageJob,
    bytes_out,
    digests_before,
    file_digest,
    files_digest,
    folder_files,
    forget_if_damaged,
    input_digests,
    is_collected,
    is_done,
    is_reduced,
    joint_digest,
    read_counts,
    remove_rejects,
)
from davinci_jax.curation.tokens import TokenCounter, counted_by
from davinci_jax.errors import DataError
from davinci_jax.experiment.curation import CuratedSource, Step
from davinci_jax.files import write_atomically


class _Task:
    """The books of the task at hand, opened by whichever step comes first.

    The steps of a work share one, and its rows; each task runs a copy of the whole list of steps (`_Local.run`, or one
    that was pickled), so that it begins with rows of zeros.
    """

    def __init__(self, job: StageJob, rows: list[FunnelStep]):
        self.job, self.rows, self.account = job, rows, None

    def open(self, rank: int) -> Account:
        if self.account is None:
            folder = self.job.paths.temporary(rank)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            progress = self.job.paths.progress(rank)
            progress.parent.mkdir(exist_ok=True)
            first = self.job.stage.first - (not self.job.stage.before)
            self.account = Account(folder, self.rows, first, TokenCounter(self.job.tokenizer), progress)
        return self.account


class ReadInputs(PipelineStep):
    """L0: the documents of the files that a task was given."""

    name, type = "read inputs", "L0"

    def __init__(self, task: _Task, row: FunnelStep):
        super().__init__()
        self._task, self._row = task, row

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        account, source = self._task.open(rank), self._task.job.source
        readers = [build_reader(given) for given in source.inputs]

        def reject(document: Document, reason: str) -> None:
            check()  # a file may give nothing else
            account.took(self._row, document)
            account.rejected(self._row, document, reason)

        for position, item in Plan.read_task(self._task.job.paths.plan_line(rank)).items:
            left = item.size
            found = Timed(acquire(source, source.inputs[position], readers[position], item, reject))
            for document in found:
                check()
                account.took(self._row, document)
                account.gave(self._row, document, None)
                yield document
                # A file may be compressed: its documents are as much of it as they can be.
                account.read(min(left, document.size))
                left = max(0, left - document.size)
            account.read(left)
            self._row.seconds += found.seconds


class ReadDocuments(PipelineStep):
    """The documents that the same task of the stage before has written."""

    name, type = "read documents", "stage"

    def __init__(self, before: Paths, task: _Task | None = None):
        super().__init__()
        self._before, self._task = before, task

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        account = self._task.open(rank) if self._task else None
        try:
            for document in read_documents(self._before.documents(rank)):
                check()
                yield document
                if account:
                    account.read(document.size)
        except Exception as error:
            forget_if_damaged(self._before, rank, error)
            raise


class Apply(PipelineStep):
    """One operation of the recipe."""

    type = "operation"

    def __init__(self, task: _Task, step: Step, row: FunnelStep):
        super().__init__()
        self.name = step.operation
        self._task, self._step, self._row = task, step, row

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        operation = build(self._step)
        if hasattr(operation, "bind"):
            folder = self._task.job.folder / "kept" / operation.name
            folder.mkdir(parents=True, exist_ok=True)
            operation = operation.bind(folder)
        started = time.perf_counter()
        begin(operation)
        self._row.seconds += time.perf_counter() - started
        yield from through(operation, self._row, data, self._task.open(rank))


class ApplyCorpus(PipelineStep):
    """The last pass of an operation that has seen the whole source."""

    type = "corpus operation"

    def __init__(self, task: _Task, step: Step, row: FunnelStep):
        super().__init__()
        self.name = step.operation
        self._task, self._step, self._row = task, step, row

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        operation, job = build(self._step), self._task.job
        before = Notes.load(job.corpus.notes(f"{rank:06d}"))
        if before is None or before.input_digest != _output_digest(job.before, rank):
            raise DataError(
                str(job.before.documents(rank)),
                None,
                f"is not what the first pass of {operation.name} has seen",
                "start the same command again: it reads the documents anew",
            )
        self._row.seconds += before.seconds
        if rank == 0:  # the pass of them all is told once
            self._row.seconds += Notes.load(job.corpus.notes(REDUCE)).seconds
        started = time.perf_counter()
        begin(operation)
        opened = operation.open(job.corpus.reduced, rank)  # of some operations a table of the whole source
        self._row.seconds += time.perf_counter() - started
        yield from through(LastPass(operation, opened, before.failed), self._row, data, self._task.open(rank))


class WriteDocuments(PipelineStep):
    """Writes the documents of a task and moves all its files in place."""

    name, type = "write documents", "stage"

    def __init__(self, task: _Task):
        super().__init__()
        self._task = task

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        account, paths = self._task.open(rank), self._task.job.paths
        new = account.folder / "documents.jsonl.gz"
        try:
            with GzipText(new) as out:
                for document in data:
                    check()  # one document that was read may become many
                    self._check_text(document)
                    account.kept(document)
                    out.write(document.to_json() + "\n")
            counts = account.close()
            remove_rejects(paths, rank)
            rejects = {file.parent.name: file for file in sorted(account.folder.glob("*/rejects.jsonl.gz"))}
            counts["rejects"] = {label: file.stat().st_size for label, file in rejects.items()}
            for label, file in rejects.items():
                _move(file, paths.rejects(label, rank))
            # A later stage may be counted otherwise: the config may name another tokenizer by then.
            counts["tokens_by"] = counted_by(self._task.job.tokenizer)
            counts |= {"file_bytes": new.stat().st_size, "output_digest": file_digest(new)}
            counts["input_digest"] = self._input_digest(rank)
            _move(new, paths.documents(rank))
            paths.counts(rank).parent.mkdir(exist_ok=True)
            write_atomically(paths.counts(rank), json.dumps(counts, ensure_ascii=False))
        except BaseException:
            account.abandon()
            raise
        finally:
            shutil.rmtree(account.folder, ignore_errors=True)

    def _check_text(self, document: Document) -> None:
        """Raises `DataError` for a result that nobody can read; what is declared as L0 is as it was acquired."""
        source = self._task.job.source
        if not document.text and self._task.job.is_last and source.level != "L0":
            raise DataError(
                f"sources[{source.name}].recipe",
                None,
                f"makes no text of {document.id}",
                "add a step that reads its bytes (decode-utf8, html-text, pdf-text, ...), or one that drops it "
                "(drop-short)",
            )

    def _input_digest(self, rank: int) -> str:
        """Returns the digest of what decided the documents of a task, see `tasks.input_digests`."""
        job = self._task.job
        if job.corpus:
            return Notes.load(job.corpus.notes(REDUCE)).input_digest
        return _output_digest(job.before, rank) if job.before else files_digest(job.paths.plan_line(rank))


class Collect(PipelineStep):
    """The first pass of a corpus operation over the documents of a task."""

    type = "corpus operation"

    def __init__(self, step: Step, before: Paths, corpus: CorpusPaths):
        super().__init__()
        self.name = f"{step.operation}: collect"
        self._step, self._before, self._corpus = step, before, corpus

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        with _new_folder(self._corpus.collected(rank)) as folder:
            started, documents = time.perf_counter(), Timed(iter(data))
            operation, failed = build(self._step), {}
            begin(operation)
            operation.collect(remembered(operation, documents, failed), folder)
            seconds = time.perf_counter() - started - documents.seconds
            files = folder_files(folder)
        digest = _output_digest(self._before, rank)
        Notes(seconds, failed, digest, files).write(self._corpus.notes(f"{rank:06d}"))


class Reduce(PipelineStep):
    """The second pass of a corpus operation, over what all tasks have collected."""

    type = "corpus operation"

    def __init__(self, step: Step, corpus: CorpusPaths, tasks: int):
        super().__init__()
        self.name = f"{step.operation}: reduce"
        self._step, self._corpus, self._tasks = step, corpus, tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        collected = [self._corpus.collected(task) for task in range(self._tasks)]
        notes = [Notes.load(self._corpus.notes(folder.name)) for folder in collected]
        with _new_folder(self._corpus.reduced) as folder:
            started = time.perf_counter()
            build(self._step).reduce(collected, folder)
            seconds = time.perf_counter() - started
            files = folder_files(folder)
        digest = joint_digest([known.input_digest for known in notes])
        Notes(seconds, {}, digest, files).write(self._corpus.notes(REDUCE))


def works(job: StageJob, plan: Plan) -> list[Work]:
    """Returns what has to run for a stage, in order: for a corpus operation its first two passes, then the stage.

    The stage before is as it will be read, or in the hands of a cluster: then nothing counts as done.
    """
    tasks = len(plan.tasks)
    size = bytes_out(job.before, tasks) if job.before else plan.bytes
    before = digests_before(job, plan)
    passes = _corpus_works(job, before, size) if job.corpus else []
    return [*passes, _stage_work(job, input_digests(job, before), size)]


def _corpus_works(job: StageJob, before: list[str | None], size: int) -> list[Work]:
    step, corpus, joint = job.stage.steps[0], job.corpus, joint_digest(before)

    return [
        Work(
            f"{step.operation}: collect",
            [ReadDocuments(job.before), Collect(step, job.before, corpus)],
            len(before),
            corpus.collect_logs,
            lambda task: is_collected(corpus, task, before[task]),
            lambda: _remove_temporary(corpus.folder / "collected"),
            size,
            None,
        ),
        Work(
            f"{step.operation}: reduce",
            [Reduce(step, corpus, len(before))],
            1,
            corpus.reduce_logs,
            lambda _: is_reduced(corpus, joint),
            lambda: _remove_temporary(corpus.folder),
            0,
            None,
        ),
    ]


def _stage_work(job: StageJob, digests: list[str | None], size: int) -> Work:
    stage, paths = job.stage, job.paths
    rows = [funnel_step(operation) for operation in stage.operations]
    if job.before is None:
        rows = [acquire_row(job.source), *rows]
    task = _Task(job, rows)
    first = ReadDocuments(job.before, task) if job.before else ReadInputs(task, rows[0])
    rows = rows if job.before else rows[1:]
    steps = [
        (ApplyCorpus if stage.corpus and n == 0 else Apply)(task, step, row)
        for n, (step, row) in enumerate(zip(stage.steps, rows, strict=True))
    ]
    names = " + ".join(step.operation for step in stage.steps) or "acquire"
    return Work(
        names,
        [first, *steps, WriteDocuments(task)],
        len(digests),
        paths.logs,
        lambda rank: is_done(paths, rank, digests[rank]),
        lambda: shutil.rmtree(paths.folder / "temporary", ignore_errors=True),
        size,
        paths,
    )


def acquire_row(source: CuratedSource) -> FunnelStep:
    """Returns the funnel's first row: the inputs of a source."""
    return FunnelStep("acquire", "L0", {given.label: given.kind for given in source.inputs})


def _output_digest(paths: Paths, task: int) -> str:
    """Returns the digest of the documents of a task that is done."""
    counts = read_counts(paths, task)
    if counts is None:
        raise DataError(str(paths.documents(task)), None, "has gone or was changed", "start the same command again")
    return counts["output_digest"]


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder that is renamed at the end, its files forced to disk."""
    new = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for file in filter(pathlib.Path.is_file, new.rglob("*")):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove_temporary(folder: pathlib.Path) -> None:
    for left in folder.glob(".*") if folder.is_dir() else ():
        shutil.rmtree(left, ignore_errors=True)


def _move(file: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, target)
