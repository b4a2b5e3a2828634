"""What curation does, as data: sources, where their raw documents lie, and the operations that each goes through."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks
from davinci_jax.experiment.data import LEVELS

EXECUTORS = ("local", "ray", "slurm")
_LONGEST_NAME = 200  # bytes of a source's name; a folder may have 255, and files beside it have longer names


@dataclasses.dataclass(frozen=True, init=False)
class Step:
    """One operation of a recipe: `Step("drop-short", characters=200)`.

    Attributes:
      operation: its name in the registry (`davinci_jax/curation/registry.py`).
      parameters: the fields of its dataclass that differ from their defaults.
    """

    operation: str
    parameters: Mapping[str, Any]

    def __init__(self, operation: str, parameters: Mapping[str, Any] | None = None, **more: Any):
        checks.text("step", operation=operation)
        checks.mapping(f"step.{operation}", parameters={} if parameters is None else parameters)
        object.__setattr__(self, "operation", operation)
        object.__setattr__(self, "parameters", {**(parameters or {}), **more})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """Raw documents of one kind in one place.

    Attributes:
      kind: how they are read, a name of the registry: "folder", "jsonl", "parquet", "warc", "html", "pdf", "git", ...
      path: a file or folder, relative to the folder that the command runs in, or an address that fsspec opens, such
        as "s3://bucket/folder"; for "python-installation" the name of a package.
      name: prefix of the ids of its documents, unique in the source; default: the last part of the path.
      licence: SPDX expression of documents that name none themselves.
      options: what the kind of input takes besides, such as `suffixes` of a folder or `text` of JSONL.
    """

    kind: str
    path: str
    name: str | None = None
    licence: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        given = {name: value for name in ("name", "licence") if (value := getattr(self, name)) is not None}
        checks.text("input", kind=self.kind, path=self.path, **given)
        checks.mapping("input", options=self.options)
        if not self.path.strip():
            raise ConfigError("input.path", self.path, "is empty", "name a file or folder; '.' is the working folder")

    @property
    def label(self) -> str:
        """The prefix of its documents' ids."""
        return self.name or self.path.rstrip("/").split("/")[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CuratedSource:
    """A source of the pool with the recipe that makes it: one row of the report's table 2.

    Attributes:
      name: unique name; the folder of its documents below `CurationConfig.root`.
      domain: the category that a stage's mixture weighs: General, Code, Science, QA or any other.
      level: Darwin level as published or declared; the report shows it beside the level that the recipe reaches.
      inputs: where the raw documents lie.
      recipe: the operations in order.
      stages: names of the training stages that draw from it; `None` means all.
      note: a sentence for its card, such as where the declared level comes from.
    """

    name: str
    domain: str
    level: str
    inputs: tuple[Input, ...]
    recipe: tuple[Step, ...]
    stages: tuple[str, ...] | None = None
    note: str = ""

    def __post_init__(self):
        checks.text("sources", name=self.name)
        section = f"sources[{self.name}]" if self.name.isprintable() else "sources"
        checks.text(section, domain=self.domain, level=self.level, note=self.note)
        checks.one_of(section, LEVELS, level=self.level)
        if problem := _unfit_name(self.name):
            raise ConfigError(f"{section}.name", self.name, problem, "use letters, digits, '-' and '_'")
        checks.list_of(Input, f"{section}.inputs", self.inputs)
        checks.list_of(Step, f"{section}.recipe", self.recipe)
        if not self.inputs:
            raise ConfigError(f"{section}.inputs", (), "is empty", "name at least one input")
        labels = [item.label for item in self.inputs]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(
                    f"{section}.inputs", label, "is the name of two inputs", "give each a `name` of its own"
                )


def _unfit_name(name: str) -> str:
    """Why a name is none of a source; "" where it is one."""
    if not name or set("/=.") & set(name) or not name.isprintable():
        return "cannot be a folder and part of a dotted name"
    return f"has more than {_LONGEST_NAME} bytes" if len(name.encode()) > _LONGEST_NAME else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """How tasks run on a Slurm cluster; a name of `sbatch` where there is one.

    Attributes:
      partition: partition of the jobs.
      time: bound on the time of a job.
      cpus_per_task: cores of a task.
      memory_per_cpu_gb: memory of a core in GB.
      qos: quality of service.
      setup: shell command that comes first, such as one that activates an environment.
      options: further options of `sbatch`.
    """

    partition: str
    time: str = "20:00:00"
    cpus_per_task: int = 1
    memory_per_cpu_gb: int = 2
    qos: str = "normal"
    setup: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Everything that `davinci curate` needs.

    Attributes:
      root: folder of the results; a source lies below `<root>/curated/<source>/`.
      sources: the sources, made one after the other.
      workers: tasks at a time; 0 means one for each core. The result does not depend on it.
      executor: "local" runs on this machine, "ray" on a Ray cluster, "slurm" hands jobs to Slurm.
      slurm: how jobs run on Slurm; needed for that executor only.
      task_bytes: the most bytes of input files that one task takes, as they lie on disk; a file is never cut in two.
      tokenizer: a tokenizer file with which the tokens of the funnel are counted; `None`: bytes / 4 is shown.
    """

    root: str
    sources: tuple[CuratedSource, ...]
    workers: int = 0
    executor: str = "local"
    slurm: Slurm | None = None
    task_bytes: int = 64 * 2**20
    tokenizer: str | None = None

    def __post_init__(self):
        checks.one_of("curation", EXECUTORS, executor=self.executor)
        checks.within("curation", 0, 2**20, workers=self.workers)
        checks.positive("curation", task_bytes=self.task_bytes)
        if self.executor == "slurm" and self.slurm is None:
            raise ConfigError("curation.slurm", None, "is not set", "name the partition: slurm=Slurm(partition=...)")
        checks.list_of(CuratedSource, "curation.sources", self.sources)
        names = [source.name for source in self.sources]
        if not names:
            raise ConfigError("curation.sources", (), "is empty", "name at least one source")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("curation.sources", name, "is named twice", "give every source a name of its own")
