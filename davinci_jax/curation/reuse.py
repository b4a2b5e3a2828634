"""Tasks of an earlier result that are those of the new one: their files are linked instead of made again.

What a task leaves follows from the files or documents that it reads and from the steps up to the end of its stage.
Where a source has got a file more, most of its tasks read what they read before. The last pass of a corpus operation
sees all documents, so of such an operation only what it has collected of each task is taken over.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from davinci_jax.curation.inputs import Plan
from davinci_jax.curation.tasks import (
    CorpusPaths,
    Notes,
    Paths,
    StageJob,
    digests_before,
    file_digest,
    is_collected,
    is_done,
    read_counts,
    remove_rejects,
)
from davinci_jax.curation.tokens import counted_by
from davinci_jax.files import write_atomically

_MADE_BY = "made_by"  # the file of a folder that holds `Stage.made_by` or `collected_by`

# The digest of what a task was made of, and what links its files to those of another task; `False` if they are damaged.
_Found = tuple[str, Callable[[int], bool]]


def take_over(job: StageJob, plan: Plan) -> int:
    """Links what earlier results of a source hold for the same steps and documents; returns for how many tasks.

    The stage before is as it will be read, or in the hands of a cluster: then there is nothing to be found for it.
    """
    corpus = job.corpus
    folder, made_by = (corpus.folder, job.stage.collected_by) if corpus else (job.paths.folder, job.stage.made_by)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _MADE_BY, made_by)
    left: dict[str, list[int]] = {}
    for task, digest in enumerate(digests_before(job, plan)):
        done = is_collected(corpus, task, digest) if corpus else is_done(job.paths, task, digest)
        if digest is not None and not done:
            left.setdefault(digest, []).append(task)
    wanted = sum(map(len, left.values()))
    for digest, link in _earlier(job, folder, made_by) if left else ():
        left[digest] = [task for task in left.get(digest, ()) if not link(task)]
    return wanted - sum(map(len, left.values()))


def _earlier(job: StageJob, own: pathlib.Path, made_by: str) -> Iterator[_Found]:
    """Yields the tasks of other folders that the same steps have made."""
    for mark in sorted(job.folder.glob(f"*/{_MADE_BY}")):
        folder = mark.parent
        if folder != own and not folder.is_symlink() and mark.read_text(encoding="utf-8") == made_by:
            yield from _collected(job, CorpusPaths(folder)) if job.corpus else _tasks(job, Paths(folder))


def _tasks(job: StageJob, paths: Paths) -> Iterator[_Found]:
    for file in (paths.folder / "counts").glob("*.json"):
        counts = read_counts(paths, int(file.stem))
        if counts and counts["tokens_by"] == counted_by(job.tokenizer):
            yield counts["input_digest"], functools.partial(_link_task, paths, int(file.stem), job.paths)


def _link_task(paths: Paths, number: int, target: Paths, task: int) -> bool:
    counts = read_counts(paths, number)
    if counts is None or file_digest(paths.documents(number)) != counts["output_digest"]:
        return False
    remove_rejects(target, task)
    for label in counts["rejects"]:
        _link(paths.rejects(label, number), target.rejects(label, task))
    _link(paths.documents(number), target.documents(task))
    _link(paths.counts(number), target.counts(task))
    return True


def _collected(job: StageJob, corpus: CorpusPaths) -> Iterator[_Found]:
    for folder in (corpus.folder / "collected").glob("[0-9]*"):
        if known := Notes.load(corpus.notes(folder.name)):
            yield known.input_digest, functools.partial(_link_collected, corpus, folder.name, job.corpus)


def _link_collected(corpus: CorpusPaths, number: str, target: CorpusPaths, task: int) -> bool:
    known, source = Notes.load(corpus.notes(number)), corpus.collected(int(number))
    if known is None or not known.fit(source):
        return False
    if any(file_digest(source / name) != digest for name, (_, digest) in known.files.items()):
        return False
    folder, notes = target.collected(task), target.notes(f"{task:06d}")
    notes.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in known.files:
        _link(source / name, folder / name)
    _link(corpus.notes(number), notes)
    return True


def _link(file: str | pathlib.Path, target: str | pathlib.Path) -> None:
    """Gives a file a second name; copies it where the file system has no such names."""
    target = pathlib.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)
