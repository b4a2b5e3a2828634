"""Sources of tokens and how rows are cut from them."""

from __future__ import annotations

import dataclasses

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks

LEVELS = tuple(f"L{n}" for n in range(10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One row of the data pool (the report's table 2).

    Attributes:
      name: unique name; also the folder of its shard set below `DataConfig.root`, unless `path` is given.
      domain: the category that a stage's mixture weighs: General, Code, Science, QA or any other.
      level: Darwin level, L0 to L9.
      tokens: size of the pool in tokens as declared for planning; shards, once there, replace it with their count.
      stages: names of the stages that may draw from it; `None` means every stage whose mixture names its domain.
      path: shard set, relative to `DataConfig.root` or absolute; `None` means `name`.
      documents: where `davinci shard` finds the documents: a JSONL file or folder (see docs/data.md) relative
        to `DataConfig.root` or absolute; `None` means `documents/<name>`. A built-in recipe, such as
        "python-installation:docs", is what `davinci curate` writes there.
      max_epochs: how often the run may go through it; more is refused with the arithmetic.
      weight: share inside its domain; `None` means in proportion to `tokens`. Given for all of a domain or none.
      loss: "all" trains on every token, "answers" masks the spans that documents mark as questions.
    """

    name: str
    domain: str
    level: str
    tokens: float
    stages: tuple[str, ...] | None = None
    path: str | None = None
    documents: str | None = None
    max_epochs: float = 1.0
    weight: float | None = None
    loss: str = "all"

    def __post_init__(self):
        checks.text("data.sources", name=self.name)
        section = f"data.sources[{self.name}]"
        checks.one_of(section, LEVELS, level=self.level)
        checks.one_of(section, ("all", "answers"), loss=self.loss)
        checks.positive(section, tokens=self.tokens, max_epochs=self.max_epochs, weight=self.weight)
        if not self.name or set("/=.") & set(self.name):
            raise ConfigError(
                f"{section}.name",
                self.name,
                "cannot be a folder and part of a dotted name",
                "use letters, digits, '-' and '_'",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from.

    Attributes:
      root: folder or prefix that holds the shard sets, the documents and the tokenizer.
      tokenizer: a `tokenizer.json` or a SentencePiece `.model`, relative to `root` or absolute.
      sources: the pool.
      sequence_length: tokens per row, L.
      packing: "concat" cuts a source's token stream every L tokens; "best_fit" puts whole documents together
        (Ding et al. 2024, arXiv 2404.10830), cutting only those longer than L.
      heldout: share of documents that `davinci shard` keeps out of every stage, for evaluation.
      workers: loader processes per host; 0 reads in threads of the training process.
      prefetch: global batches prepared ahead.
    """

    root: str
    sources: tuple[Source, ...]
    tokenizer: str = "tokenizer.json"
    sequence_length: int = 4096
    packing: str = "concat"
    heldout: float = 0.001
    workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        checks.positive("data", sequence_length=self.sequence_length, prefetch=self.prefetch)
        checks.within("data", 0, 0.5, heldout=self.heldout)
        checks.within("data", 0, 256, workers=self.workers)
        checks.one_of("data", ("concat", "best_fit"), packing=self.packing)
        checks.list_of(Source, "data.sources", self.sources)
        names = [source.name for source in self.sources]
        if not names:
            raise ConfigError("data.sources", (), "is empty", "name at least one source")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("data.sources", name, "is named twice", "give every source a name of its own")
        self._check_weights()

    def _check_weights(self):
        for domain in self.domains:
            given = [source.weight is not None for source in self.sources if source.domain == domain]
            if any(given) and not all(given):
                raise ConfigError(
                    "data.sources.weight", domain, "is given for some sources of the domain only", "give all or none"
                )

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order in which the pool first names them."""
        return tuple(dict.fromkeys(source.domain for source in self.sources))
