"""Built-in recipes: text that every machine has, because Python, numpy and scipy are installed on it."""

from __future__ import annotations

from davinci_jax.curation.documents import BUILTIN_SCHEME
from davinci_jax.curation.extract import TOPICS
from davinci_jax.curation.installation import STANDARD_LIBRARY
from davinci_jax.errors import ConfigError, nearest
from davinci_jax.experiment import Experiment, Source
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step

SCIENTIFIC = ("numpy", "scipy")

# Recipe -> packages it reads.
PACKAGES = {
    "source": (STANDARD_LIBRARY,),
    "docs": (STANDARD_LIBRARY,),
    "scientific-docs": SCIENTIFIC,
    "doctests": (STANDARD_LIBRARY, *SCIENTIFIC),
}
_DECODED = (Step("decode-utf8"), Step("drop-garbled"))
_PAGES = (Step("drop-paths"), *_DECODED, Step("docstring-pages"))
RECIPES = {
    "source": (
        # The topics of `pydoc` are prose in a file of source: they belong to the documentation.
        Step("drop-paths", paths=(TOPICS,)),
        *_DECODED,
        Step("drop-unparsable"),
        Step("drop-short", characters=100),
        Step("exact-duplicates"),
    ),
    "docs": (*_PAGES, Step("drop-short", characters=80), Step("exact-duplicates")),
    "scientific-docs": (*_PAGES, Step("drop-short", characters=80), Step("exact-duplicates")),
    "doctests": (*_PAGES, Step("doctest-pairs"), Step("drop-short", characters=60), Step("exact-duplicates")),
}


def recipe_name(documents: str) -> str:
    """Returns the recipe that `Source.documents` names, such as "docs" in "python-installation:docs".

    Raises:
      ConfigError: there is no such recipe.
    """
    name = documents.removeprefix(BUILTIN_SCHEME)
    if name not in PACKAGES:
        known = [BUILTIN_SCHEME + recipe for recipe in PACKAGES]
        raise ConfigError("data.sources.documents", documents, "is no built-in recipe", nearest(documents, known))
    return name


def builtin_sources(experiment: Experiment) -> CurationConfig | None:
    """Returns the curation of an experiment's sources whose `documents` name a built-in recipe, `None` without any."""
    data = experiment.data
    sources = tuple(_curated(item) for item in data.sources if (item.documents or "").startswith(BUILTIN_SCHEME))
    # Small tasks, so that two cores share the little that there is.
    return CurationConfig(root=data.root, sources=sources, task_bytes=8 * 2**20) if sources else None


def _curated(source: Source) -> CuratedSource:
    recipe = recipe_name(source.documents)
    return CuratedSource(
        name=source.name,
        domain=source.domain,
        level=source.level,
        inputs=tuple(Input(kind="python-installation", path=package) for package in PACKAGES[recipe]),
        recipe=RECIPES[recipe],
        stages=source.stages,
    )
