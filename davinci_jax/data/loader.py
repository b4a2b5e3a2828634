"""The loader: for every step, this host's rows of the global batch.

An element of the Grain pipeline is a whole step, addressed by its number alone. There is no state to save and none
to move: the same steps come out for any number of hosts, threads and worker processes, from any first step.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain.python as grain
import numpy as np
from absl import flags

from davinci_jax.data.batch import Batch
from davinci_jax.data.mixture import MixtureIndex
from davinci_jax.data.rows import Rows
from davinci_jax.errors import ConfigError, UserError


class Piece(Protocol):
    """Consecutive steps with one batch size."""

    first_step: int
    num_steps: int
    first_sequence: int
    batch_size: int


class Timeline(Protocol):
    """What the loader must know of a timeline; `curriculum.timeline.Timeline` has it."""

    num_steps: int
    pieces: Sequence[Piece]


class StepSource:
    """Random access to (step, Batch) from a first step on; what Grain reads. Safe to pickle and to share.

    Args:
      rows: rows of each source in config order; `None` for a source that is never drawn.
      index: sequence -> (source, epoch, row).
      pieces: int64 [p, 3], first step, first sequence and batch size of each piece of the timeline.
      micro_rows: rows of a micro-batch over all hosts.
      local_rows: int64 [r], which of them are this host's.
      first_step, num_steps: the steps [first_step, num_steps) are served.
    """

    def __init__(
        self,
        rows: Sequence[Rows | None],
        index: MixtureIndex,
        pieces: np.ndarray,
        micro_rows: int,
        local_rows: np.ndarray,
        first_step: int,
        num_steps: int,
    ):
        self.rows, self.index, self.pieces = tuple(rows), index, pieces
        self.micro_rows, self.local_rows = micro_rows, np.asarray(local_rows, np.int64)
        self.first_step, self.num_steps = first_step, num_steps

    def __len__(self) -> int:
        return self.num_steps - self.first_step

    def __getitem__(self, number: int) -> tuple[int, Batch | UserError]:
        step = self.first_step + number
        try:
            return step, self.read(step)
        except UserError as error:
            return step, error  # on its way out of a worker; raised by the iterator

    def sequences(self, step: int) -> np.ndarray:
        """Returns the global sequence indices of this host's rows of a step, int64 [micro, local_rows]."""
        first_step, first, size = self.pieces[np.searchsorted(self.pieces[:, 0], step, side="right") - 1]
        micro = first + (step - first_step) * size + np.arange(size // self.micro_rows) * self.micro_rows
        return micro[:, None] + self.local_rows

    def read(self, step: int) -> Batch:
        """Returns this host's rows of a step, leading dims [micro, local_rows]."""
        return read_sequences(self.rows, self.index, self.sequences(step))


def read_sequences(rows: Sequence[Rows | None], index: MixtureIndex, sequences: np.ndarray) -> Batch:
    """Returns the rows of global sequence indices, int64 [...], with their shape as leading dims."""
    found = index.lookup(sequences.reshape(-1))
    length = next(reader.length for reader in rows if reader is not None)
    batch = Batch.empty((sequences.size,), length)
    for source in np.unique(found.source).tolist():
        where = np.flatnonzero(found.source == source)
        for whole, part in zip(batch, rows[source].read(found.row[where]), strict=True):
            whole[where] = part
    return Batch(*(array.reshape(*sequences.shape, *array.shape[1:]) for array in batch))


class TrainLoader:
    """Serves the steps of a run to one host.

    Args:
      rows: rows of each source in config order; `None` for a source that is never drawn.
      index: sequence -> (source, epoch, row).
      timeline: steps, their batch sizes and first sequences.
      micro_rows: rows of a micro-batch over all hosts; divides every batch.
      local_rows: int [r], which rows of a micro-batch this host holds.
      workers: processes that read; 0 reads in threads of this one.
      prefetch: steps prepared ahead.

    Raises:
      ConfigError: a batch of the timeline is no multiple of `micro_rows`.
    """

    def __init__(
        self,
        rows: Sequence[Rows | None],
        index: MixtureIndex,
        timeline: Timeline,
        micro_rows: int,
        local_rows: np.ndarray,
        workers: int = 0,
        prefetch: int = 2,
    ):
        for piece in timeline.pieces:
            if piece.batch_size % micro_rows:
                raise ConfigError(
                    "curriculum.batch.size",
                    piece.batch_size,
                    f"is no multiple of the {micro_rows} rows of a micro-batch",
                    f"use a multiple of {micro_rows}",
                )
        pieces = [(piece.first_step, piece.first_sequence, piece.batch_size) for piece in timeline.pieces]
        self._source = (tuple(rows), index, np.array(pieces, np.int64), micro_rows, np.asarray(local_rows, np.int64))
        self.num_steps, self.workers, self.prefetch = timeline.num_steps, workers, prefetch
        self._open: list[Any] = []

    def source(self, first_step: int = 0) -> StepSource:
        """Returns random access to the steps from `first_step` on."""
        return StepSource(*self._source, first_step, self.num_steps)

    def steps(self, first_step: int = 0) -> Iterator[tuple[int, Batch]]:
        """Returns an iterator of (step, Batch) from `first_step` to the end of the run.

        Arrays are this host's: leading dims [micro, local_rows]. After an error the iterator raises it again.

        Raises:
          UserError: while iterating, a damaged shard.
        """
        dataset = grain.MapDataset.source(self.source(first_step))
        threads = self.prefetch if not self.workers else 1
        read = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if self.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which nobody parses here
            per_worker = -(-self.prefetch // self.workers)
            options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=per_worker)
            read = read.mp_prefetch(options, worker_init_fn=_init_worker)
        iterator = iter(read)
        if first_step < self.num_steps:
            iterator.start_prefetch()
        self._open.append(iterator)
        return _Steps(iterator, first_step, self.num_steps, self.workers)

    def close(self) -> None:
        """Ends the threads and processes that read; iterators are of no use afterwards."""
        while self._open:
            self._open.pop().close()


class _Steps:
    """Iterates over steps, and never goes on after an error: Grain would, with a shifted stream."""

    def __init__(
        self, iterator: Iterator[tuple[int, Batch | UserError]], first_step: int, num_steps: int, workers: int
    ):
        self._iterator, self._next, self._num_steps, self._workers = iterator, first_step, num_steps, workers
        self._starting = workers > 0
        self._error: BaseException | None = None

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._error is None:
            try:
                return self._read()
            except BaseException as error:
                self._error = error
        raise self._error

    def _read(self) -> tuple[int, Batch]:
        # Grain starts its workers when it is asked for the first step. It is asked for the end, too: until it has told
        # of it, it holds on to shared memory.
        with _signals_held_back() if self._starting else contextlib.nullcontext():
            step, batch = next(self._iterator, (self._num_steps, None))
        self._starting = False
        if step != self._next:
            raise RuntimeError(f"the loader gave step {step} where step {self._next} belongs")
        if batch is None:
            raise StopIteration
        if isinstance(batch, UserError):
            raise batch
        self._next += 1
        # A worker's arrays lie in shared memory, which is given back as soon as they are copied.
        return step, Batch(*map(np.array, batch)) if self._workers else batch


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Holds back SIGTERM and SIGINT; what is started meanwhile never gets them.

    A signal to the whole process group, as schedulers send it, must not take the data from a run that is about to
    save; and a worker that only ignored it would still be open to it in the seconds that it takes to start.
    """
    # The tracker of shared memory starts with the first worker, and its start lets signals through again.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(number: int, workers: int) -> None:
    """Makes a worker end with its parent, however that ended; Grain's would go on for ever."""
    del number, workers
    parent = multiprocessing.parent_process().sentinel

    def watch() -> None:
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
