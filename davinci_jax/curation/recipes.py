"""Built-in recipes: text that every machine has, because Python, numpy and scipy are installed on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from davinci_jax.curation.documents import BUILTIN_SCHEME
from davinci_jax.curation.extract import TOPICS, DecodeUtf8, DocstringPages, DoctestPairs
from davinci_jax.curation.installation import STANDARD_LIBRARY, AcquireFiles, Package, find_package
from davinci_jax.curation.pipeline import Operation
from davinci_jax.curation.rules import DropDuplicates, DropGarbled, DropPaths, DropShort, DropUnparsable
from davinci_jax.errors import ConfigError, nearest

SCIENTIFIC = ("numpy", "scipy")

# Recipe -> packages it reads.
PACKAGES = {
    "source": (STANDARD_LIBRARY,),
    "docs": (STANDARD_LIBRARY,),
    "scientific-docs": SCIENTIFIC,
    "doctests": (STANDARD_LIBRARY, *SCIENTIFIC),
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


def build(recipe: str, pages: DocstringPages, find: Callable[[str], Package] = find_package) -> Sequence[Operation]:
    """Returns the operations of a recipe.

    Args:
      recipe: a key of `PACKAGES`.
      pages: shared between recipes, so that a file is parsed once.
      find: finds a package by name.
    """
    packages = tuple(find(name) for name in PACKAGES[recipe])
    # The topics of `pydoc` are prose in a file of source: they belong to the documentation.
    prose = (TOPICS,) if recipe == "source" else ()
    acquire = (AcquireFiles(packages), DropPaths(prose), DecodeUtf8(), DropGarbled())
    if recipe == "source":
        return (*acquire, DropUnparsable(), DropShort(100), DropDuplicates())
    if recipe == "doctests":
        return (*acquire, pages, DoctestPairs(), DropShort(60), DropDuplicates())
    return (*acquire, pages, DropShort(80), DropDuplicates())
