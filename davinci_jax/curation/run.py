"""`davinci curate`: the documents of every built-in source of an experiment, written once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from davinci_jax.curation import recipes
from davinci_jax.curation.documents import BUILTIN_SCHEME, Document, documents_path, write_lines
from davinci_jax.curation.extract import DocstringPages
from davinci_jax.curation.installation import Package, find_package
from davinci_jax.curation.pipeline import FunnelStep, Operation, Pipeline, show_funnel
from davinci_jax.errors import DataError
from davinci_jax.experiment import Experiment, Source
from davinci_jax.files import write_atomically

DOCUMENTS_FILE, FUNNEL_FILE = "documents.jsonl", "funnel.json"


@dataclasses.dataclass(frozen=True)
class Curated:
    """What `curate` did for one source.

    Attributes:
      source: name of the source.
      folder: where its documents lie.
      funnel: `funnel.json` as read back: recipe, documents, bytes, pairs, steps.
      built: whether the documents were written now; `False` means that they were there already.
    """

    source: str
    folder: pathlib.Path
    funnel: dict[str, Any]
    built: bool


def curate(
    experiment: Experiment, log: Callable[[str], None] = print, find: Callable[[str], Package] = find_package
) -> list[Curated]:
    """Writes the documents of the built-in sources of an experiment; a source with a path is left alone.

    Below `<root>/documents/` a source gets a folder `<name>/` with `documents.jsonl` and `funnel.json`, the counts
    of every operation, and beside it `<name>.rejects.jsonl`: what was dropped, by which operation and why. The
    result is a pure function of the packages and of this code; documents that the same packages and code have
    written are kept as they are.

    Args:
      experiment: its `data.root` and `data.sources` are read.
      log: is given lines to show.
      find: finds a package by name.

    Raises:
      ConfigError: `documents` names no built-in recipe.
      DataError: a package is missing, or the folder holds documents that curation did not write.
    """
    pages = DocstringPages()
    results = []
    for source in experiment.data.sources:
        if (source.documents or "").startswith(BUILTIN_SCHEME):
            operations = recipes.build(recipes.recipe_name(source.documents), pages, find)
            results.append(_curate_source(source, documents_path(experiment.data, source), operations, log))
    if not results:
        log(f"curate: no source has documents = {BUILTIN_SCHEME!r}...; the user's own documents are left as they are")
    return results


def _curate_source(
    source: Source, folder: pathlib.Path, operations: tuple[Operation, ...], log: Callable[[str], None]
) -> Curated:
    recipe = _recipe_hash(operations)
    known = _read_funnel(source, folder)
    if known is not None and known.get("recipe") == recipe and _is_whole(folder, known):
        log(f"{source.name}: {known['documents']} documents in {folder} are up to date")
        return Curated(source.name, folder, known, built=False)
    packages = operations[0].parameters()["packages"]
    log(f"{source.name}: from {', '.join(f'{name} {version}' for name, version in packages.items())}")
    started = time.monotonic()
    funnel, steps = _write(source, folder, operations, recipe)
    log(show_funnel(steps))
    seconds = time.monotonic() - started
    log(
        f"{source.name}: {funnel['documents']} documents, {funnel['bytes'] / 1e6:.1f} MB in {seconds:.1f} s -> {folder}"
    )
    return Curated(source.name, folder, funnel, built=True)


def _read_funnel(source: Source, folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the funnel of documents that are there; raises `DataError` if anything else is there too."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (names and names - {DOCUMENTS_FILE, FUNNEL_FILE}) or names == {DOCUMENTS_FILE}:
        raise DataError(
            f"data.sources[{source.name}].documents",
            str(folder),
            "holds documents that curation did not write",
            "move them away, or name them with `documents` to use them",
        )
    try:
        return json.loads((folder / FUNNEL_FILE).read_text()) if names else None
    except ValueError:
        return None


def _write(
    source: Source, folder: pathlib.Path, operations: tuple[Operation, ...], recipe: str
) -> tuple[dict[str, Any], list[FunnelStep]]:
    """Writes a source beside its place and moves it there whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    counts = {"documents": 0, "bytes": 0, "pairs": 0}
    rejects: list[str] = []

    def on_reject(operation: str, document: Document, reason: str) -> None:
        rejects.append(json.dumps({"id": document.id, "operation": operation, "reason": reason}, ensure_ascii=False))

    def lines(documents: Iterator[Document]) -> Iterator[str]:
        for document in documents:
            counts["documents"] += 1
            counts["bytes"] += document.size
            counts["pairs"] += len(document.questions)
            yield document.to_json()

    pipeline = Pipeline(operations, on_reject)
    write_lines(new / DOCUMENTS_FILE, lines(pipeline.run()))
    steps = [dataclasses.asdict(step) for step in pipeline.funnel]
    with (new / DOCUMENTS_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = (new / DOCUMENTS_FILE).stat().st_size
    funnel = {"source": source.name, "recipe": recipe, **counts, "file_bytes": size, "sha256": digest, "steps": steps}
    (new / FUNNEL_FILE).write_text(json.dumps(funnel, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_atomically(folder.with_name(f"{folder.name}.rejects.jsonl"), "".join(line + "\n" for line in rejects))
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return funnel, pipeline.funnel


def _is_whole(folder: pathlib.Path, funnel: dict[str, Any]) -> bool:
    file = folder / DOCUMENTS_FILE
    return file.is_file() and file.stat().st_size == funnel["file_bytes"]


def _recipe_hash(operations: tuple[Operation, ...]) -> str:
    """Returns 16 hex digits of the operations with their parameters and of the code that carries them out."""
    described = [(operation.name, operation.level, operation.parameters()) for operation in operations]
    return hashlib.sha256(f"{json.dumps(described)}{_code_hash()}".encode()).hexdigest()[:16]


@functools.cache
def _code_hash() -> str:
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
