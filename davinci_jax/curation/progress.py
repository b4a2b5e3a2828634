"""What `davinci curate` shows: the plan of a source, and how far its tasks are."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from davinci_jax.curation.figures import show_bytes, show_count
from davinci_jax.curation.inputs import Plan
from davinci_jax.curation.tasks import read_counts

if TYPE_CHECKING:
    from davinci_jax.curation.corpus import CorpusOperation
    from davinci_jax.curation.executors import Work
    from davinci_jax.curation.pipeline import Operation
    from davinci_jax.curation.run import Prepared
    from davinci_jax.experiment.curation import CuratedSource

_THERE = ("there", "collected")  # tasks of a stage, and of one that begins with an operation on the whole source
_SECONDS = 0.5
_LINE_SECONDS = 60.0  # where the console is no terminal


def show_prepared(
    prepared: Prepared, whole: Sequence[bool], console: Console, there: Sequence[int | None] = ()
) -> None:
    """Prints the files of a source and its stages: what is there, what will be computed.

    Args:
      prepared: the source.
      whole: of each stage whether it is there.
      console: where it is shown.
      there: see `reuse.foresee`.
    """
    source, plan = prepared.source, prepared.plan
    tasks, files = show_count(len(plan.tasks), "task"), show_count(plan.files, "file")
    head = f"{files}, {show_bytes(plan.bytes)} in {tasks}; recipe {prepared.result.name}"
    console.print(_declared(source, head), soft_wrap=True)
    for n, (stage, done) in enumerate(zip(prepared.stages, whole, strict=True)):
        names = [f"{operation.level} {operation.name}" for operation in stage.operations]
        names = (["L0 acquire"] if n == 0 else []) + names
        state = ("there", "green") if done else ("to do", "yellow")
        few = "" if done or not there or there[n] is None else f", {there[n]:,} of {tasks} {_THERE[bool(stage.corpus)]}"
        console.print(Text.assemble(f"  {stage.hash}  ", state, f"{few}  {' · '.join(names)}"), soft_wrap=True)


def show_waiting(
    source: CuratedSource,
    operations: Sequence[Operation | CorpusOperation],
    waits: Sequence[str],
    why: str,
    console: Console,
) -> None:
    """Prints the steps of a source whose input other sources have yet to make, or to make anew."""
    names = " · ".join(f"{operation.level} {operation.name}" for operation in operations)
    console.print(_declared(source, f"goes on from {', '.join(waits)}, {why}\n  {names}"), soft_wrap=True)


def _declared(source: CuratedSource, more: str) -> Text:
    """Returns what a source is called and declared as, and more; a name may look like markup."""
    return Text.assemble((source.name, "bold"), f"  {source.domain}, {source.level} as declared; {more}")


class Progress:
    """A bar that follows the files of a work until the block ends; where the console is no terminal, a line a minute.

    Args:
      console: where it is shown.
      source: name of the source.
      work: what runs.
      plan: says how many bytes its tasks read.
    """

    def __init__(self, console: Console, source: str, work: Work, plan: Plan):
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._work, self._size = work, max(1, plan.bytes // len(plan.tasks))
        self._console, self._title = console, f"{source}: {_short(work.title)}"
        self._done: dict[int, int] = {}  # documents of the tasks that are done
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(self._title, total=work.tasks, note="")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.stop()

    def _follow(self) -> None:
        started = time.monotonic()
        while not self._stop.wait(_LINE_SECONDS if self._bar.disable else _SECONDS):
            marks = self._work.logs / "completions"
            done = [int(mark.name) for mark in marks.iterdir()] if marks.is_dir() else []
            parts, documents = self._running()
            documents += sum(map(self._documents, done))
            note = f"{len(done):,} of {show_count(self._work.tasks, 'task')}" + (
                f", {show_count(documents, 'document')}" if documents else ""
            )
            if self._bar.disable:
                line = f"{self._title}  {note}, {(time.monotonic() - started) / 60:,.0f} min"
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._bar.update(self._task, completed=len(done) + parts, note=note)

    def _documents(self, task: int) -> int:
        """Returns the documents of a task that is done."""
        if task not in self._done:
            counts = read_counts(self._work.paths, task) if self._work.paths else None
            steps = counts["steps"] if counts else ()
            self._done[task] = steps[-1]["documents_out"] if steps else 0
        return self._done[task]

    def _running(self) -> tuple[float, int]:
        """Returns the shares of the tasks at work that are done, added up, and their documents so far."""
        parts, documents = 0.0, 0
        folder = self._work.paths.folder / "progress" if self._work.paths else None
        for file in folder.iterdir() if folder and folder.is_dir() else ():
            try:
                told = json.loads(file.read_text())
            except (OSError, ValueError):  # gone since, or being written
                continue
            parts += min(0.99, told["bytes"] / self._size)
            documents += told["documents"]
        return parts, documents


def _short(title: str) -> str:
    return title if len(title) <= 48 else f"{title[:45]}..."
