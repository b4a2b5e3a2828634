"""The steps of a stage on datatrove: the same list runs in this process, on a pool of processes, on Ray or on Slurm.

A stage has as many tasks as its source has been cut into, whatever runs them. A task writes below a temporary name and
moves its files in place at its end, counts last: a task with counts is whole. datatrove's own marks of completion
follow from that before every launch, so they can never speak for another recipe, or for files that have gone.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from davinci_jax.curation.account import Account
from davinci_jax.curation.corpus import LastPass, remembered
from davinci_jax.curation.documents import Document, GzipText, read_documents
from davinci_jax.curation.inputs import Plan, acquire
from davinci_jax.curation.pipeline import FunnelStep, Timed, through
from davinci_jax.curation.registry import build, build_reader
from davinci_jax.curation.stages import Stage, funnel_step
from davinci_jax.curation.tokens import TokenCounter, counted_by
from davinci_jax.errors import DataError, UserError
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Step
from davinci_jax.files import write_atomically

PLAN_FILE = "plan.jsonl"
_ERROR_FILE = "error.txt"
_NOTES_FOLDER, _REDUCE = "notes", "reduce"
_SLURM_FILE = "slurm_job.txt"
_COLLECT_LOGS, _REDUCE_LOGS = "logs-collect", "logs-reduce"
_WORKER_BYTES = 4 * 2**20  # a further process takes a second to start: it must have that much to read


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
    def logs(self) -> pathlib.Path:
        return self.folder / "logs"


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
    def corpus_folder(self) -> pathlib.Path:
        return self.folder / f"corpus-{self.stage.corpus}"


class _Task:
    """The books of the task at hand, opened by whichever step comes first."""

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
            account.took(self._row, document)
            account.rejected(self._row, document, reason)

        for position, item in self._task_items(rank):
            left = item.size
            found = Timed(acquire(source, source.inputs[position], readers[position], item, reject))
            for document in found:
                account.took(self._row, document)
                account.gave(self._row, document, None)
                yield document
                # A file may be compressed: its documents are as much of it as they can be.
                account.read(min(left, document.size))
                left = max(0, left - document.size)
            account.read(left)
            self._row.seconds += found.seconds

    def _task_items(self, rank: int) -> Iterator:
        with (self._task.job.folder / self._task.job.stage.hash / PLAN_FILE).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number == rank:
                    yield from Plan.read_task(line).items


class ReadDocuments(PipelineStep):
    """The documents that the same task of the stage before has written."""

    name, type = "read documents", "stage"

    def __init__(self, before: Paths, task: _Task | None = None):
        super().__init__()
        self._before, self._task = before, task

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        account = self._task.open(rank) if self._task else None
        for document in read_documents(self._before.documents(rank)):
            yield document
            if account:
                account.read(document.size)


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
        yield from through(operation, self._row, data, self._task.open(rank))


class ApplyCorpus(PipelineStep):
    """The last pass of an operation that has seen the whole source."""

    type = "corpus operation"

    def __init__(self, task: _Task, step: Step, row: FunnelStep):
        super().__init__()
        self.name = step.operation
        self._task, self._step, self._row = task, step, row

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        operation, folder = build(self._step), self._task.job.corpus_folder
        before = _Notes.read(folder, f"{rank:06d}")
        self._row.seconds += before.seconds
        if rank == 0:  # the pass of them all is told once
            self._row.seconds += _Notes.read(folder, _REDUCE).seconds
        started = time.perf_counter()
        opened = operation.open(folder / "reduced", rank)  # of some operations a table of the whole source
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
                    account.kept(document)
                    out.write(document.to_json() + "\n")
            counts = account.close()
            _remove_rejects(paths, rank)
            for label in (path for path in account.folder.iterdir() if path.is_dir()):
                _move(label / "rejects.jsonl.gz", paths.rejects(label.name, rank))
            # A later stage may be counted otherwise: the config may name another tokenizer by then.
            counts["tokens_by"] = counted_by(self._task.job.tokenizer)
            counts["file_bytes"] = new.stat().st_size
            _move(new, paths.documents(rank))
            paths.counts(rank).parent.mkdir(exist_ok=True)
            write_atomically(paths.counts(rank), json.dumps(counts, ensure_ascii=False))
        except BaseException:
            account.abandon()
            raise
        finally:
            shutil.rmtree(account.folder, ignore_errors=True)


class Collect(PipelineStep):
    """The first pass of a corpus operation over the documents of a task."""

    type = "corpus operation"

    def __init__(self, step: Step, folder: pathlib.Path):
        super().__init__()
        self.name = f"{step.operation}: collect"
        self._step, self._folder = step, folder

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        with _new_folder(self._folder / "collected" / f"{rank:06d}") as folder:
            started, documents = time.perf_counter(), Timed(iter(data))
            operation, failed = build(self._step), {}
            operation.collect(remembered(operation, documents, failed), folder)
            _Notes(time.perf_counter() - started - documents.seconds, failed).write(self._folder, f"{rank:06d}")


class Reduce(PipelineStep):
    """The second pass of a corpus operation, over what all tasks have collected."""

    type = "corpus operation"

    def __init__(self, step: Step, folder: pathlib.Path, tasks: int):
        super().__init__()
        self.name = f"{step.operation}: reduce"
        self._step, self._folder, self._tasks = step, folder, tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        collected = [self._folder / "collected" / f"{task:06d}" for task in range(self._tasks)]
        with _new_folder(self._folder / "reduced") as folder:
            started = time.perf_counter()
            build(self._step).reduce(collected, folder)
            _Notes(time.perf_counter() - started, {}).write(self._folder, _REDUCE)


class _Notes(NamedTuple):
    """What the last pass of a corpus operation must know of one before it; it lies beside the folders of the operation.

    Attributes:
      seconds: that the pass took, for the funnel.
      failed: see `corpus.remembered`.
    """

    seconds: float
    failed: dict[int, str]

    def write(self, corpus: pathlib.Path, of: str) -> None:
        file = corpus / _NOTES_FOLDER / f"{of}.json"
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(self._asdict()))

    @classmethod
    def read(cls, corpus: pathlib.Path, of: str) -> _Notes:
        fields = json.loads((corpus / _NOTES_FOLDER / f"{of}.json").read_text(encoding="utf-8"))
        return cls(fields["seconds"], {int(number): why for number, why in fields["failed"].items()})


class Work(NamedTuple):
    """A list of steps with its tasks: what an executor runs.

    Attributes:
      title: what progress shows.
      steps: the pipeline.
      tasks: how many times it runs, each on its own documents.
      logs: folder of datatrove's logs and marks.
      is_done: whether a task has left all its files.
      clean: removes what killed tasks have left.
      bytes: what its tasks read, as far as that is known.
      paths: of the stage, for progress; `None` for passes without documents.
    """

    title: str
    steps: list[PipelineStep]
    tasks: int
    logs: pathlib.Path
    is_done: Callable[[int], bool]
    clean: Callable[[], None]
    bytes: int
    paths: Paths | None


def works(job: StageJob, plan: Plan) -> list[Work]:
    """Returns what has to run for a stage, in order: for a corpus operation its first two passes, then the stage."""
    stage, tasks, found = job.stage, len(plan.tasks), []
    size = _bytes_out(Paths(job.folder / stage.before), tasks) if stage.before else plan.bytes
    if stage.corpus:
        step, folder, before = stage.steps[0], job.corpus_folder, Paths(job.folder / stage.before)
        found = [
            Work(
                f"{step.operation}: collect",
                [ReadDocuments(before), Collect(step, folder)],
                tasks,
                folder / _COLLECT_LOGS,
                lambda task: (folder / "collected" / f"{task:06d}").is_dir(),
                lambda: _remove_temporary(folder / "collected"),
                size,
                None,
            ),
            Work(
                f"{step.operation}: reduce",
                [Reduce(step, folder, tasks)],
                1,
                folder / _REDUCE_LOGS,
                lambda task: (folder / "reduced").is_dir(),
                lambda: _remove_temporary(folder),
                0,
                None,
            ),
        ]
    return [*found, _stage_work(job, tasks, size)]


def _stage_work(job: StageJob, tasks: int, size: int) -> Work:
    stage, paths = job.stage, job.paths
    rows = [funnel_step(operation) for operation in stage.operations]
    if not stage.before:
        rows = [acquire_row(job.source), *rows]
    task = _Task(job, rows)
    first = ReadDocuments(Paths(job.folder / stage.before), task) if stage.before else ReadInputs(task, rows[0])
    rows = rows if stage.before else rows[1:]
    steps = [
        (ApplyCorpus if stage.corpus and n == 0 else Apply)(task, step, row)
        for n, (step, row) in enumerate(zip(stage.steps, rows, strict=True))
    ]
    names = " + ".join(step.operation for step in stage.steps) or "acquire"
    return Work(
        names,
        [first, *steps, WriteDocuments(task)],
        tasks,
        paths.logs,
        lambda rank: read_counts(paths, rank) is not None,
        lambda: shutil.rmtree(paths.folder / "temporary", ignore_errors=True),
        size,
        paths,
    )


def acquire_row(source: CuratedSource) -> FunnelStep:
    """Returns the funnel's first row: the inputs of a source."""
    return FunnelStep("acquire", "L0", {given.label: given.kind for given in source.inputs})


def read_counts(paths: Paths, task: int) -> dict[str, Any] | None:
    """Returns the counts of a task whose documents are there as it left them, else `None`."""
    try:
        counts = json.loads(paths.counts(task).read_text(encoding="utf-8"))
        return counts if paths.documents(task).stat().st_size == counts["file_bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def execute(config: CurationConfig, work: Work, depends: Any = None) -> Any:
    """Runs the tasks of a work that are not done; returns its executor.

    On Slurm the jobs are handed over and may still be waiting when this returns.

    Raises:
      DataError: a task has failed; what others have done stays done.
    """
    work.clean()
    left = _mark(work)
    (work.logs / _ERROR_FILE).unlink(missing_ok=True)
    workers = max(1, min(config.workers or os.cpu_count() or 1, len(left), math.ceil(work.bytes / _WORKER_BYTES)))
    executor = _executor(config, work, workers, depends)
    if not left:
        return executor
    try:
        executor.run()
    except Exception as error:
        raise _failure(work, error) from error
    if config.executor == "slurm":
        write_atomically(work.logs / _SLURM_FILE, str(executor.job_id))  # of several arrays the one that ends last
    elif not all(map(work.is_done, left)):
        raise _failure(work, None)
    return executor


def slurm_jobs(job: StageJob) -> list[str]:
    """Returns the jobs of Slurm that an earlier command has given a stage to and that have not ended.

    Where there is no `squeue`, none is known.

    Raises:
      DataError: `squeue` fails.
    """
    logs = [job.paths.logs, *(job.corpus_folder / name for name in (_COLLECT_LOGS, _REDUCE_LOGS) if job.stage.corpus)]
    files = [folder / _SLURM_FILE for folder in logs]
    known = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return [number for number in known if shutil.which("squeue") and _is_queued(number)]


def _is_queued(number: str) -> bool:
    """Whether a job of Slurm waits or runs; one that ended a while ago is not known any more."""
    asked = subprocess.run(["squeue", "-h", "-j", number], capture_output=True, text=True, check=False)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        problem = f"squeue does not say whether job {number} has ended ({asked.stderr.strip()[:200]})"
        raise DataError("curation.executor", "slurm", problem, "start the same command again when it does")
    return not asked.returncode and bool(asked.stdout.strip())


def _mark(work: Work) -> list[int]:
    """Makes datatrove's marks of completion say what the files say; returns the tasks that are left."""
    marks = work.logs / "completions"
    marks.mkdir(parents=True, exist_ok=True)
    left = []
    for task in range(work.tasks):
        mark = marks / f"{task:05d}"
        if work.is_done(task):
            mark.touch()
        else:
            mark.unlink(missing_ok=True)
            left.append(task)
    return left


def _executor(config: CurationConfig, work: Work, workers: int, depends: Any) -> Any:
    common = {"pipeline": work.steps, "tasks": work.tasks, "logging_dir": str(work.logs)}
    if config.executor == "local":
        logger.remove()  # datatrove's own lines; they are in its logs
        return _Local(**common, workers=workers)
    if config.executor == "ray":
        logger.remove()
        _start_ray(workers)
        return _Ray(**common, workers=workers)
    slurm = config.slurm
    return SlurmPipelineExecutor(
        **common,
        workers=config.workers or -1,
        depends=depends,
        partition=slurm.partition,
        time=slurm.time,
        cpus_per_task=slurm.cpus_per_task,
        mem_per_cpu_gb=slurm.memory_per_cpu_gb,
        qos=slurm.qos,
        env_command=slurm.setup or None,
        sbatch_args=dict(slurm.options),
        job_name=f"davinci-{work.title.split()[0]}",
    )


def _start_ray(workers: int) -> None:
    try:
        import ray
    except ImportError as error:
        raise DataError(
            "curation.executor", "ray", "is not installed", "pip install 'davinci-jax[curation-ray]'"
        ) from error
    if not ray.is_initialized():
        # RAY_ADDRESS names a cluster; without one Ray starts here.
        own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **own)


class _Quiet:
    """Keeps datatrove's console lines off ours; its log files hold them."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)
            except Exception as error:
                # Ray keeps exceptions of tasks to itself.
                line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                with self.logging_dir.open(_ERROR_FILE, "w") as told:
                    told.write(line)
                raise
            finally:
                logger.remove()


class _Local(_Quiet, LocalPipelineExecutor):
    def run(self) -> None:
        if self.workers > 1:
            # Its manager process would be forked off this one, which may have threads of JAX or of the progress bar.
            multiprocess.set_start_method(self.start_method, force=True)
            super().run()
            return
        pipeline = self.pipeline
        for rank in self.get_incomplete_ranks():
            self.pipeline = copy.deepcopy(pipeline)
            self._run_for_rank(rank)


class _Ray(_Quiet, RayPipelineExecutor):
    pass


def _failure(work: Work, error: Exception | None) -> UserError:
    """Returns the error of a task that failed, with what was wrong in one line."""
    if isinstance(error, UserError):
        return error
    told = work.logs / _ERROR_FILE
    problem = f"{type(error).__name__}: {error}" if error else "a task has failed"
    problem = told.read_text(encoding="utf-8") if told.is_file() else problem
    return DataError(work.title, None, f"{problem}; logs in {work.logs}", "mend it and start the same command again")


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder that is renamed at the end."""
    new = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove_temporary(folder: pathlib.Path) -> None:
    for left in folder.glob(".*") if folder.is_dir() else ():
        shutil.rmtree(left, ignore_errors=True)


def _remove_rejects(paths: Paths, rank: int) -> None:
    """Removes what an attempt that ended half way has moved: this one may drop nothing there, and keep the document."""
    rejects = paths.folder / "rejects"
    for label in rejects.iterdir() if rejects.is_dir() else ():
        if not label.is_symlink():  # a link leads to the rejects of an earlier stage
            paths.rejects(label.name, rank).unlink(missing_ok=True)


def _move(file: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, target)


def is_whole(paths: Paths, tasks: int) -> bool:
    """Whether all tasks of a stage have left their files."""
    return all(read_counts(paths, task) is not None for task in range(tasks))


def _bytes_out(paths: Paths, tasks: int) -> int:
    """Returns the bytes of the documents of a stage, 0 for tasks that a cluster has still to run."""
    counts = filter(None, all_counts(paths, tasks))
    return sum(task["steps"][-1]["bytes_out"] if task["steps"] else task["file_bytes"] for task in counts)


def all_counts(paths: Paths, tasks: int) -> list[dict[str, Any]]:
    """Returns the counts of a stage's tasks, in order."""
    return [read_counts(paths, task) for task in range(tasks)]
