"""L3: small models that select documents and never edit them; what they say is noted in the metadata."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from davinci_jax.curation import classifier, fasttext
from davinci_jax.curation.classifier import TextClassifier
from davinci_jax.curation.documents import Document
from davinci_jax.curation.fasttext import FastTextClassifier
from davinci_jax.curation.metrics import numeric
from davinci_jax.curation.pipeline import Reject
from davinci_jax.errors import ConfigError, nearest
from davinci_jax.experiment import checks


def load_model(path: str) -> TextClassifier | FastTextClassifier:
    """Returns the classifier of a path: a fastText file by its suffix, else a folder that `classifier.train` wrote."""
    return fasttext.load(path) if path.endswith(fasttext.SUFFIXES) else classifier.load(path)


@dataclasses.dataclass(frozen=True)
class _Judge(abc.ABC):
    """An operation that asks a classifier about each document.

    Attributes:
      model: folder of a classifier of this project, or a fastText file.
    """

    model: str
    level = "L3"
    batch = 256

    def parameters(self) -> dict[str, Any]:
        # The model is what it holds, wherever it lies.
        return {**dataclasses.asdict(self), "model": load_model(self.model).sha256}

    def begin(self) -> None:
        load_model(self.model)

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        documents = list(documents)
        probabilities = load_model(self.model).probabilities([document.text for document in documents])
        for document, row in zip(documents, probabilities, strict=True):
            noted, why = self.judge(row)
            document = dataclasses.replace(document, metadata={**document.metadata, **noted})
            if why is None:
                yield document
            else:
                reject(document, why)

    @abc.abstractmethod
    def judge(self, probabilities: np.ndarray) -> tuple[Mapping[str, Any], str | None]:
        """Returns (what is noted of a document, why it is dropped or `None`) from float [C]."""


@dataclasses.dataclass(frozen=True)
class EducationalValue(_Judge):
    """Keeps documents whose expected grade is `threshold` or more; the classes of the model are numbers.

    Attributes:
      threshold: the least grade; the card of the model shows precision and recall of each.
    """

    threshold: float = 3.0
    name = "educational-value"

    def judge(self, probabilities: np.ndarray) -> tuple[Mapping[str, Any], str | None]:
        values = numeric(load_model(self.model).classes)
        if values is None:
            classes = load_model(self.model).classes
            raise ConfigError(f"{self.name}.model", self.model, f"tells {classes}, which are no grades", "name another")
        grade = round(float(probabilities @ values), 4)
        why = None if grade >= self.threshold else f"educational value {grade:.2f}, below {self.threshold:g}"
        return {"educational_value": grade}, why


@dataclasses.dataclass(frozen=True)
class _Sort(_Judge):
    """Notes the most likely class of a document and keeps or drops by it.

    Attributes:
      keep: the classes that stay; none named: all.
      drop: the classes that go.
      probability: of the class, at least; a document below is dropped where classes are named to keep, and stays
        where they are named to drop.
    """

    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    probability: float = 0.0
    field = ""

    def __post_init__(self):
        checks.within(self.name, 0, 1, probability=self.probability)
        if self.keep and self.drop:
            raise ConfigError(f"{self.name}.drop", self.drop, "is given beside `keep`", "give one of them")
        known = load_model(self.model).classes
        for name in (*self.keep, *self.drop):
            if name not in known:
                raise ConfigError(f"{self.name}", name, "is no class of the model", nearest(name, known))

    def judge(self, probabilities: np.ndarray) -> tuple[Mapping[str, Any], str | None]:
        best = int(probabilities.argmax())
        label, probability = load_model(self.model).classes[best], round(float(probabilities[best]), 4)
        noted = {self.field: label, f"{self.field}_probability": probability}
        sure = probability >= self.probability
        if (self.keep and not (label in self.keep and sure)) or (label in self.drop and sure):
            return noted, f"{self.name} {label} with probability {probability:.2f}"
        return noted, None


@dataclasses.dataclass(frozen=True)
class Domain(_Sort):
    """Selects documents by their field of knowledge."""

    name, field = "domain", "domain"


@dataclasses.dataclass(frozen=True)
class DocumentType(_Sort):
    """Selects documents by what they are, such as course text, paper, forum or advertisement."""

    name, field = "document-type", "document_type"
