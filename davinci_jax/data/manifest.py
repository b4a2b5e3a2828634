"""The manifest of a shard set: written last, so a folder that has one is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from davinci_jax.errors import DataError
from davinci_jax.experiment import DataConfig, Source
from davinci_jax.files import write_atomically

FORMAT = "davinci-shards-2"
NAME = "manifest.json"
SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file of a shard set: name, size in bytes, SHA-256 of its content."""

    file: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ShardEntry(FileEntry):
    """A file of token blocks, one record each."""

    blocks: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class DocumentsEntry(FileEntry):
    """A file of the document table, one JSON record for each of `documents` documents."""

    documents: int


@dataclasses.dataclass(frozen=True)
class SplitEntry:
    """What a split holds.

    Attributes:
      tokens, documents, blocks: counts.
      shards: token files in the order of the stream.
      documents_files: document table in the order of the stream.
      offsets: a .npy file, int64 [documents + 1]: position of each document's first token, then `tokens`.
    """

    tokens: int
    documents: int
    blocks: int
    shards: tuple[ShardEntry, ...]
    documents_files: tuple[DocumentsEntry, ...]
    offsets: FileEntry

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files of the split."""
        return (*self.shards, *self.documents_files, self.offsets)


@dataclasses.dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that made the tokens."""

    fingerprint: str
    vocab_size: int
    eos_id: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a shard set holds and what it was made from.

    Attributes:
      source, domain, level: as the config named them when the set was made.
      tokenizer: what made the tokens.
      dtype: "uint16" or "uint32".
      block_tokens: tokens of a block.
      heldout: share of documents in the held-out split.
      lineage: the operations that every document has gone through.
      inputs: the documents files, names relative to the folder of the documents.
      rejected: reason -> documents left out; `rejects.jsonl` lists them.
      splits: "train" and "heldout".
    """

    source: str
    domain: str
    level: str
    tokenizer: TokenizerEntry
    dtype: str
    block_tokens: int
    heldout: float
    lineage: tuple[Any, ...]
    inputs: tuple[FileEntry, ...]
    rejected: dict[str, int]
    splits: dict[str, SplitEntry]

    @property
    def fingerprint(self) -> str:
        """64 hex digits over the whole manifest, the checksums of all files included."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(f"{FORMAT}\n{text}".encode()).hexdigest()

    def write(self, folder: pathlib.Path) -> None:
        """Writes the manifest into a folder, atomically."""
        fields = {"format": FORMAT, "fingerprint": self.fingerprint, **dataclasses.asdict(self)}
        write_atomically(folder / NAME, json.dumps(fields, indent=1) + "\n")

    @classmethod
    def load(cls, folder: pathlib.Path) -> Manifest:
        """Returns the manifest of a folder.

        Raises:
          DataError: there is none, or it is damaged, was changed or has another format.
        """
        file = folder / NAME
        try:
            fields = json.loads(file.read_bytes())
        except FileNotFoundError as error:
            raise no_shard_set(folder) from error
        except ValueError as error:
            raise _broken(file, f"is not JSON ({error})") from error
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise _broken(file, f"is not of the format {FORMAT!r}")
        try:
            manifest = _parse(fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _broken(file, f"lacks or adds fields ({error})") from error
        if manifest.fingerprint != fields.get("fingerprint"):
            raise _broken(file, "does not match its own fingerprint: it was changed or damaged")
        return manifest


def _parse(fields: dict[str, Any]) -> Manifest:
    fields = {key: value for key, value in fields.items() if key not in ("format", "fingerprint")}
    fields["tokenizer"] = TokenizerEntry(**fields["tokenizer"])
    fields["lineage"] = tuple(fields["lineage"])
    fields["inputs"] = tuple(FileEntry(**entry) for entry in fields["inputs"])
    fields["splits"] = {name: _parse_split(fields["splits"][name]) for name in SPLITS}
    return Manifest(**fields)


def _parse_split(fields: dict[str, Any]) -> SplitEntry:
    return SplitEntry(
        **{
            **fields,
            "shards": tuple(ShardEntry(**entry) for entry in fields["shards"]),
            "documents_files": tuple(DocumentsEntry(**entry) for entry in fields["documents_files"]),
            "offsets": FileEntry(**fields["offsets"]),
        }
    )


def no_shard_set(folder: pathlib.Path, source: str | None = None) -> DataError:
    """Returns the error of a folder without a manifest, told with the source of the config that it is for, if known."""
    problem = "holds no shard set" if folder.is_dir() else "does not exist"
    if source is None:
        return DataError(str(folder), None, problem, "make it with `davinci shard CONFIG`")
    remedy = f"make it with `davinci shard CONFIG --source {source}`, or name its folder in `path`"
    return DataError(f"data.sources[{source}]", str(folder), problem, remedy)


def _broken(file: pathlib.Path, problem: str) -> DataError:
    return DataError(str(file), None, problem, "restore it from a copy, or remove its folder and run `davinci shard`")


def shard_folder(data: DataConfig, source: Source) -> pathlib.Path:
    """Returns the folder of a source's shard set, whether or not it is there yet."""
    return pathlib.Path(data.root) / (source.path or source.name)


def sha256_of(file: pathlib.Path) -> str:
    """Returns the SHA-256 of a file's content in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def file_entry(file: pathlib.Path) -> FileEntry:
    """Returns name, size and checksum of a file."""
    return FileEntry(file.name, file.stat().st_size, sha256_of(file))
