"""`davinci curate`: sources through their recipes, one after the other; what is there already stays as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

import davinci_jax
from davinci_jax.curation import funnel as funnels
from davinci_jax.curation.documents import CURATED
from davinci_jax.curation.figures import show_bytes, show_count
from davinci_jax.curation.inputs import Plan, Reader, field, make_plan
from davinci_jax.curation.interrupt import stoppable
from davinci_jax.curation.registry import build, build_reader
from davinci_jax.curation.report import write_report
from davinci_jax.curation.stages import Stage, split
from davinci_jax.curation.tasks import Paths, StageJob, all_counts, is_whole
from davinci_jax.curation.tokens import counted_by
from davinci_jax.errors import DataError
from davinci_jax.experiment import to_dict
from davinci_jax.experiment.curation import CuratedSource, CurationConfig
from davinci_jax.files import write_atomically

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor

CURRENT = "current"  # the link to the newest result of a source
_TOLD_BYTES = 2**30  # of earlier results: from there on it takes seconds to check them


@dataclasses.dataclass(frozen=True)
class Curated:
    """What `curate` did for one source.

    Attributes:
      source: name of the source.
      folder: where its result lies: documents/, rejects/, samples/, funnel.json, card.json.
      funnel: `funnel.json` as read back.
      built: whether anything was computed; `False` means that it was all there already.
    """

    source: str
    folder: pathlib.Path
    funnel: dict[str, Any]
    built: bool


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A source that has been looked at: its files, its operations, and the stages that they make.

    Attributes:
      source: as the config describes it.
      folder: of the source, below which each stage has a folder.
      readers: of its inputs.
      plan: its files, cut into tasks.
      stages: the recipe, cut where results are kept.
    """

    source: CuratedSource
    folder: pathlib.Path
    readers: tuple[Reader, ...]
    plan: Plan
    stages: tuple[Stage, ...]

    @property
    def result(self) -> pathlib.Path:
        """The folder of the result, named by the recipe hash."""
        return self.folder / self.stages[-1].hash


def check(config: CurationConfig) -> None:
    """Raises `ConfigError` for the first operation, parameter or kind of input that a config gets wrong."""
    for source in config.sources:
        _operations(source)
        for given in source.inputs:
            build_reader(given, field(source, given))


def prepare(config: CurationConfig, source: CuratedSource) -> Prepared:
    """Returns what a source comes to; nothing is written.

    Raises:
      ConfigError: an unknown operation, parameter, kind of input or option.
      DataError: an input is not there, or something else is in the place of the result.
    """
    operations = _operations(source)
    folder = source_folder(config, source.name)
    _check_link(folder / CURRENT)
    readers = tuple(build_reader(given, field(source, given)) for given in source.inputs)
    plan = make_plan(source, build_reader, config.task_bytes)
    stages = tuple(split(source, plan, readers, operations))
    return Prepared(source, folder, readers, plan, stages)


def source_folder(config: CurationConfig, name: str) -> pathlib.Path:
    """Returns the folder of a source, whether or not it is there yet; `current` in it leads to the newest result."""
    return pathlib.Path(config.root) / CURATED / name


@stoppable()
def curate(config: CurationConfig, console: Console | None = None) -> list[Curated]:
    """Brings every source through its recipe and writes `report.html`; returns what was done for each.

    Below `<root>/curated/<source>/` each stage of the recipe has a folder named by the hash of the input and of all
    operations up to its end, with their code. The last one's is the recipe hash: its folder is the result, and
    `current` leads there. A stage that is there is used again, so an edit repeats only what comes after it; a run
    that was killed goes on with the tasks that are not done. A source that Slurm is at work on, and one that reads
    it, is left for the next start. Ctrl-C and SIGTERM stop it between two documents; a second one ends it at once.

    Args:
      config: root, sources, and what runs the tasks.
      console: where plan and progress are shown; default: standard output.

    Raises:
      ConfigError: a recipe or an input that cannot be.
      DataError: an input is missing, a task has failed, or another process curates the same source.
      KeyboardInterrupt: it was asked to stop; the next start goes on from there.
    """
    console = console or Console()
    check(config)
    _look_ahead(config)
    results, handed = [], []
    for n, source in enumerate(config.sources):
        result = None
        if waits := _unmade(config, source, config.sources[:n], handed):
            again = "start the same command again when that is made"
            _tell(console, f"{source.name}: waits for {', '.join(waits)}; {again}")
        else:
            with _lock(config, source_folder(config, source.name)):
                result = _curate_source(config, prepare(config, source), console)
        (handed if result is None else results).append(result or source.name)
    if len(results) == len(config.sources):
        report = write_report(config)
        _tell(console, f"report: {report}")
    return results


def show_plan(config: CurationConfig, console: Console | None = None) -> None:
    """Prints files, tasks and stages of every source, and which stages are there; changes nothing.

    A source that goes on from an earlier one of the config shows its steps alone until that one is made, or made anew.

    Raises:
      ConfigError, DataError: as `curate` does.
    """
    from davinci_jax.curation.progress import show_prepared, show_waiting
    from davinci_jax.curation.reuse import foresee

    check(config)
    console, changes = console or Console(), []
    for n, source in enumerate(config.sources):
        missing = _unmade(config, source, config.sources[:n])
        if waits := missing or _unmade(config, source, config.sources[:n], changes):
            why = "not there yet" if missing else "which changes"
            show_waiting(source, _operations(source), waits, why, console)
            changes.append(source.name)
            continue
        prepared = prepare(config, source)
        jobs = _jobs(config, prepared)
        whole = [is_whole(job, prepared.plan) for job in jobs]
        show_prepared(prepared, whole, console, foresee(jobs, prepared.plan))
        changes += [] if all(whole) else [source.name]


def _curate_source(config: CurationConfig, prepared: Prepared, console: Console) -> Curated | None:
    """Returns the result of a source, `None` where it is in the hands of a cluster."""
    from davinci_jax.curation.executors import slurm_jobs
    from davinci_jax.curation.progress import show_prepared

    name, jobs = prepared.source.name, _jobs(config, prepared)
    whole = [is_whole(job, prepared.plan) for job in jobs]
    show_prepared(prepared, whole, console)
    left = [job for job, done in zip(jobs, whole, strict=True) if not done]
    if queued := sorted({number for job in left for number in slurm_jobs(job)}):
        # Their tasks write below names that a new start would clear away.
        ended = "start the same command again when it has, or when you have cancelled it"
        _tell(console, f"{name}: Slurm has not ended job {', '.join(queued)}; {ended}")
        return None
    last = _run_stages(config, prepared, jobs, console) if left else None
    if config.executor == "slurm" and not is_whole(jobs[-1], prepared.plan):
        ended = "start the same command again when it has ended"
        _tell(console, f"{name}: handed to Slurm, last job {last.job_id}; {ended}")
        return None
    known = _complete(prepared, jobs, bool(left), console)
    _tell_counter(counted_by(_tokenizer(config)), known["tokens_by"], prepared, console)
    return Curated(name, prepared.result, known, bool(left))


def _complete(prepared: Prepared, jobs: Sequence[StageJob], built: bool, console: Console) -> dict[str, Any]:
    """Writes what a result has besides its documents, points to it and tells of it; returns its funnel."""
    known = funnels.read_funnel(prepared.result)
    if known is None or built:
        known = _finish(prepared, [all_counts(job.paths, len(prepared.plan.tasks)) for job in jobs])
    funnels.link_rejects(prepared.result, [job.paths.folder for job in jobs[:-1]])
    _write_card(prepared, known)
    notes = _point(prepared, known)
    if built:
        _tell(console, funnels.show_funnel(known["steps"]))
    state = f"{'made' if built else 'up to date'}: {prepared.result}"
    made = f"{show_count(known['documents'], 'document')}, {show_bytes(known['bytes'])}, {state}"
    for line in (made, *notes):
        _tell(console, f"{prepared.source.name}: {line}")
    return known


def _tell(console: Console, line: str) -> None:
    """Prints a line as it is, with paths that may look like markup."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _run_stages(
    config: CurationConfig, prepared: Prepared, jobs: Sequence[StageJob], console: Console
) -> PipelineExecutor | None:
    """Runs what is left of the stages of a source, in order; returns the last executor."""
    from davinci_jax.curation.engine import works
    from davinci_jax.curation.executors import execute
    from davinci_jax.curation.progress import Progress
    from davinci_jax.curation.reuse import take_over

    executor = None
    for job in jobs:
        if is_whole(job, prepared.plan):  # the stage before may have come out as it was
            continue
        _write_plan(job.paths, prepared.plan)
        left = works(job, prepared.plan)
        title = f"{prepared.source.name}: {left[0].title}"
        if taken := take_over(job, prepared.plan, functools.partial(_tell_check, console, title)):
            tasks = f"{taken:,} of {len(prepared.plan.tasks):,} tasks"
            _tell(console, f"{title}: {tasks} as in an earlier result")
        for work in left:
            with Progress(console, prepared.source.name, work, prepared.plan):
                executor = execute(config, work, executor)
    return executor


def _tell_check(console: Console, title: str, size: int) -> None:
    if size >= _TOLD_BYTES:
        _tell(console, f"{title}: reads {show_bytes(size)} of earlier results, to see whether they are as they were")


def _jobs(config: CurationConfig, prepared: Prepared) -> list[StageJob]:
    tokenizer = _tokenizer(config)
    return [StageJob(prepared.source, stage, prepared.folder, tokenizer) for stage in prepared.stages]


def _finish(prepared: Prepared, counts: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Writes samples and the funnel of a result; returns the funnel."""
    rows = [row for stage in counts for row in funnels.add_steps(stage)]
    folder = prepared.result
    funnel = {"source": prepared.source.name, "recipe": folder.name, "tokens_by": _tokens_by(counts)}
    funnel |= funnels.summarise(rows, counts[-1])
    funnels.write_samples(folder, counts)
    funnels.write_json(folder / funnels.FUNNEL_FILE, funnel)
    return funnels.read_json(folder / funnels.FUNNEL_FILE)


def _counters(counts: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what counted the tokens of a stage: one way, unless it was changed between two tasks."""
    return sorted({task.get("tokens_by", "an earlier version") for task in counts})


def _tokens_by(counts: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Returns what counted the tokens of a source; stages that were there already keep their counts."""
    ways = [" and ".join(_counters(stage)) for stage in counts]
    if len(set(ways)) == 1:
        return ways[0]
    steps = [", ".join(step["operation"] for step in stage[0]["steps"]) or "no step" for stage in counts]
    return "mixed: " + "; ".join(f"{step} by {way}" for step, way in zip(steps, ways, strict=True))


def _point(prepared: Prepared, funnel: dict[str, Any]) -> list[str]:
    """Leads `current` to a result, unless it is empty and an earlier one is not; returns what to tell of that."""
    link, notes = prepared.folder / CURRENT, []
    earlier = funnels.read_json(link / funnels.FUNNEL_FILE) or {}
    if not funnel["documents"]:
        notes.append(funnels.why_empty(prepared.result, funnel))
    if notes and earlier.get("documents"):
        notes.append(f"{link} still leads to the result before, of {show_count(earlier['documents'], 'document')}")
    else:
        funnels.point(link, prepared.result.name)
    return notes


def _tell_counter(wanted: str, used: str, prepared: Prepared, console: Console) -> None:
    """Says so where tokens are counted otherwise than the config asks, and how to count them again."""
    if used == wanted:
        return
    stages = [Paths(prepared.folder / stage.hash) for stage in prepared.stages]
    counts = {paths.folder: all_counts(paths, len(prepared.plan.tasks)) for paths in stages}
    folders = " ".join(str(folder) for folder, stage in counts.items() if _counters(stage) != [wanted])
    again = f"remove {folders} and start the same command again (kept answers of models stay)"
    _tell(
        console,
        f"{prepared.source.name}: its tokens are counted by {used}, not by {wanted}; to count them again, {again}",
    )


def _write_card(prepared: Prepared, funnel: dict[str, Any]) -> None:
    """Writes the card beside the documents, unless one is there that says the same.

    The recipe hash does not cover what a config declares of a source, and where its inputs lie: that may change
    without new documents.
    """
    source, file = prepared.source, prepared.result / funnels.CARD_FILE
    card = {
        "name": source.name,
        "domain": source.domain,
        "level": source.level,
        # Documents may have come with a level above the recipe's; the source has reached what all of them have. Where
        # there are none it has reached no level, whatever the recipe.
        "level_reached": min(funnel["levels"], default=None),
        "stages": None if source.stages is None else list(source.stages),
        "note": source.note,
        **{name: funnel[name] for name in ("documents", "bytes", "tokens", "tokens_by", "licences", "levels")},
        "inputs": [
            {
                "kind": given.kind,
                "label": given.label,
                "path": given.path if given.kind == "python-installation" else _absolute(given.path),
                "licence": given.licence,
                "options": to_dict(given.options),
            }
            for given in source.inputs
        ],
        "files": prepared.plan.files,
        "file_bytes": prepared.plan.bytes,
        "recipe": [{name: step[name] for name in ("operation", "level", "parameters")} for step in funnel["steps"]],
        "recipe_hash": prepared.result.name,
    }
    known = funnels.read_json(file) or {}
    if any(known.get(name) != value for name, value in card.items()):
        made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        funnels.write_json(file, {**card, "made": made, "made_by": f"davinci-jax {davinci_jax.__version__}"})


def _unmade(
    config: CurationConfig, source: CuratedSource, earlier: Sequence[CuratedSource], handed: Sequence[str] = ()
) -> list[str]:
    """Returns the earlier sources that a source reads and that have no result yet, or whose new one is on its way."""
    folders = {other.name: source_folder(config, other.name) for other in earlier}
    return [
        name
        for name, folder in folders.items()
        if (name in handed or not os.path.exists(folder / CURRENT))
        and any(_is_result_of(folder, given.path) for given in source.inputs)
    ]


def _is_result_of(folder: pathlib.Path, path: str) -> bool:
    """Whether a path leads through the link to the newest result of a source, however it is written."""
    place, folder = pathlib.Path(path).absolute(), folder.resolve()
    return any(part.name == CURRENT and part.parent.resolve() == folder for part in (place, *place.parents))


def _look_ahead(config: CurationConfig) -> None:
    """Looks at what later sources read, so that what is missing is told before the first has run for days.

    What other sources have yet to make is left out; the first source is looked at when its turn comes, which is now.

    Raises:
      ConfigError, DataError: as `prepare` does.
    """
    for n, source in enumerate(config.sources[1:], 1):
        folders = [source_folder(config, name) for name in _unmade(config, source, config.sources[:n])]
        there = [given for given in source.inputs if not any(_is_result_of(folder, given.path) for folder in folders)]
        if there:
            prepare(config, dataclasses.replace(source, inputs=tuple(there)))
        else:
            for operation in _operations(source):
                operation.parameters()  # which asks for the files that they name


def _check_link(link: pathlib.Path) -> None:
    """Raises `DataError` where something else is in the place of the link to the newest result."""
    if os.path.lexists(link) and not link.is_symlink():
        raise DataError(str(link), None, "is no link to the newest result of the source", "move it out of the way")


def _absolute(path: str) -> str:
    """Returns a path that does not depend on the folder of the command; an address stays as it is."""
    return str(pathlib.Path(path).absolute()) if pathlib.Path(path).exists() else path


def _operations(source: CuratedSource) -> list[Any]:
    return [build(step, f"sources[{source.name}].recipe[{n}]") for n, step in enumerate(source.recipe)]


def _tokenizer(config: CurationConfig) -> str | None:
    if config.tokenizer is None:
        return None
    file = pathlib.Path(config.tokenizer)
    if not file.is_file():
        raise DataError("curation.tokenizer", config.tokenizer, "does not exist", "name a tokenizer.json")
    return str(file.absolute())


def _write_plan(paths: Paths, plan: Plan) -> None:
    paths.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(paths.plan, "".join(line + "\n" for line in plan.to_lines()))


@contextlib.contextmanager
def _lock(config: CurationConfig, folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes off a source.

    Raises:
      DataError: another one is at work on it, or its folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        problem = f"cannot hold {folder} ({error.strerror})"
        remedy = "name a folder that can be made and written, and shorter names if they are too long"
        raise DataError("curation.root", config.root, problem, remedy) from error
    with lock:
        try:
            # A lock of this process alone: one of the file would live on in children that outlive a kill.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(str(folder), None, "is being curated by another process", "wait for it to end") from error
        yield
