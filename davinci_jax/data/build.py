"""From documents to a shard set: read, reject, tokenise, split, write."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from davinci_jax.curation.documents import document_files, documents_path
from davinci_jax.data import manifest as manifests
from davinci_jax.data.best_fit import make_plan, plan_folder
from davinci_jax.data.documents import Document, DocumentReader, Reject, SeenIds, is_held_out
from davinci_jax.data.manifest import FileEntry, Manifest, TokenizerEntry, shard_folder
from davinci_jax.data.shard_writer import BLOCK_TOKENS, SHARD_BYTES, SplitWriter
from davinci_jax.data.shards import ShardSet
from davinci_jax.data.tokenizer import Tokenizer
from davinci_jax.errors import DataError
from davinci_jax.experiment import DataConfig, Source

REJECTS = "rejects.jsonl"
_BATCH_BYTES = 2**20
_BATCH_DOCUMENTS = 4096


class BuildProgress(NamedTuple):
    """How far a build has come: bytes of the documents files, documents and tokens so far."""

    bytes_read: int
    bytes_total: int
    documents: int
    tokens: int


class _Encoded(NamedTuple):
    """A document with its tokens [n], end of text included, and masked spans int64 [m, 2] in tokens."""

    document: Document
    tokens: np.ndarray
    spans: np.ndarray


def build_shards(
    data: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    progress: Callable[[BuildProgress], None] | None = None,
    workers: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Makes the shard set of a source from its documents; returns its manifest.

    The same documents, tokenizer and settings give the same bytes, whatever the number of workers. The set appears
    under its name when it is whole. One that is there and was made from the same inputs is left as it is. Lines that
    are no document, and documents whose id came before, are left out, counted in the manifest and listed in
    `rejects.jsonl`.

    Args:
      data: names the root, the held-out share and, for "best_fit", the row length that rows are planned for.
      source: the source.
      tokenizer: turns text into tokens.
      progress: is called after every batch of documents.
      workers: threads that tokenise; default: one for each core.
      block_tokens: tokens of a block.
      shard_bytes: bound on the tokens of a shard, in bytes before compression.

    Raises:
      DataError: no documents, none that can be trained on, a damaged documents file, or a folder that holds
        something else or a shard set of other inputs.
    """
    documents = documents_path(data, source)
    files = document_files(data, source)
    base = documents if documents.is_dir() else documents.parent
    inputs = tuple(dataclasses.replace(manifests.file_entry(f), file=f.relative_to(base).as_posix()) for f in files)
    wanted = _settings(data, source, tokenizer, inputs, block_tokens)
    folder = shard_folder(data, source)
    found = _existing(folder, wanted)
    if found is None:
        with _new_folder(folder) as new:
            rejects = _Rejects(new / REJECTS)
            reader = DocumentReader(files, base, source.level, rejects.add)
            build = _Build(reader, rejects, tokenizer, data.heldout, sum(entry.bytes for entry in inputs), progress)
            dtype = wanted["dtype"]
            writers = {split: SplitWriter(new, split, dtype, block_tokens, shard_bytes) for split in manifests.SPLITS}
            build.run(writers, workers or os.cpu_count() or 1)
            rejects.close()
            splits = {split: writer.close() for split, writer in writers.items()}
            if not splits["train"].tokens:
                raise _nothing_left(source, documents, rejects.counts, splits["heldout"].documents)
            found = Manifest(**wanted, lineage=tuple(build.lineage or ()), rejected=rejects.counts, splits=splits)
            found.write(new)
    if data.packing == "best_fit":
        shards = ShardSet(folder, "train")
        if not plan_folder(shards, data.sequence_length).exists():
            make_plan(shards, data.sequence_length)
    return found


def _settings(
    data: DataConfig, source: Source, tokenizer: Tokenizer, inputs: tuple[FileEntry, ...], block_tokens: int
) -> dict[str, Any]:
    """Returns the fields of the manifest that are known before the documents are read."""
    return {
        "source": source.name,
        "domain": source.domain,
        "level": source.level,
        "tokenizer": TokenizerEntry(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id),
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "block_tokens": block_tokens,
        "heldout": data.heldout,
        "inputs": inputs,
    }


def _existing(folder: pathlib.Path, wanted: dict[str, Any]) -> Manifest | None:
    """Returns the manifest of a whole set made from the wanted inputs, `None` if there is no set."""
    if not folder.exists():
        return None
    if not (folder / manifests.NAME).exists():
        if folder.is_dir() and not any(folder.iterdir()):
            return None
        raise DataError(str(folder), None, "is in the way: it holds no shard set", "move it, or set the source's path")
    for split in manifests.SPLITS:
        found = ShardSet(folder, split).manifest
    names = {"inputs": "documents", "heldout": "data.heldout", "block_tokens": "block length"}
    differing = [names.get(name, name) for name, value in wanted.items() if getattr(found, name) != value]
    if differing:
        raise DataError(
            str(folder),
            None,
            f"holds a shard set that differs in {', '.join(differing)}",
            "remove the folder to have it made again; runs that read it need it as it is",
        )
    return found


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder that is renamed to `folder` at the end; what a killed build left is removed first."""
    new = folder.with_name(f".{folder.name}.building")
    new.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that it stays in place until the end.
    lock_file = folder.with_name(f".{folder.name}.lock")
    with lock_file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # its owner removed it between our opening and our locking
                raise BlockingIOError
        except OSError as error:
            raise DataError(str(folder), None, "is being made by another process", "wait for it to end") from error
        try:
            if (folder / manifests.NAME).exists():
                raise DataError(str(folder), None, "was just made by another process", "start the same command again")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            new.rename(folder)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        finally:
            lock_file.unlink()


def _nothing_left(source: Source, documents: pathlib.Path, rejected: dict[str, int], heldout: int) -> DataError:
    counts = [f"{count} {reason}" for reason, count in rejected.items()]
    counts += [f"{heldout} held out"] if heldout else []
    return DataError(
        f"data.sources[{source.name}].documents",
        str(documents),
        f"has no document to train on ({', '.join(counts) or 'the files are empty'})",
        'write one JSON object a line: {"id": ..., "text": ...} (docs/data.md)',
    )


class _Rejects:
    """Lists and counts what is left out."""

    def __init__(self, file: pathlib.Path):
        self._out = file.open("w", encoding="utf-8")
        self.counts: dict[str, int] = {}

    def add(self, reject: Reject) -> None:
        self.counts[reject.reason] = self.counts.get(reject.reason, 0) + 1
        self._out.write(json.dumps(reject._asdict()) + "\n")

    def close(self) -> None:
        self._out.close()


class _Build:
    """One pass over the documents."""

    def __init__(
        self,
        reader: DocumentReader,
        rejects: _Rejects,
        tokenizer: Tokenizer,
        heldout: float,
        bytes_total: int,
        progress: Callable[[BuildProgress], None] | None,
    ):
        self._reader, self._rejects, self._tokenizer, self._heldout = reader, rejects, tokenizer, heldout
        self._bytes_total, self._progress = bytes_total, progress
        # The operations that every document so far has gone through.
        self.lineage: list[Any] | None = None

    def run(self, writers: dict[str, SplitWriter], workers: int) -> None:
        documents = tokens = 0
        with ThreadPoolExecutor(workers) as pool:
            for batch in _map_in_order(pool, self._encode, self._batches(), ahead=workers + 1):
                for encoded in batch:
                    self._write(encoded, writers)
                documents += len(batch)
                tokens += sum(len(encoded.tokens) for encoded in batch)
                if self._progress is not None:
                    self._progress(BuildProgress(self._reader.bytes_read, self._bytes_total, documents, tokens))

    def _batches(self) -> Iterator[list[Document]]:
        """Yields documents in batches of about 1 MB, repeated ids left out."""
        seen = SeenIds()
        batch, size = [], 0
        for document in itertools.chain(self._reader, [None]):
            if document is not None:
                batch.append(document)
                size += document.text_bytes
            if document is None or size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
                is_new = seen.add([item.id for item in batch])
                for item, new in zip(batch, is_new, strict=True):
                    if not new:
                        self._rejects.add(Reject(item.file, item.line, item.id, "repeated id"))
                yield [item for item, new in zip(batch, is_new, strict=True) if new]
                batch, size = [], 0

    def _encode(self, batch: list[Document]) -> list[_Encoded]:
        plain = [document for document in batch if not len(document.questions)]
        ids = iter(self._tokenizer.encode_batch([document.text for document in plain]))
        encoded = []
        for document in batch:
            if len(document.questions):
                tokens, offsets = self._tokenizer.encode_with_offsets(document.text)
                spans = token_spans(offsets, document.questions)
            else:
                tokens, spans = next(ids), np.zeros((0, 2), np.int64)
            encoded.append(_Encoded(document, np.append(tokens, self._tokenizer.eos_id), spans))
        return encoded

    def _write(self, encoded: _Encoded, writers: dict[str, SplitWriter]) -> None:
        document = encoded.document
        split = "heldout" if is_held_out(document.group, self._heldout) else "train"
        record = {"id": document.id, "level": document.level, "lineage": document.lineage}
        if document.licence is not None:
            record["licence"] = document.licence
        writers[split].add(encoded.tokens, encoded.spans, record)
        if self.lineage is None:
            self.lineage = document.lineage
        elif self.lineage != document.lineage:
            self.lineage = [operation for operation in self.lineage if operation in document.lineage]


def token_spans(offsets: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """Returns the tokens that belong to questions, as ascending spans int64 [m, 2].

    A token belongs to a question if its first character does, so one that joins the end of a question to the
    beginning of the answer is no target.

    Args:
      offsets: int [n, 2], characters [start, end) of each token.
      questions: int [q, 2], characters [start, end), ascending and apart.
    """
    at = np.searchsorted(questions[:, 0], offsets[:, 0], side="right") - 1
    inside = (at >= 0) & (offsets[:, 0] < questions[at, 1])
    edges = np.flatnonzero(np.diff(inside.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).astype(np.int64)


def _map_in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Yields function(item) in the order of the items, computed in threads at most `ahead` items early."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
