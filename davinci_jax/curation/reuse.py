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
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from davinci_jax.curation.inputs import Plan
from davinci_jax.curation.tasks import (
    CorpusPaths,
    Notes,
    Paths,
    StageJob,
    all_counts,
    digests_before,
    file_digest,
    is_collected,
    is_done,
    is_whole,
    read_counts,
    remove_rejects,
)
from davinci_jax.curation.tokens import counted_by
from davinci_jax.files import write_atomically

_MADE_BY = "made_by"  # the file of a folder that holds `Stage.made_by` or `collected_by`


class _Found(NamedTuple):
    """A task of an earlier result.

    Attributes:
      made_of: the digest of what it was made of.
      output: the digest of its documents, `None` for what was collected.
      size: bytes to be checked before it is linked.
      link: links its files to those of another task; `False` if they are damaged.
    """

    made_of: str
    output: str | None
    size: int
    link: Callable[[int], bool]


def take_over(job: StageJob, plan: Plan, tell: Callable[[int], None] = lambda _: None) -> int:
    """Links what earlier results of a source hold for the same steps and documents; returns for how many tasks.

    The stage before is as it will be read, or in the hands of a cluster: then there is nothing to be found for it.

    Args:
      job: the stage.
      plan: of the source.
      tell: called with the bytes that have to be read first, to see whether they are as they were.
    """
    folder, made_by = _own(job)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _MADE_BY, made_by)
    left: dict[str, list[int]] = {}
    for task, digest in enumerate(digests_before(job, plan)):
        done = is_collected(job.corpus, task, digest) if job.corpus else is_done(job.paths, task, digest)
        if digest is not None and not done:
            left.setdefault(digest, []).append(task)
    wanted = sum(map(len, left.values()))
    earlier = [found for found in _earlier(job) if found.made_of in left] if left else []
    tell(sum({found.made_of: found.size for found in earlier}.values()))
    for found in earlier:
        left[found.made_of] = [task for task in left[found.made_of] if not found.link(task)]
    return wanted - sum(map(len, left.values()))


def foresee(jobs: Sequence[StageJob], plan: Plan) -> list[int | None]:
    """Returns for each stage how many of its tasks are there, in its folder or in an earlier result.

    Of an operation on the whole source that is what it has collected. Behind it nothing can be known before: `None`.
    """
    there, digests = [], digests_before(jobs[0], plan)
    for job in jobs:
        known = {found.made_of: found.output for found in _earlier(job)}
        own = all_counts(job.paths, len(digests))
        if job.corpus:
            few = sum(is_collected(job.corpus, task, digest) or digest in known for task, digest in enumerate(digests))
            whole = is_whole(job, plan)
            new = [counts["output_digest"] if whole else None for counts in own]
        else:
            done = [counts is not None and counts["input_digest"] == digests[task] for task, counts in enumerate(own)]
            few = sum(done[task] or digest in known for task, digest in enumerate(digests))
            new = [own[n]["output_digest"] if done[n] else known.get(digests[n]) for n in range(len(own))]
        there.append(few if any(digests) else None)
        digests = new
    return there


def _own(job: StageJob) -> tuple[pathlib.Path, str]:
    """Returns the folder that tasks are linked to, and what has made them."""
    return (job.corpus.folder, job.stage.collected_by) if job.corpus else (job.paths.folder, job.stage.made_by)


def _earlier(job: StageJob) -> Iterator[_Found]:
    """Yields the tasks of other folders that the same steps have made."""
    own, made_by = _own(job)
    for mark in sorted(job.folder.glob(f"*/{_MADE_BY}")):
        folder = mark.parent
        if folder != own and not folder.is_symlink() and _read(mark) == made_by:
            yield from _collected(job, CorpusPaths(folder)) if job.corpus else _tasks(job, Paths(folder))


def _read(mark: pathlib.Path) -> str | None:
    try:
        return mark.read_text(encoding="utf-8")
    except (OSError, ValueError):  # damaged: nothing is known of the folder
        return None


def _tasks(job: StageJob, paths: Paths) -> Iterator[_Found]:
    for file in (paths.folder / "counts").glob("*.json"):
        counts = read_counts(paths, int(file.stem)) if file.stem.isdecimal() else None
        if counts and counts["tokens_by"] == counted_by(job.tokenizer):
            link = functools.partial(_link_task, paths, int(file.stem), job.paths)
            yield _Found(counts["input_digest"], counts["output_digest"], counts["file_bytes"], link)


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
            link = functools.partial(_link_collected, corpus, folder.name, job.corpus)
            yield _Found(known.input_digest, None, sum(size for size, _ in known.files.values()), link)


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
