"""From the lineage of a document back to the file that it was read from."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from davinci_jax.curation.documents import Document
from davinci_jax.curation.funnel import read_card
from davinci_jax.curation.inputs import Acquired, stamp
from davinci_jax.curation.places import Place
from davinci_jax.curation.registry import build_reader
from davinci_jax.errors import UserError
from davinci_jax.experiment import CuratedSource, Input


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


def find_origin(documents: pathlib.Path, lineage: Sequence[dict[str, Any]]) -> Origin | None:
    """Returns the origin of a document, `None` where its lineage has no L0 record of curation.

    Documents that went on from those of another source are followed through that source's card.

    Args:
      documents: folder of the documents; `card.json` beside it says where the inputs lie.
      lineage: operations, oldest first.
    """
    acquired = [n for n, record in enumerate(lineage) if record.get("level") == "L0" and "input" in _fields(record)]
    if not acquired:
        return None
    record = _fields(lineage[acquired[-1]])
    card = read_card(documents.resolve().parent) or {"inputs": ()}
    given = next((item for item in card["inputs"] if item["label"] == record["input"]), None)
    if given is None:
        name = f"{record['input']}/{record.get('native', record['file'])}"
        return Origin(name, "no card beside the documents says where that lies", record)
    if given["kind"] == "documents" and len(acquired) > 1:
        path = pathlib.Path(given["path"])
        return find_origin(path if path.is_dir() else path.parent, lineage[: acquired[-1]])
    place = f"{given['path'].rstrip('/')}/{record['file']}"
    if record.get("native", record["file"]) != record["file"]:
        place += f" ({record['native']})"
    return Origin(place, _state(card, given, record), record)


def _state(card: dict[str, Any], given: dict[str, Any], record: dict[str, Any]) -> str:
    """Reads the file again and compares the SHA-256 of the document with that of the record."""
    described = Input(
        kind=given["kind"], path=given["path"], name=given["label"], licence=given["licence"], options=given["options"]
    )
    source = CuratedSource(
        name=card["name"], domain=card["domain"], level=card["level"], inputs=(described,), recipe=()
    )
    wanted = record.get("native", record["file"])
    try:
        reader, place = build_reader(described), Place(described.path, described.label)
        item = next(item for item in reader.items(place) if item.path == record["file"])
        for found in reader.read(place, item):
            if isinstance(found, Acquired) and found.name == wanted:
                return _compare(stamp(source, described, reader, item, found), record)
    except (UserError, OSError, StopIteration):
        return "is not there any more"
    return "is not in the file any more"


def _compare(document: Document, record: dict[str, Any]) -> str:
    return "unchanged" if _fields(document.lineage[0])["sha256"] == record["sha256"] else "has changed since"


def _fields(record: dict[str, Any]) -> dict[str, Any]:
    fields = record.get("parameters")
    return fields if isinstance(fields, dict) else {}
