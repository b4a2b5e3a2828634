"""From the lineage of a document back to the file that it was read from."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from davinci_jax.curation.documents import Document
from davinci_jax.curation.funnel import read_card
from davinci_jax.curation.inputs import Acquired, Plan, stamp
from davinci_jax.curation.installation import find_package
from davinci_jax.curation.places import Place
from davinci_jax.curation.registry import build_reader
from davinci_jax.errors import DataError
from davinci_jax.experiment import CuratedSource, Input

_UNCHANGED = "unchanged"


class Origin(NamedTuple):
    """Where a document comes from.

    Attributes:
      place: file or address, with the member, line or record inside it.
      state: "unchanged" where the bytes there have the SHA-256 of the lineage, else what is wrong.
      record: the L0 record of the lineage.
    """

    place: str
    state: str
    record: dict[str, Any]


def find_origin(
    documents: pathlib.Path, lineage: Sequence[dict[str, Any]], files: Sequence[tuple[str, int, str]] = ()
) -> Origin | None:
    """Returns the origin of a document, `None` where its lineage has no L0 record of curation.

    Documents that went on from those of another source are followed through the result of it that they were read from.

    Args:
      documents: folder of the documents; `card.json` beside it says where the inputs lie.
      lineage: operations, oldest first.
      files: (name, bytes, SHA-256) of the documents files when the document was in them. Where the source has been
        curated anew since, its result that has these files is taken.
    """
    acquired = [n for n, record in enumerate(lineage) if record.get("level") == "L0" and "input" in _fields(record)]
    if not acquired:
        return None
    record = _fields(lineage[acquired[-1]])
    result = _result_with(documents.resolve(), files)
    card = read_card(result or documents.resolve().parent) or {"inputs": ()}
    given = next((item for item in card["inputs"] if item["label"] == record["input"]), None)
    if given is None:
        name = f"{record['input']}/{record.get('native', record['file'])}"
        return Origin(name, "no card beside the documents says where that lies", record)
    if given["kind"] == "documents" and len(acquired) > 1:
        made_from = _made_from(result or documents.resolve().parent, card["inputs"].index(given), record["file"])
        origin = _through(pathlib.Path(given["path"]), made_from, lineage[: acquired[-1]])
    else:
        origin = Origin(_address(given, record), _state(card, given, record), record)
    if origin is None or result is not None:
        return origin
    replaced = "where the source is read now: what the shards were made from has been replaced since"
    return origin._replace(state=f"{origin.state}, {replaced}")


def _made_from(result: pathlib.Path, position: int, file: str) -> str:
    """Returns the name of the result that a documents file of an input belonged to, "" where nothing says so."""
    with contextlib.suppress(OSError, ValueError), (result / "plan.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            for number, item in Plan.read_task(line).items:
                if number == position and item.path == file:
                    return item.stamp.rpartition("/")[0]
    return ""


def _through(path: pathlib.Path, made_from: str, lineage: Sequence[dict[str, Any]]) -> Origin | None:
    """Returns the origin of a document of another source, by the result that it was read from while that is there.

    Args:
      path: of the input, which may lead to a newer result by now.
      made_from: name of the result.
      lineage: of the document in that source.
    """
    now = path if path.is_dir() else path.parent
    then = now.resolve().parent.parent / made_from / now.name
    if not made_from or read_card(then.parent) is not None:
        return find_origin(then if made_from else now, lineage)
    origin = find_origin(now, lineage)
    gone = f"where its source is read now: the result {made_from} that it was made from has gone"
    return origin and origin._replace(state=f"{origin.state}, {gone}")


def _result_with(documents: pathlib.Path, files: Sequence[tuple[str, int, str]]) -> pathlib.Path | None:
    """Returns the result of a source that has these documents files, `None` where there is none any more."""
    if not files:
        return documents.parent
    others = sorted(documents.parent.parent.glob(f"*/{documents.name}"))
    whole = (folder for folder in (documents, *others) if read_card(folder.parent) is not None and _has(folder, files))
    return next((folder.parent for folder in whole), None)


def _has(folder: pathlib.Path, files: Sequence[tuple[str, int, str]]) -> bool:
    """Whether documents files are in a folder, by their names and sizes and the SHA-256 of the smallest."""
    base = folder if folder.is_dir() else folder.parent
    if not all((base / name).is_file() and (base / name).stat().st_size == size for name, size, _ in files):
        return False
    name, _, digest = min(files, key=lambda file: file[1])
    with (base / name).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == digest


def _address(given: dict[str, Any], record: dict[str, Any]) -> str:
    """Returns the file of a record, with the member, line or row in it."""
    path, file = given["path"].rstrip("/"), record["file"]
    if given["kind"] == "python-installation":
        path = _package_folder(path)
    # The input is the file itself, or a folder that has it.
    single = path.split("/")[-1] == file and not pathlib.Path(path).is_dir()
    inside = [record["native"]] if record.get("native", file) != file else []
    inside += [f"{name} {record[name]}" for name in ("line", "row") if name in record]
    return (path if single else f"{path}/{file}") + (f" ({', '.join(inside)})" if inside else "")


def _package_folder(name: str) -> str:
    try:
        return str(find_package(name).root)
    except DataError:  # it was installed elsewhere
        return name


def _state(card: dict[str, Any], given: dict[str, Any], record: dict[str, Any]) -> str:
    """Reads the file again and compares the SHA-256 of the document with that of the record."""
    described = Input(
        kind=given["kind"], path=given["path"], name=given["label"], licence=given["licence"], options=given["options"]
    )
    source = CuratedSource(
        name=card["name"], domain=card["domain"], level=card["level"], inputs=(described,), recipe=()
    )
    wanted, state = record.get("native", record["file"]), "is not in the file any more"
    try:
        reader, place = build_reader(described), Place(described.path, described.label)
        item = next(item for item in reader.items(place) if item.path == record["file"])
        if item.refused:
            return item.refused
        for found in reader.read(place, item):
            if isinstance(found, Acquired) and found.name == wanted:
                state = _compare(stamp(source, described, reader, item, found), record)
                if state == _UNCHANGED:  # else a line below may have the same name, and be the one
                    break
    except (DataError, FileNotFoundError, NotADirectoryError, StopIteration):
        return "is not there any more"
    except Exception as error:  # a damaged file makes its library raise nearly anything
        return " ".join(f"cannot be read ({type(error).__name__}: {error})".split())[:300]
    return state


def _compare(document: Document, record: dict[str, Any]) -> str:
    return _UNCHANGED if _fields(document.lineage[0])["sha256"] == record["sha256"] else "has changed since"


def _fields(record: dict[str, Any]) -> dict[str, Any]:
    fields = record.get("parameters")
    return fields if isinstance(fields, dict) else {}
