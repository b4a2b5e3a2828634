"""L0: raw documents with their provenance, and the tasks that an input is cut into."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import check_writable, is_fatal
from davinci_jax.curation.places import Item, Place
from davinci_jax.errors import DataError, UserError
from davinci_jax.experiment.curation import CuratedSource, Input

MAX_BYTES = 64 * 2**20  # of one raw document; what is longer is no document but a data set or an attack


class Acquired(NamedTuple):
    """What a reader finds in a file.

    Attributes:
      name: its name below the input: the file's path, or a longer one for a member, a line or a record.
      raw: the bytes, or else `text`.
      text: the text where the input holds text.
      metadata: what the input says of it: url, time, title, language.
      licence: where the input names one for the document.
      provenance: what else leads back to it, for the lineage: package and version, commit, line.
      refused: why it cannot be a document.
      level: Darwin level that it comes with.
    """

    name: str
    raw: bytes = b""
    text: str = ""
    metadata: Mapping[str, Any] = {}
    licence: str | None = None
    provenance: Mapping[str, Any] = {}
    refused: str = ""
    level: str = "L0"


class Reader(Protocol):
    """One kind of input: a frozen dataclass whose fields are the `options` that an `Input` may give.

    Attributes:
      name: as lineage and funnel show it.
    """

    name: str

    def parameters(self) -> dict[str, Any]:
        """Returns all that decides what it yields besides the files; JSON values."""

    def items(self, place: Place) -> list[Item]:
        """Returns the files that it reads, in a fixed order; raises `DataError` if there are none."""

    def read(self, place: Place, item: Item) -> Iterator[Acquired | Document]:
        """Yields what one file holds: raw documents, or documents that carry their own lineage already."""


class Task(NamedTuple):
    """What one task reads: (position of the input, file), in order."""

    items: tuple[tuple[int, Item], ...]


class Plan(NamedTuple):
    """How a source is cut into tasks; a function of the files alone, never of how many tasks run at a time."""

    tasks: tuple[Task, ...]

    @property
    def bytes(self) -> int:
        return sum(item.size for task in self.tasks for _, item in task.items)

    @property
    def files(self) -> int:
        return sum(len(task.items) for task in self.tasks)

    def to_lines(self) -> Iterator[str]:
        """Yields a line for each task."""
        for task in self.tasks:
            yield json.dumps([[n, *dataclasses.astuple(item)] for n, item in task.items], ensure_ascii=False)

    @staticmethod
    def read_task(line: str) -> Task:
        """Returns the task of a line that `to_lines` wrote."""
        return Task(tuple((n, Item(*fields)) for n, *fields in json.loads(line)))


def make_plan(source: CuratedSource, build: Callable[[Input, str], Reader], task_bytes: int) -> Plan:
    """Lists the files of a source and cuts them into tasks of at most `task_bytes`, or one file each.

    Raises:
      DataError: an input is not there, or has nothing that its kind reads.
    """
    items = [
        (position, item)
        for position, given in enumerate(source.inputs)
        for item in build(given, field(source, given)).items(Place(given.path, field(source, given)))
    ]
    tasks, begin = [], 0
    while begin < len(items):
        end = _task_end(items, begin, task_bytes)
        tasks.append(Task(tuple(items[begin:end])))
        begin = end
    return Plan(tuple(tasks))


def _task_end(items: Sequence[tuple[int, Item]], begin: int, task_bytes: int) -> int:
    """Returns where the task ends that begins with an item.

    From a quarter of `task_bytes` on it ends behind the file whose path has the smallest hash. So a file that is added
    or removed moves the ends of a few tasks only: those after it soon end where they did, and can be used again. From
    half on, tasks of two files each would have no choice, and never end where they did.
    """
    size, ends = 0, []
    for end in range(begin + 1, len(items) + 1):
        size += items[end - 1][1].size
        if size > task_bytes and end > begin + 1:
            return min(ends, key=lambda end: _path_hash(items[end - 1][1])) if ends else end - 1
        if 4 * size >= task_bytes:
            ends.append(end)
    return len(items)


def _path_hash(item: Item) -> bytes:
    return hashlib.blake2b(item.path.encode(), digest_size=8).digest()


def field(source: CuratedSource, given: Input) -> str:
    """Returns what errors call an input."""
    return f"sources[{source.name}].inputs[{given.label}]"


def acquire(
    source: CuratedSource, given: Input, reader: Reader, item: Item, reject: Callable[[Document, str], None]
) -> Iterator[Document]:
    """Yields the documents of a file with their provenance; what cannot be read is rejected with its reason.

    Args:
      source: the source.
      given: the input that the file belongs to.
      reader: reads its kind.
      item: the file.
      reject: called with what cannot be a document.

    Raises:
      DataError: an address cannot be reached, whatever the file holds.
      OSError: the disk fails.
    """
    unread = Document(id=f"{given.label}/{item.path}")
    if item.refused:
        reject(unread, item.refused)
        return
    try:
        for found in reader.read(_watched(given.path, field(source, given)), item):
            document = stamp(source, given, reader, item, found)
            refused = found.refused if isinstance(found, Acquired) else ""
            if refused := refused or _unfit(document):
                name = document.id.encode("utf-8", "replace").decode()
                reject(dataclasses.replace(document, id=name, text="", raw=b""), refused)
            else:
                yield document
    except FileNotFoundError:
        reject(unread, "vanished since it was listed")
    except Exception as error:  # a damaged file is its own trouble, whatever the library makes of it
        if is_fatal(error):
            raise
        reject(unread, f"cannot be read ({type(error).__name__}: {error})"[:1000])


def _watched(path: str, field: str) -> Place:
    with _reached(path, field):
        return _WatchedPlace(path, field)


class _WatchedPlace(Place):
    """A place that tells trouble on the way to an address from a damaged file: the one passes, the other stays."""

    def open(self, item: Item) -> BinaryIO:
        if self._local:
            return super().open(item)
        with _reached(self.path, self.field):
            return io.BufferedReader(_Stream(super().open(item), self), 2**16)


class _Stream(io.RawIOBase):
    """The bytes of a file behind an address."""

    def __init__(self, stream: BinaryIO, place: Place):
        super().__init__()
        self._stream, self._place = stream, place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def readinto(self, buffer: memoryview) -> int:
        with _reached(self._place.path, self._place.field):
            found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


@contextlib.contextmanager
def _reached(path: str, field: str) -> Iterator[None]:
    """Raises `DataError` for what goes wrong on the way to an address, unless the file is gone.

    Credentials that ran out, a connection, a timeout: rejecting the file would lose it for good in a task that counts
    as done.
    """
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # every file system has exceptions of its own
        problem = f"cannot be read ({type(error).__name__}: {error})"[:1000]
        raise DataError(field, path, problem, "see to connection and credentials, then start it again") from error


def stamp(source: CuratedSource, given: Input, reader: Reader, item: Item, found: Acquired | Document) -> Document:
    """Returns the document with its L0 record: source, input, file, native name, url, time, licence, sha256."""
    record: dict[str, Any] = {"source": source.name, "input": given.label, "file": item.path}
    if isinstance(found, Document):
        stamped = {"operation": reader.name, "level": "L0", "parameters": record}
        return dataclasses.replace(found, lineage=(*found.lineage, stamped))
    licence = found.licence or given.licence
    metadata = {"path": found.name, "time": item.time, **found.metadata}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    record |= {"native": found.name} if found.name != item.path else {}
    record |= {name: metadata[name] for name in ("url", "time") if name in metadata}
    record |= {"licence": licence} if licence else {}
    record |= dict(found.provenance)
    record["sha256"] = hashlib.sha256(found.raw or found.text.encode("utf-8", "replace")).hexdigest()
    name = f"{given.label}/{found.name}"
    return Document(
        id=name,
        text=found.text,
        raw=found.raw,
        group=name,
        level=found.level,
        licence=licence,
        metadata=metadata,
        lineage=({"operation": reader.name, "level": "L0", "parameters": record},),
    )


def _unfit(document: Document) -> str:
    try:
        check_writable(document)
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no text"
    except (TypeError, ValueError, RecursionError) as error:
        return f"has metadata that is no JSON ({error})"
    return "" if document.text or document.raw else "empty"


def no_files(place: Place, what: str) -> DataError:
    """Returns the error of an input that has nothing its kind reads."""
    return DataError(place.field, place.path, f"holds no {what}", "name a place that does, or another `kind`")
