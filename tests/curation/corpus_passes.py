"""The three passes of a corpus operation as the engine makes them, without its files and tasks."""

from davinci_jax.curation.corpus import LastPass, remembered
from davinci_jax.curation.pipeline import EarlierFailure


def collect_and_reduce(operation, tasks, folder):
    """The folder that `reduce` filled, and for each task the documents with which the first pass failed."""
    collected, failed = [], []
    for number, documents in enumerate(tasks):
        collected.append(folder / f"collected{number}")
        collected[-1].mkdir(parents=True)
        failed.append({})
        operation.collect(remembered(operation, iter(documents), failed[-1]), collected[-1])
    reduced = folder / "reduced"
    reduced.mkdir()
    operation.reduce(collected, reduced)
    return reduced, failed


def last_pass(operation, tasks, reduced, failed):
    """Kept documents of each task, and (id, reason) of the others."""
    rejects, kept = [], []
    for number, documents in enumerate(tasks):
        last = LastPass(operation, operation.open(reduced, number), failed[number])
        kept.append([])
        for document in documents:  # one at a time, since what it raises is of this one
            try:
                kept[-1] += last.apply(iter([document]), lambda document, why: rejects.append((document.id, why)))
            except EarlierFailure as error:
                rejects.append((document.id, str(error)))
    return kept, rejects


def run(operation, tasks, folder):
    return last_pass(operation, tasks, *collect_and_reduce(operation, tasks, folder))
