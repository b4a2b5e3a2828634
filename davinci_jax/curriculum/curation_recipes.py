"""What the shipped recipes of curation (configs/curate_*.py) share: rows of table 2, steps, and the files they need.

A threshold with a source stands as its source has it; one without is called an assumption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from davinci_jax.curriculum.recipe import POOL
from davinci_jax.experiment.curation import CuratedSource, Input, Step

# FineWeb (Penedo et al. 2024, section 3.3) keeps English from this probability on; Data Darwinism prints none.
ENGLISH = Step("keep-languages", languages=("en",), probability=0.65)
EXACT_DUPLICATES = Step("exact-duplicates")
# Data Darwinism (arXiv 2602.07824), with datatrove: 14 bands of 8 hashes over 5 words. Documents that differ in
# numbers only are different ones in science and code, as MegaMath has it.
NEAR_DUPLICATES = Step("near-duplicates", bands=14, rows=8, shingle=5, normalise_numbers=False)
PERSONAL_DATA = Step("replace-personal-data")


@dataclasses.dataclass(frozen=True)
class Files:
    """The folder of a recipe: what its user puts there, and where results go.

    Attributes:
      folder: relative to the folder that the command runs in.
    """

    folder: str

    def raw(self, kind: str, name: str, ending: str = "", **options: Any) -> Input:
        """An input in the folder or file of its name; ids begin with the name, wherever an override finds it."""
        return Input(kind=kind, name=name, path=f"{self.folder}/raw/{name}{ending}", options=options)

    def model(self, name: str) -> str:
        """The folder of a classifier that `davinci_jax.curation.classifier.train` wrote."""
        return f"{self.folder}/models/{name}"

    def documents(self, source: str) -> Input:
        """The newest documents of a source that was curated into this folder."""
        return Input(kind="documents", path=f"{self.folder}/curated/{source}/current/documents", name=source)

    def educational_value(self, threshold: float = 3.0) -> Step:
        """Keeps documents of a grade, 3 of 5 as in FineWeb-Edu (Penedo et al. 2024); elsewhere it is an assumption."""
        return Step("educational-value", model=self.model("educational-value"), threshold=threshold)

    def decontaminate(self) -> Step:
        """Drops documents that share 20 words in a row with a benchmark, as Data Darwinism; reports 13 besides.

        The report looks for GSM8K, MATH and MMLU, problem and solution joined: what a record has, in its order.
        """
        return Step("decontaminate", benchmarks=(f"{self.folder}/benchmarks",), ngram=20, report_ngram=13)


def table_2(row: str, *, name: str, inputs: Sequence[Input], recipe: Sequence[Step], note: str = "") -> CuratedSource:
    """Returns a source that has domain, level and stages of a row of the report's table 2.

    Args:
      row: name of the row in `davinci_jax.curriculum.recipe.POOL`.
      name: of the source.
      inputs: its raw documents.
      recipe: its operations.
      note: what its card says besides the row.
    """
    published = next(source for source in POOL if source.name == row)
    return CuratedSource(
        name=name,
        domain=published.domain,
        level=published.level,
        inputs=tuple(inputs),
        recipe=tuple(recipe),
        stages=published.stages,
        note=f"Domain, level and stages of {row} in table 2.{' ' if note else ''}{note}",
    )
