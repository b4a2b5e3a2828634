"""Held-out loss and bits per byte per domain, on rows that no stage can serve."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from davinci_jax import sharding
from davinci_jax.data.batch import NO_TARGET, Batch
from davinci_jax.data.tokenizer import Tokenizer
from davinci_jax.experiment import Experiment
from davinci_jax.models.decoder import Decoder, token_losses

_AHEAD = 2
_log = logging.getLogger(__name__)


class Rows(Protocol):
    """The held-out rows of one source."""

    @property
    def num_rows(self) -> int:
        """Number of rows of L tokens; 0 where nothing is held out."""

    def read(self, rows: np.ndarray) -> Batch:
        """Returns the rows int64 [n] as a batch of [n, L]."""


@dataclasses.dataclass
class Sums:
    """Sums over the targets of a domain: nats in float64, targets, and bytes of text that the targets stand for."""

    nll: float = 0.0
    targets: int = 0
    bytes: int = 0

    def add(self, nll: float, targets: int, num_bytes: int) -> None:
        """Adds the sums of a row or of another domain."""
        self.nll += nll
        self.targets += targets
        self.bytes += num_bytes


class Heldout:
    """Measures a decoder on the same held-out rows every time.

    Each domain gives `evaluation.tokens` tokens, rounded up to rows, or all it has if that is less; they are spread
    over its sources in proportion to what these hold out, and evenly over each source. Training is not touched:
    nothing is donated, no random number is drawn and no reader's state moves.

    Args:
      experiment: the run; its batch is `run.micro_batch` rows a device.
      rows: held-out rows of each source, in config order; `None` for a source that no stage draws from.
      tokenizer: tells how many bytes of text each token stands for.
      mesh: the mesh that the decoder is divided over; it must be the current one in `evaluate`.

    Attributes:
      notes: a line for each domain that cannot be measured; also logged as warnings.
    """

    def __init__(self, experiment: Experiment, rows: Sequence[Rows | None], tokenizer: Tokenizer, mesh: Mesh):
        data = experiment.data
        self._rows, self._mesh, self._length = rows, mesh, data.sequence_length
        self._token_bytes = tokenizer.token_bytes()
        self._batch = experiment.run.micro_batch * mesh.shape["replica"] * mesh.shape["fsdp"]
        self._domains = [source.domain for source in data.sources]
        self._chosen: list[tuple[int, int]] = []
        self.notes: list[str] = []
        for domain in data.domains:
            sources = [n for n, name in enumerate(self._domains) if name == domain and rows[n] is not None]
            chosen = choose_rows(
                [rows[n].num_rows if rows[n] else 0 for n in sources],
                math.ceil(experiment.evaluation.tokens / self._length),
            )
            self._chosen += [(n, int(row)) for n, some in zip(sources, chosen, strict=True) for row in some]
            if sources and not any(len(some) for some in chosen):
                self._note(
                    f"domain {domain!r} has no held-out rows and is not evaluated; raise data.heldout and shard again"
                )
        self._losses = jax.jit(row_losses)

    def evaluate(self, decoder: Decoder) -> dict[str, float] | None:
        """Returns the figures of a decoder, or `None` if nothing is held out.

        The loss is the mean over targets, in nats per token. Bits per byte are the sum over the same targets divided
        by log(2) and by the bytes of text they stand for (UTF-8, as the tokenizer normalises it), so they compare
        models of different tokenizers; the end-of-document token has a loss and no bytes.

        Returns:
          "loss/<domain>" and "bits_per_byte/<domain>"; "loss" and "bits_per_byte" over all targets and all bytes;
          "heldout_tokens" and "heldout_bytes", which they are means over; "seconds". A domain without targets has
          no figures, one whose targets stand for no text has no bits per byte.
        """
        started = time.perf_counter()
        sums = {domain: Sums() for domain in dict.fromkeys(self._domains)}
        for sources, batch, losses in self._measured(decoder):
            labels = batch.labels
            targets = (labels != NO_TARGET).sum(axis=1)
            num_bytes = np.where(labels != NO_TARGET, self._token_bytes[labels], 0).sum(axis=1, dtype=np.int64)
            for n, source in enumerate(sources):
                sums[self._domains[source]].add(float(losses[n]), int(targets[n]), int(num_bytes[n]))
        total = Sums()
        for domain in sums.values():
            total.add(domain.nll, domain.targets, domain.bytes)
        if not total.targets:
            return None
        result = {}
        for suffix, part in (*((f"/{domain}", part) for domain, part in sums.items()), ("", total)):
            if part.targets:
                result[f"loss{suffix}"] = part.nll / part.targets
            if part.bytes:
                result[f"bits_per_byte{suffix}"] = part.nll / math.log(2) / part.bytes
        counts = {"heldout_tokens": total.targets, "heldout_bytes": total.bytes}
        return {**result, **counts, "seconds": time.perf_counter() - started}

    def _measured(self, decoder: Decoder) -> Iterator[tuple[list[int], Batch, np.ndarray]]:
        """Yields (sources, batch, float32 [batch] summed losses), the devices kept a few batches ahead of the host."""
        pending: collections.deque = collections.deque()
        for start in range(0, len(self._chosen), self._batch):
            chosen = self._chosen[start : start + self._batch]
            batch = self._read(chosen)
            pending.append(([source for source, _ in chosen], batch, self._losses(decoder, *map(self._put, batch[:4]))))
            if len(pending) > _AHEAD:
                sources, batch, losses = pending.popleft()
                yield sources, batch, np.asarray(losses)
        for sources, batch, losses in pending:
            yield sources, batch, np.asarray(losses)

    def _read(self, chosen: list[tuple[int, int]]) -> Batch:
        """Returns the rows as a batch, filled up with rows that have no target."""
        batch = Batch(
            *(np.zeros((self._batch, self._length), np.int32) for _ in range(4)), np.zeros(self._batch, np.int32)
        )
        batch.labels[:] = NO_TARGET
        for source in dict.fromkeys(source for source, _ in chosen):
            where = [n for n, (other, _) in enumerate(chosen) if other == source]
            part = self._rows[source].read(np.array([chosen[n][1] for n in where], np.int64))
            for into, values in zip(batch[:4], part[:4], strict=True):
                into[where] = values
        return batch

    def _put(self, x: np.ndarray) -> jax.Array:
        """Returns a batch that every host holds whole as an array divided over the mesh."""
        divided = NamedSharding(self._mesh, sharding.spec("batch", "sequence"))
        return jax.make_array_from_callback(x.shape, divided, lambda index: x[index])

    def _note(self, text: str) -> None:
        self.notes.append(text)
        _log.warning(text)


def row_losses(
    decoder: Decoder, tokens: jax.Array, labels: jax.Array, segment_ids: jax.Array, positions: jax.Array
) -> jax.Array:
    """Returns float32 [B], the loss of each row of [B, L] summed over its targets, whole on every device."""
    nll, _ = token_losses(decoder, tokens, labels, segment_ids, positions)
    return jax.sharding.reshard(nll.sum(axis=1), PartitionSpec(None))


def choose_rows(sizes: Sequence[int], wanted: int) -> list[np.ndarray]:
    """Returns which rows of each source stand for their domain.

    Args:
      sizes: rows that each source holds out.
      wanted: rows in all; more than there are takes them all.

    Returns:
      Ascending int64 row numbers for each source, evenly spaced: its part of the domain by largest remainder.
    """
    total = sum(sizes)
    wanted = min(wanted, total)
    quotas = [wanted * size // max(total, 1) for size in sizes]
    remainders = [wanted * size % max(total, 1) for size in sizes]
    for n in sorted(range(len(sizes)), key=lambda n: -remainders[n])[: wanted - sum(quotas)]:
        quotas[n] += 1
    return [np.arange(quota, dtype=np.int64) * size // max(quota, 1) for quota, size in zip(quotas, sizes, strict=True)]
