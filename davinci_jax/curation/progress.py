"""What `davinci curate` shows: the plan of a source, and how far its tasks are."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from davinci_jax.curation.inputs import Plan

if TYPE_CHECKING:
    from davinci_jax.curation.corpus import CorpusOperation
    from davinci_jax.curation.executors import Work
    from davinci_jax.curation.pipeline import Operation
    from davinci_jax.curation.run import Prepared
    from davinci_jax.experiment.curation import CuratedSource

_SECONDS = 0.5


def show_prepared(prepared: Prepared, whole: Sequence[bool], console: Console) -> None:
    """Prints the files of a source and its stages: what is there, what will be computed."""
    source, plan = prepared.source, prepared.plan
    tasks = "1 task" if len(plan.tasks) == 1 else f"{len(plan.tasks):,} tasks"
    files = "1 file" if plan.files == 1 else f"{plan.files:,} files"
    console.print(
        f"[bold]{source.name}[/]  {source.domain}, {source.level} as declared; "
        f"{files}, {plan.bytes / 1e6:,.1f} MB in {tasks}; recipe {prepared.result.name}",
        highlight=False,
        soft_wrap=True,
    )
    for n, (stage, done) in enumerate(zip(prepared.stages, whole, strict=True)):
        names = [f"{operation.level} {operation.name}" for operation in stage.operations]
        names = (["L0 acquire"] if n == 0 else []) + names
        state = "[green]there[/]" if done else "[yellow]to do[/]"
        console.print(f"  {stage.hash}  {state}  {' · '.join(names)}", highlight=False, soft_wrap=True)


def show_waiting(
    source: CuratedSource, operations: Sequence[Operation | CorpusOperation], waits: Sequence[str], console: Console
) -> None:
    """Prints the steps of a source whose input other sources have yet to make."""
    names = " · ".join(f"{operation.level} {operation.name}" for operation in operations)
    console.print(
        f"[bold]{source.name}[/]  {source.domain}, {source.level} as declared; goes on from {', '.join(waits)}, "
        f"not there yet\n  {names}",
        highlight=False,
        soft_wrap=True,
    )


class Progress:
    """A bar that follows the files of a work until the block ends; nothing where the console is no terminal.

    Args:
      console: where it is shown.
      source: name of the source.
      work: what runs.
      plan: says how many bytes its tasks read.
    """

    def __init__(self, console: Console, source: str, work: Work, plan: Plan):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._work, self._size = work, max(1, plan.bytes // len(plan.tasks))
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(f"{source}: {_short(work.title)}", total=work.tasks, note="")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        if not self._bar.disable:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if not self._bar.disable:
            self._thread.join()
        self._bar.stop()

    def _follow(self) -> None:
        while not self._stop.wait(_SECONDS):
            marks = self._work.logs / "completions"
            done = sum(1 for _ in marks.iterdir()) if marks.is_dir() else 0
            parts, documents = self._running()
            note = f"{done:,} of {self._work.tasks:,} tasks" + (f", {documents:,} documents" if documents else "")
            self._bar.update(self._task, completed=done + parts, note=note)

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
