"""`davinci shard`: the shard sets of a config's sources, one after the other, with progress."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from davinci_jax.curation.documents import documents_path
from davinci_jax.data.build import BuildProgress, build_shards
from davinci_jax.data.manifest import NAME, SPLITS, Manifest, shard_folder
from davinci_jax.data.shards import ShardSet
from davinci_jax.data.tokenizer import load_tokenizer
from davinci_jax.data.train_tokenizer import train_tokenizer
from davinci_jax.errors import ConfigError, DataError, nearest
from davinci_jax.experiment import Experiment, Source


def shard_sources(
    experiment: Experiment,
    only: Sequence[str] | None = None,
    verify: bool = False,
    new_tokenizer: bool = False,
    console: Console | None = None,
) -> None:
    """Makes the shard sets of the sources that a stage may draw from; those that are up to date stay as they are.

    Args:
      experiment: names the sources, the tokenizer and where they lie.
      only: names of sources to make instead of all.
      verify: recompute the checksums of sets that were there before.
      new_tokenizer: train `data.tokenizer` on the documents first, unless it is there.
      console: where progress is shown; default: standard output.

    Raises:
      ConfigError: `only` names no source.
      DataError: documents or a tokenizer that are missing or damaged, or a set made from other inputs.
    """
    console = console or Console()
    data = experiment.data
    sources = [source for source in data.sources if source.stages != ()]
    if only:
        known = {source.name: source for source in data.sources}
        for name in only:
            if name not in known:
                raise ConfigError("--source", name, "is no source of the config", nearest(name, known))
        sources = [known[name] for name in only]
    file = pathlib.Path(data.root) / data.tokenizer
    if new_tokenizer:
        train_tokenizer(experiment, log=lambda line: console.print(line, highlight=False, soft_wrap=True))
    elif not file.exists():
        raise DataError(
            "data.tokenizer", str(file), "does not exist", "copy the model's tokenizer there, or give --new-tokenizer"
        )
    tokenizer = load_tokenizer(file)
    for source in sources:
        folder = shard_folder(data, source)
        was_there = (folder / NAME).is_file()
        if was_there and not documents_path(data, source).exists():
            manifest = Manifest.load(folder)  # made elsewhere: there is nothing to make it from, or to compare it with
        else:
            with _Bar(console, source) as bar:
                manifest = build_shards(data, source, tokenizer, progress=bar.update)
        if verify and was_there:
            for split in SPLITS:
                ShardSet(folder, split).verify()
        note = "verified" if verify and was_there else "up to date" if was_there else "made"
        console.print(_summary(source, manifest, folder, note), highlight=False, soft_wrap=True)


class _Bar:
    """A progress bar that is gone when the source is done; nothing where the console is no terminal."""

    def __init__(self, console: Console, source: Source):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(source.name, note="", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: BuildProgress) -> None:
        note = f"{done.documents:,} documents, {done.tokens:,} tokens"
        self._progress.update(self._task, completed=done.bytes_read, total=done.bytes_total, note=note)


def _summary(source: Source, manifest: Manifest, folder: pathlib.Path, note: str) -> str:
    train, heldout = manifest.splits["train"], manifest.splits["heldout"]
    rejected = f", {sum(manifest.rejected.values()):,} rejected" if manifest.rejected else ""
    return (
        f"{source.name:24s} {train.tokens:>14,} tokens of {train.documents:,} documents, "
        f"{heldout.documents:,} held out{rejected}; {note}: {folder}"
    )
