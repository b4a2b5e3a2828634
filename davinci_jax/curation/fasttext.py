"""L3: supervised fastText models from a file, by the one backend that the extra `curation` installs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import mmap
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from davinci_jax.curation.versions import INSTALL
from davinci_jax.errors import DataError
from davinci_jax.files import version

SUFFIXES = (".bin", ".ftz")
_PREFIX = "__label__"
_MAGIC, _SUPERVISED = 793712314, 3


@dataclasses.dataclass(frozen=True)
class FastTextClassifier:
    """A fastText model (Joulin et al. 2016, arXiv 1607.01759) in the form of `classifier.TextClassifier`.

    Attributes:
      classes: its labels without "__label__", in alphabetical order.
      sha256: of its file.
    """

    classes: tuple[str, ...]
    sha256: str
    _model: Any = dataclasses.field(repr=False, compare=False)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Returns float64 [N, C]: what the model says of each text, read as one line."""
        places = {name: n for n, name in enumerate(self.classes)}
        out = np.zeros((len(texts), len(self.classes)))
        for row, text in zip(out, texts, strict=True):
            line = " ".join(text.split()).encode("utf-8", "replace").decode()
            for probability, label in self._model.predict(line + "\n", len(places), 0.0, "strict"):
                row[places[label.removeprefix(_PREFIX)]] = min(probability, 1.0)
        return out


def load(path: str) -> FastTextClassifier:
    """Returns the model of a .bin or .ftz file.

    Raises:
      DataError: the file is missing or no supervised model, or no backend is installed.
    """
    return _load(path, version(pathlib.Path(path)))


@functools.lru_cache(maxsize=4)
def _load(path: str, _: tuple[str, int, int]) -> FastTextClassifier:
    file = pathlib.Path(path)
    try:
        import fasttext
    except ImportError as error:
        raise DataError("model", path, "needs a fastText backend", f"{INSTALL}, which brings one") from error
    if not file.is_file():
        raise DataError("model", path, "does not exist", "give the path of a .bin or .ftz file")
    try:
        classes = _read_classes(file)
        model = fasttext.load_model(str(file)).f
    except Exception as error:  # the backend throws what its C++ throws
        raise DataError("model", path, f"is no supervised fastText model ({error})", "give another file") from error
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return FastTextClassifier(tuple(sorted(classes)), digest, model)


def _read_classes(file: pathlib.Path) -> list[str]:
    """Returns the labels in the dictionary of a model file; the backend names none that it gives no probability.

    The file begins with magic number and version, twelve int32 arguments and a double, then the dictionary: int32
    entries, words, labels, int64 tokens, pruned, and the entries, each a text that ends in 0, int64 count, int8 kind.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        magic, _version, *arguments = struct.unpack_from("<14i", content, 0)
        if magic != _MAGIC or arguments[7] != _SUPERVISED:
            raise ValueError("its head is another")
        place = struct.calcsize("<14id")
        entries = struct.unpack_from("<i", content, place)[0]
        place += struct.calcsize("<iiiqq")
        classes = []
        for _ in range(entries):
            end = content.find(b"\0", place)
            if content[end + 9] == 1:
                classes.append(content[place:end].decode("utf-8", "replace").removeprefix(_PREFIX))
            place = end + 10
        return classes
