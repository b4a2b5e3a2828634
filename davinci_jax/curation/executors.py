"""What runs the tasks of a stage: this process, a pool of processes, Ray or Slurm, through datatrove's executors."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pathlib
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import multiprocess.forkserver
import multiprocess.resource_tracker
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from davinci_jax.curation.interrupt import check, held_back
from davinci_jax.curation.tasks import Paths, StageJob
from davinci_jax.errors import DataError, UserError
from davinci_jax.experiment.curation import CurationConfig
from davinci_jax.files import write_atomically

_ERROR_FILE = "error.txt"
_SLURM_FILE = "slurm_job.txt"
_WORKER_BYTES = 4 * 2**20  # a further process takes a second to start: it must have that much to read


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


def execute(config: CurationConfig, work: Work, depends: PipelineExecutor | None = None) -> PipelineExecutor:
    """Runs the tasks of a work that are not done, on Slurm after those of `depends`; returns its executor.

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
        check()  # a signal to the whole group ends the workers first, and what fails then hides that it has come
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
    logs = [job.paths.logs, *((job.corpus.collect_logs, job.corpus.reduce_logs) if job.corpus else ())]
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


def _executor(config: CurationConfig, work: Work, workers: int, depends: PipelineExecutor | None) -> PipelineExecutor:
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
            "curation.executor", "ray", "is not installed", "in the clone: pip install -e '.[curation-ray]'"
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
                # Ray keeps exceptions of tasks to itself. On a full disk there is no room for them.
                with contextlib.suppress(OSError):
                    _tell(pathlib.Path(self.logging_dir.path), error)
                raise
            finally:
                logger.remove()


def _tell(logs: pathlib.Path, error: Exception) -> None:
    line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    (logs / _ERROR_FILE).write_text(line, encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _kept_from_children() -> Iterator[None]:
    """Holds back Ctrl-C; what is started meanwhile never gets it.

    A terminal sends it to the workers of a pool as well. They are stopped by this process.
    """
    multiprocess.resource_tracker.ensure_running()  # its start would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Local(_Quiet, LocalPipelineExecutor):
    def run(self) -> None:
        if self.workers > 1:
            # Its manager process would be forked off this one, which may have threads of JAX or of the progress bar.
            multiprocess.set_start_method(self.start_method, force=True)
            with _kept_from_children():
                multiprocess.forkserver.ensure_running()
            super().run()
            return
        pipeline = self.pipeline
        for rank in self.get_incomplete_ranks():
            # Steps keep counts. A copy of the list as a whole keeps what they share, and starts each task from zero.
            self.pipeline = copy.deepcopy(pipeline)
            with held_back():
                self._run_for_rank(rank)


class _Ray(_Quiet, RayPipelineExecutor):
    pass


def _failure(work: Work, error: Exception | None) -> UserError:
    """Returns the error of a task that failed, with what was wrong in one line."""
    if isinstance(error, UserError):
        return error
    told = work.logs / _ERROR_FILE
    problem = f"{type(error).__name__}: {error}" if error else "a task has failed"
    # Written by the task itself it says more than what an executor makes of it; a full disk leaves it empty.
    problem = (told.read_text(encoding="utf-8") if told.is_file() else "") or problem
    return DataError(work.title, None, f"{problem}; logs in {work.logs}", "mend it and start the same command again")
