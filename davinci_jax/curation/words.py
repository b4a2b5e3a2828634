"""Words: the tokenisers that word rules count by, named with their version in a recipe.

Gopher, C4 and FineWeb rules decide by words, so a decision is only as well defined as the tokeniser. "spacy" is
the English tokeniser of a blank spaCy pipeline, which the published filters run on; it needs no model and no
download. "spacy-chunks" applies the same rules to one stretch between blanks at a time and remembers the result:
spaCy itself first splits at blanks, so the words are the same unless one of its exceptions reaches across a blank.
"blanks" splits at blanks and nothing else.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from davinci_jax.curation.versions import INSTALL
from davinci_jax.errors import ConfigError, nearest

TOKENISERS = ("spacy", "spacy-chunks", "blanks")
# Chunks or words that are remembered; beyond that the memory starts empty again, which changes speed and no result.
REMEMBERED = 1 << 19
# Odd, so that multiplying by it loses nothing modulo 2^64 (the 64-bit golden ratio).
BASE = 0x9E3779B97F4A7C15
_COLUMNS = ("length", "code", "power", "is_symbol", "has_letter")
# Suffixes of one character that end no longer one; apostrophes; digits of any script.
_MARKS, _APOSTROPHES = frozenset(',;:!?()[]{}<>_#*&"`'), frozenset("'’")
_DIGIT, _INFIX_START = re.compile(r"\d").search, re.compile(r"[.,+\-*^~:<>=/]").search
# The name of its symbol number 1 in a text makes spaCy raise, now and then; datatrove leaves it out when it does.
_BREAKS_SPACY = "IS_ALPHA"
_TAIL = 48  # characters; spaCy's suffixes and what they look back at have fewer than 20
# Characters between blanks beyond which a stretch is one word: data, which spaCy would take hours to cut.
LONGEST = 50_000
# A bracket or quote, ASCII letters, a mark: what half of all different chunks are.
_PLAIN = re.compile(r"([(\[\"']?)([A-Za-z]+)([.,;:!?)\]\"']?)").fullmatch
_WORD, _PUNCTUATION, _TERMINAL = range(3)


class Vocabulary:
    """Words as numbers, with what the rules ask of each; rows are appended and never change.

    Attributes:
      words: the words.
      length: int64 [>= v], characters.
      code: uint64 [>= v], polynomial hash of the characters modulo 2^64.
      power: uint64 [>= v], the base of the hash to the power of `length`: `code[a] * power[b] + code[b]` is the hash
        of the characters of two words side by side.
      is_symbol: bool [>= v], whether every character is punctuation as datatrove lists it.
      has_letter: bool [>= v], whether a character is alphabetic.
    """

    def __init__(self):
        self.words: list[str] = []
        self._rows: dict[str, int] = {}
        self._described = 0
        self.length = np.zeros(4096, np.int64)
        self.code, self.power = np.zeros(4096, np.uint64), np.zeros(4096, np.uint64)
        self.is_symbol, self.has_letter = np.zeros(4096, bool), np.zeros(4096, bool)

    def __len__(self) -> int:
        return len(self.words)

    def find(self, word: str) -> int | None:
        """Returns the number of a word, `None` if it has not been met."""
        return self._rows.get(word)

    def add(self, word: str) -> int:
        """Returns the number of a word; its columns are filled by the next call of `describe`."""
        row = self._rows.setdefault(word, len(self.words))
        if row == len(self.words):
            self.words.append(word)
        return row

    def describe(self) -> None:
        """Fills the columns of the words that are new since the last call."""
        first, last = self._described, len(self.words)
        if first == last:
            return
        while last > len(self.length):
            for name in _COLUMNS:
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros_like(getattr(self, name))]))
        new, rows = self.words[first:], slice(first, last)
        self.length[rows] = list(map(len, new))
        self.code[rows], self.power[rows] = polynomials(new, self.length[rows])
        symbols = symbol_characters()
        for row, word in enumerate(new, first):
            if word.isalpha():
                self.has_letter[row] = True
            else:
                self.has_letter[row] = any(map(str.isalpha, word))
                self.is_symbol[row] = symbols.issuperset(word)
        self._described = last


class WordTokeniser:
    """Text to numbers of words. Get one from `word_tokeniser`, so that what was learnt about a word is shared.

    Attributes:
      name: one of `TOKENISERS`.
      vocabulary: the words met so far.
    """

    def __init__(self, name: str):
        self.name = name
        self._split = str.split if name == "blanks" else SpacyChunks()
        self._forget()

    def _forget(self) -> None:
        self.vocabulary = Vocabulary()
        self._chunks = _Chunks(self.vocabulary, self._split)
        self._marks: dict[int, int] = {}
        self._last = ("", np.zeros(0, np.int64))

    def ids(self, text: str) -> np.ndarray:
        """Returns int64 [n], the words of a text as rows of `vocabulary`; blanks are no words.

        The last text is remembered, since the rules of a recipe ask for the same one after another. Rows are good
        until the next call.
        """
        if text is self._last[0]:
            return self._last[1]
        if max(len(self._chunks), len(self.vocabulary)) > REMEMBERED:
            self._forget()
        if self.name == "spacy":
            ids = np.array([self.vocabulary.add(word) for word in spacy_tokens(text) if not word.isspace()], np.int64)
        else:
            ids = np.fromiter(self._rows(text.split()), np.int64)
        self.vocabulary.describe()
        self._last = (text, ids)
        return ids

    def least_words(self, text: str) -> int:
        """Returns a number of words that a text has at least, without telling them apart."""
        # An exception of spaCy may reach across a blank; a stretch with this name may be no word.
        return 0 if self.name == "spacy" or _BREAKS_SPACY in text else len(text.split())

    def words(self, text: str) -> list[str]:
        """Returns the words of a text."""
        return [self.vocabulary.words[row] for row in self.ids(text)]

    def count_sentences(self, line: str) -> int:
        """Returns the sentences of a line as spaCy's sentence splitter counts them, at least one.

        A new sentence begins where a word that is no punctuation follows a final mark.
        """
        first = _terminals().search(line)
        if first is None or first.start() == len(line) - 1:
            return 1
        if self.name == "blanks":
            return _count(map(_mark, line.split()))
        chunks = line.split()
        # Blanks other than one space between words are words to spaCy, and begin a sentence.
        if self.name == "spacy" or " ".join(chunks) != line:
            return _count(map(_mark, spacy_tokens(line)))
        return _count(self._mark(row) for row in self._rows(chunks))

    def _mark(self, row: int) -> int:
        known = self._marks.get(row)
        if known is None:
            known = self._marks[row] = _mark(self.vocabulary.words[row])
        return known

    def _rows(self, chunks: list[str]) -> itertools.chain[int]:
        return itertools.chain.from_iterable(map(self._chunks.__getitem__, chunks))


class _Chunks(dict):
    """Chunk -> rows of its words, found out when it is first asked for."""

    def __init__(self, vocabulary: Vocabulary, split: Callable[[str], list[str]]):
        super().__init__()
        self._vocabulary, self._split = vocabulary, split

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        rows = self[chunk] = tuple(map(self._vocabulary.add, self._split(chunk)))
        return rows


def word_tokeniser(name: str) -> WordTokeniser:
    """Returns the tokeniser of a name, one for the process; raises `ConfigError` for an unknown one."""
    if name not in TOKENISERS:
        raise ConfigError("tokeniser", name, "is no word tokeniser", nearest(name, TOKENISERS))
    return _shared(name)


def tokeniser_version(name: str) -> str:
    """Returns a tokeniser's name with the version of its rules, such as "spacy-chunks 3.8.7"."""
    if name == "blanks":
        return "blanks 1"
    try:
        return f"{name} {importlib.metadata.version('spacy')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError("tokeniser", name, "needs the package spacy", f"{INSTALL}; or use 'blanks'") from error


def polynomials(words: Sequence[str], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hash of the characters of each word and the base to the power of its length, uint64 [n] each.

    The hash is the sum of (c + 1) BASE^i modulo 2^64 over the characters c, the last of which has i = 0. No word may
    be empty.
    """
    points = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    ends = np.cumsum(lengths)
    powers = np.full(int(lengths.max()) + 1, BASE, np.uint64)
    powers[0] = 1
    powers = np.multiply.accumulate(powers)
    exponents = np.repeat(ends, lengths) - 1 - np.arange(len(points))
    return np.add.reduceat((points + np.uint64(1)) * powers[exponents], ends - lengths), powers[lengths]


def spacy_tokens(text: str) -> list[str]:
    """Returns the tokens of spaCy's English tokeniser, stretches of blanks among them."""
    pipeline = _spacy()
    with pipeline.memory_zone():
        return [token.text for token in pipeline.tokenizer(text.replace(_BREAKS_SPACY, ""))]


class SpacyChunks:
    """The words of a text without blanks by spaCy's English rules, in Python and with less searching.

    The algorithm is the one that spaCy's documentation describes: cut prefixes and suffixes off until an exception,
    or nothing more, is left; keep that if it is an exception or an address; else cut it at its infixes. At last,
    pieces side by side that spell an exception with an affix in it become that, longer ones first. Rules and
    exceptions are spaCy's own.
    """

    def __init__(self):
        tokenizer = _spacy().tokenizer
        self._exceptions = {text: spacy_tokens(text) for text in tokenizer.rules}
        self._prefix, self._suffix = tokenizer.prefix_search, tokenizer.suffix_search
        self._infix: re.Pattern[str] = tokenizer.infix_finditer.__self__
        self._is_address = tokenizer.url_match
        # Exceptions with an affix, as the words that they would be if they were none, and how many by the first one.
        exceptions, self._exceptions = self._exceptions, {}
        self._spelt = {tuple(self._by_rules(text)) for text in exceptions if self._has_affix(text)}
        self._exceptions = exceptions
        self._counts: dict[str, set[int]] = {}
        for words in filter(None, self._spelt):
            self._counts.setdefault(words[0], set()).add(len(words))

    def __call__(self, chunk: str) -> list[str]:
        exceptions = self._exceptions
        if chunk in exceptions:
            return exceptions[chunk]
        plain = _PLAIN(chunk)
        if plain is not None:
            before, word, after = plain.groups()
            # A full stop leaves a small letter or two capitals; after one capital it is an initial.
            initial = after == "." and not (word[-1] >= "a" or word[-2:-1].isupper())
            if not initial and exceptions.keys().isdisjoint((word, before + word, word + after)):
                return [part for part in (before, word, after) if part]
        if len(chunk) > LONGEST:
            return [chunk]
        if _BREAKS_SPACY in chunk:
            return spacy_tokens(chunk)
        return self._join_exceptions(self._by_rules(chunk))

    def _by_rules(self, chunk: str) -> list[str]:
        """Returns the words of a chunk in which no exception appears among the pieces."""
        exceptions = self._exceptions
        prefixes, rest, suffixes = self._affixes(chunk)
        words = prefixes
        if rest in exceptions:
            words += exceptions[rest]
        elif not rest or (rest.isascii() and rest.isalnum()):
            words += [rest] if rest else []
        else:
            words += [rest] if self._is_address(rest) else self._cut(rest)
        words += reversed(suffixes)
        return words

    def _has_affix(self, text: str) -> bool:
        return any(search(text) is not None for search in (self._prefix, self._suffix, self._infix.search))

    def _affixes(self, text: str) -> tuple[list[str], str, list[str]]:
        """Returns prefixes from the outside in, what is left, and suffixes from the outside in."""
        prefixes, suffixes, exceptions = [], [], self._exceptions
        length = -1
        while text and len(text) != length and text not in exceptions:
            length = len(text)
            found = self._prefix(text)
            before = found.end() if found else 0
            if before and text[before:] in exceptions:
                prefixes.append(text[:before])
                return prefixes, text[before:], suffixes
            after = self._suffix_length(text[before:])
            if after and text[:-after] in exceptions:
                suffixes.append(text[-after:])
                return prefixes, text[:-after], suffixes
            if before and after and before + after <= len(text):
                prefixes.append(text[:before])
                suffixes.append(text[-after:])
                text = text[before:-after]
            elif before:
                prefixes.append(text[:before])
                text = text[before:]
            elif after:
                suffixes.append(text[-after:])
                text = text[:-after]
        return prefixes, text, suffixes

    def _suffix_length(self, text: str) -> int:
        last = text[-1:]
        if last in _MARKS:
            return len(last)
        # A unit or a currency follows a digit, "'s" an apostrophe; no other suffix ends in a letter or digit.
        if last.isascii() and last.isalnum() and text[-2:-1] not in _APOSTROPHES and not _DIGIT(text):
            return 0
        # The end decides: no suffix is longer, but for a row of full stops.
        found = self._suffix(text if text[-_TAIL:].strip(".") == "" else text[-_TAIL:])
        return found.end() - found.start() if found else 0

    def _cut(self, text: str) -> list[str]:
        """Returns the pieces between the infixes of a text, and the infixes."""
        pieces, start = [], 0
        for first, end in self._infixes(text):
            if first == 0:  # what stands first separates nothing
                continue
            if first != start:
                pieces.append(text[start:first])
            if first != end:
                pieces.append(text[first:end])
            start = end
        if start < len(text):
            pieces.append(text[start:])
        return pieces

    def _infixes(self, text: str) -> Iterator[tuple[int, int]]:
        """Yields [start, end) of the infixes; in ASCII text only at characters that one can begin with."""
        if not text.isascii():
            for found in self._infix.finditer(text):
                yield found.span()
            return
        position = 0
        while (candidate := _INFIX_START(text, position)) is not None:
            found = self._infix.match(text, candidate.start())
            if found is not None:
                yield found.span()
            position = found.end() if found else candidate.end()

    def _join_exceptions(self, words: list[str]) -> list[str]:
        """Returns the words with those side by side that spell an exception in its place."""
        spans = [
            (first, first + count)
            for first, word in enumerate(words)
            for count in self._counts.get(word, ())
            if first + count <= len(words) and tuple(words[first : first + count]) in self._spelt
        ]
        if not spans:
            return words
        taken: set[int] = set()
        chosen: dict[int, int] = {}
        for first, end in sorted(spans, key=lambda span: (span[0] - span[1], span[0])):
            if first not in taken and end - 1 not in taken:
                chosen[first] = end
            taken.update(range(first, end))  # also by a span that is not chosen
        joined, at = [], 0
        while at < len(words):
            end = chosen.get(at)
            joined += [words[at]] if end is None else self._exceptions["".join(words[at:end])]
            at = at + 1 if end is None else end
        return joined


@functools.cache
def symbol_characters() -> frozenset[str]:
    """Returns the characters that datatrove counts as punctuation, those of other scripts among them."""
    from datatrove.utils.text import PUNCTUATION_SET

    return frozenset(PUNCTUATION_SET)


@functools.cache
def _shared(name: str) -> WordTokeniser:
    tokeniser_version(name)
    return WordTokeniser(name)


@functools.cache
def _spacy() -> Any:
    import spacy

    return spacy.blank("en")


@functools.cache
def _terminal_characters() -> frozenset[str]:
    from spacy.pipeline.sentencizer import Sentencizer

    return frozenset(Sentencizer.default_punct_chars)


@functools.cache
def _terminals() -> re.Pattern[str]:
    return re.compile(f"[{re.escape(''.join(sorted(_terminal_characters())))}]")


def _mark(word: str) -> int:
    if word in _terminal_characters():
        return _TERMINAL
    return _PUNCTUATION if all(unicodedata.category(character)[0] == "P" for character in word) else _WORD


def _count(marks: map) -> int:
    sentences, ended = 1, False
    for mark in marks:
        if mark == _TERMINAL:
            ended = True
        elif ended and mark == _WORD:
            sentences, ended = sentences + 1, False
    return sentences
