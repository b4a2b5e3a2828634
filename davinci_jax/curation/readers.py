"""Kinds of input: folders of files, JSONL, Parquet, WARC, git repositories, curated documents, Python packages."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from davinci_jax.curation.archives import is_archive, members
from davinci_jax.curation.documents import Document
from davinci_jax.curation.inputs import MAX_BYTES, Acquired, no_files
from davinci_jax.curation.installation import find_package
from davinci_jax.curation.pipeline import is_fatal
from davinci_jax.curation.places import COMPRESSED, Item, Place, decompressed
from davinci_jax.curation.unpacking import check, unpacked
from davinci_jax.errors import DataError
from davinci_jax.experiment.data import LEVELS

_TABLE_ROWS = 256  # of a batch that is read at a time


class _Reader:
    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class FolderReader(_Reader):
    """Every file of a folder and its subfolders, and every member of the zip and tar archives in it, as bytes.

    Attributes:
      suffixes: endings of the files that are read, such as ".html"; a compressed file is known by the ending before
        ".gz". None means all.
      max_bytes: bound on a document; a longer one is rejected.
      archives: whether archives are opened.
    """

    suffixes: tuple[str, ...] = ()
    max_bytes: int = MAX_BYTES
    archives: bool = True
    name = "read-folder"

    def items(self, place: Place) -> list[Item]:
        found = [item for item in place.items() if self._wanted(item.path) or self._opens(item.path) or _unlisted(item)]
        if not found:
            raise no_files(place, f"file that ends in {' or '.join(self.suffixes)}")
        return found

    def read(self, place: Place, item: Item) -> Iterator[Acquired]:
        with place.open(item) as stream:
            if self._opens(item.path):
                for member in members(stream, item.path, item.size, self.max_bytes):
                    if self._wanted(member.name):
                        yield Acquired(f"{item.path}!/{member.name}", raw=member.raw, refused=member.refused)
                return
            plain, name = decompressed(stream, item.path)
            raw = plain.read(self.max_bytes + 1)
        refused = f"more than {self.max_bytes} bytes" if len(raw) > self.max_bytes else ""
        yield Acquired(name, raw=b"" if refused else raw, refused=refused)

    def _opens(self, path: str) -> bool:
        return self.archives and is_archive(path)

    def _wanted(self, path: str) -> bool:
        stem = path.rsplit(".", 1)[0] if path.lower().endswith(COMPRESSED) else path
        return not self.suffixes or stem.lower().endswith(self.suffixes)


@dataclasses.dataclass(frozen=True)
class HtmlReader(FolderReader):
    """The HTML files of a folder, as bytes."""

    suffixes: tuple[str, ...] = (".html", ".htm", ".xhtml")
    name = "read-html"


@dataclasses.dataclass(frozen=True)
class PdfReader(FolderReader):
    """The PDF files of a folder, as bytes."""

    suffixes: tuple[str, ...] = (".pdf",)
    name = "read-pdf"


@dataclasses.dataclass(frozen=True)
class JsonlReader(_Reader):
    """JSON objects, one a line, plain or compressed; fields that are not named here become metadata.

    Attributes:
      text: field of the text.
      id: field of the native name; the line's number stands in where it is missing.
      licence: field of the licence.
      level: field of the Darwin level that a document has already, believed where it is "L0" to "L9"; none unless it
        is named here: a stranger's "level" says something else, and is metadata.
      max_bytes: bound on a line; a longer one is rejected.
    """

    text: str = "text"
    id: str = "id"
    licence: str = "licence"
    level: str = ""
    max_bytes: int = MAX_BYTES
    name = "read-jsonl"

    def items(self, place: Place) -> list[Item]:
        endings = tuple(stem + ending for stem in (".jsonl", ".json") for ending in ("", *COMPRESSED))
        return _ending(place, endings, "JSONL file")

    def read(self, place: Place, item: Item) -> Iterator[Acquired]:
        with place.open(item) as stream:
            plain = unpacked(stream, item.path, item.size)
            for number, line in enumerate(_lines(plain, self.max_bytes), 1):
                if line is None:
                    yield Acquired(f"{item.path}#{number}", refused=f"line of more than {self.max_bytes} bytes")
                elif line.strip():
                    yield self._record(item, number, line)

    def _record(self, item: Item, number: int, line: bytes) -> Acquired:
        name, where = f"{item.path}#{number}", {"line": number}
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            return Acquired(name, refused=f"line {number} is no JSON ({error})"[:300])
        if not isinstance(fields, dict):
            return Acquired(name, refused=f"line {number} is no JSON object")
        return _row(self, name, fields, where)


@dataclasses.dataclass(frozen=True)
class ParquetReader(_Reader):
    """Rows of Parquet files; columns that are not named here become metadata.

    Attributes:
      text: column of the text.
      id: column of the native name; the row's number stands in where it is missing.
      licence: column of the licence.
      level: column of the Darwin level that a document has already, believed where it is "L0" to "L9"; none unless it
        is named here: a stranger's "level" says something else, and is metadata.
    """

    text: str = "text"
    id: str = "id"
    licence: str = "licence"
    level: str = ""
    name = "read-parquet"

    def items(self, place: Place) -> list[Item]:
        return _ending(place, (".parquet", ".pq"), "Parquet file")

    def read(self, place: Place, item: Item) -> Iterator[Acquired]:
        import pyarrow.parquet

        number = taken = 0
        with place.open(item) as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            groups = (table.metadata.row_group(n) for n in range(table.num_row_groups))
            check(sum(group.total_byte_size for group in groups), item.size)
            for batch in table.iter_batches(batch_size=_TABLE_ROWS):
                taken += batch.nbytes  # a word of a dictionary may stand in every row
                check(taken, item.size)
                for fields in batch.to_pylist():
                    number += 1
                    plain = {name: _plain(value) for name, value in fields.items()}
                    yield _row(self, f"{item.path}#{number}", plain, {"row": number})


@dataclasses.dataclass(frozen=True)
class WarcReader(_Reader):
    """Web pages of WARC files as Common Crawl writes them: the bodies of HTTP responses, as bytes.

    Attributes:
      types: beginnings of the content types that are read.
      max_bytes: bound on a page; a longer one is rejected.
    """

    types: tuple[str, ...] = ("text/html", "application/xhtml")
    max_bytes: int = MAX_BYTES
    name = "read-warc"

    def items(self, place: Place) -> list[Item]:
        return _ending(place, (".warc", ".warc.gz", ".warc.lz4"), "WARC file")

    def read(self, place: Place, item: Item) -> Iterator[Acquired]:
        from fastwarc.warc import ArchiveIterator, WarcRecordType

        with place.open(item) as stream:
            # The library would unpack as much as there is; lz4, which it reads itself, makes 255 times its size.
            plain = _Quiet(unpacked(stream, item.path, item.size))
            for record in ArchiveIterator(plain, record_types=WarcRecordType.response, parse_http=True):
                kind = (record.http_content_type or "").lower()
                if not kind.startswith(self.types):
                    continue
                raw = record.reader.read(self.max_bytes + 1)
                metadata = {
                    "url": record.headers.get("WARC-Target-URI"),
                    "time": record.headers.get("WARC-Date"),
                    "charset": record.http_charset,
                    "content_type": kind,
                }
                name = (record.record_id or f"{item.path}@{record.stream_pos}").removeprefix("urn:uuid:")
                refused = f"more than {self.max_bytes} bytes" if len(raw) > self.max_bytes else ""
                yield Acquired(name, raw=b"" if refused else raw, metadata=metadata, refused=refused)
            if plain.error:
                raise plain.error


class _Quiet:
    """A stream that ends where it raises: what reads WARC files does not survive an exception of its stream."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._place = stream, 0
        self.error: Exception | None = None

    def read(self, count: int) -> bytes:
        try:
            found = b"" if self.error else self._stream.read(count)
        except Exception as error:
            self.error, found = error, b""
        self._place += len(found)
        return found

    def tell(self) -> int:
        return self._place


@dataclasses.dataclass(frozen=True)
class DocumentsReader(_Reader):
    """Documents that curation has written: they keep id, level and lineage, and go on from there.

    The files of a result are no stranger's. One that is damaged or missing ends the run: rejects would lose for good
    what can be made again. Elsewhere a line that is no document is rejected.

    Attributes:
      max_bytes: bound on a line; a longer one is rejected. Raw bytes take a third more there.
    """

    max_bytes: int = 4 * MAX_BYTES
    name = "read-documents"

    def items(self, place: Place) -> list[Item]:
        found, result = _ending(place, (".jsonl", ".jsonl.gz"), "documents file"), _result_of(place)
        if result is None:
            return found
        for item in found:
            if item.refused:
                raise _damaged(place, item, item.refused)
        if place.folder.is_dir():  # one that is missing is told when it is read: its source may be made before
            known = {item.path for item in found}
            missing = (path for path in _counted(result) if path not in known)
            found = sorted([*found, *(Item(path, 0) for path in missing)], key=lambda item: item.path)
        stamps = (f"{result.name}/{_content(result, item)}" for item in found)
        return [dataclasses.replace(item, stamp=stamp, time=None) for item, stamp in zip(found, stamps, strict=True)]

    def read(self, place: Place, item: Item) -> Iterator[Acquired | Document]:
        ours, number = _result_of(place) is not None, 0
        try:
            with place.open(item) as stream:
                plain = unpacked(stream, item.path, item.size)
                for number, line in enumerate(_lines(plain, self.max_bytes), 1):
                    if line is None:
                        yield Acquired(f"{item.path}#{number}", refused=f"line of more than {self.max_bytes} bytes")
                        continue
                    try:
                        document = Document.from_json(line.decode())
                        _check(document)
                    except (ValueError, TypeError, KeyError, RecursionError) as error:
                        if ours:
                            raise
                        refused = f"is no document of curation ({error})"[:300]
                        yield Acquired(f"{item.path}#{number}", refused=refused)
                    else:
                        yield document
        except Exception as error:  # a damaged file makes its library raise nearly anything
            if not ours or is_fatal(error):
                raise
            problem = f"is missing or damaged at line {number} ({type(error).__name__}: {error})"
            raise _damaged(place, item, " ".join(problem.split())[:500]) from error


@dataclasses.dataclass(frozen=True)
class PackageReader(_Reader):
    """The Python files of an installed package, nothing left out; `path` is its import name, "python" the standard
    library."""

    name = "acquire-files"

    def items(self, place: Place) -> list[Item]:
        package = find_package(place.path)
        found = [Item(path, file.stat().st_size, package.version) for path, file in package.files()]
        if not found:
            raise DataError(
                place.field,
                place.path,
                "is installed without its .py files",
                "use a Python installation that has its library as source",
            )
        return found

    def read(self, place: Place, item: Item) -> Iterator[Acquired]:
        package = find_package(place.path)
        raw = (package.root / item.path).read_bytes()
        provenance = {"package": package.name, "version": package.version}
        yield Acquired(item.path, raw=raw, licence=package.licence, provenance=provenance)


def _result_of(place: Place) -> pathlib.Path | None:
    """Returns the folder of the result of a source whose documents these are, `None` where they lie elsewhere."""
    try:
        path = place.folder.resolve()
    except DataError:  # an address
        return None
    documents = path if path.is_dir() else path.parent
    return documents.parent if documents.name == "documents" and (documents.parent / "counts").is_dir() else None


def _content(result: pathlib.Path, item: Item) -> str:
    """Returns the digest that the counts of a documents file name, its stamp where it was changed since.

    So a task of another source can be used again where the file has come out as it was in an earlier result.
    """
    counts = result / "counts" / f"{item.path.partition('.')[0]}.json"
    try:
        told = json.loads(counts.read_text(encoding="utf-8"))
        changed = (result / "documents" / item.path).stat().st_mtime_ns > counts.stat().st_mtime_ns
        return item.stamp if changed or told["file_bytes"] != item.size else told["output_digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return item.stamp


def _counted(result: pathlib.Path) -> Iterator[str]:
    """Yields the names of the documents files that a result must have: each of its tasks has left counts."""
    return (f"{file.stem}.jsonl.gz" for file in (result / "counts").glob("*.json"))


def _damaged(place: Place, item: Item, problem: str) -> DataError:
    """Returns the error of a file that curation has written and that is not as it was."""
    file = place.folder / item.path if place.folder.is_dir() else place.folder
    remedy = "remove it and run `davinci curate` with the config of its source, which makes it anew, then this again"
    return DataError(place.field, str(file), problem, remedy)


def _unlisted(item: Item) -> bool:
    """Whether this is a folder that cannot be listed, or is none of ours: it may hold files of any ending."""
    return bool(item.refused) and item.path.endswith("/")


def _ending(place: Place, endings: tuple[str, ...], what: str) -> list[Item]:
    found = [item for item in place.items() if item.path.lower().endswith(endings) or _unlisted(item)]
    if not found:
        raise no_files(place, what)
    return found


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Yields lines, `None` for one that is longer than the bound."""
    while line := stream.readline(max_bytes + 1):
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while (rest := stream.readline(2**20)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line


def _row(reader: JsonlReader | ParquetReader, name: str, fields: dict[str, Any], where: dict[str, Any]) -> Acquired:
    text, native = fields.pop(reader.text, None), fields.pop(reader.id, None)
    licence = fields.pop(reader.licence, None)
    if not isinstance(text, str):
        return Acquired(name, refused=f"no text in {reader.text!r}")
    level = fields.pop(reader.level) if reader.level and fields.get(reader.level) in LEVELS else "L0"
    more = fields.pop("metadata", None)
    fields |= more if isinstance(more, dict) else {}
    return Acquired(
        str(native) if isinstance(native, (str, int)) and str(native) else name,
        text=text,
        metadata=fields,
        licence=licence if isinstance(licence, str) else None,
        provenance=where,
        level=level,
    )


def _check(document: Document) -> None:
    """Raises `TypeError` for a field that no document of curation has so: an operation would fail on it."""
    for name, kind in (("id", str), ("text", str), ("group", str), ("licence", str | None), ("metadata", dict)):
        if not isinstance(getattr(document, name), kind):
            raise TypeError(f"its {name} is {type(getattr(document, name)).__name__}")
    if document.level not in LEVELS:
        raise TypeError(f"its level is {document.level!r}")
    if not all(isinstance(record, dict) for record in document.lineage):
        raise TypeError("its lineage is no list of records")
    for name, spans, names in (("questions", document.questions, 0), ("parts", document.parts, 1)):
        if not all(_is_span(span, names, len(document.text)) for span in spans):
            raise TypeError(f"its {name} are no spans of its text")


def _is_span(span: tuple[Any, ...], names: int, length: int) -> bool:
    """Whether a span of a text of this length is so many names, a start and an end."""
    *named, start, end = span if len(span) == names + 2 else (None,) * (names + 2)
    places = type(start) is int and type(end) is int and 0 <= start <= end <= length
    return places and all(isinstance(name, str) for name in named)


def _plain(value: Any) -> Any:
    """Returns a cell of a table as JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
