"""Gopher, C4 and FineWeb rules against datatrove's filters, which are written by others: decision, reason and text."""

import itertools
import pathlib
import random
import re

import hypothesis
import pytest
from datatrove.data import Document as Theirs
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from hypothesis import strategies as st

import davinci_jax
from davinci_jax.curation.c4 import C4Quality
from davinci_jax.curation.documents import Document
from davinci_jax.curation.fineweb import FineWebQuality
from davinci_jax.curation.gopher import GopherQuality, GopherRepetition, NGrams, split_lines, split_paragraphs
from davinci_jax.curation.words import WordTokeniser
from davinci_jax.errors import ConfigError

ROOT = pathlib.Path(davinci_jax.__file__).parents[1]
PROSE = (
    "The river was wide and slow, and the people of the town had lived with it for a very long time. Nobody could "
    "say when the first bridge was built. Some believed that it was older than the church; others disagreed! Was it "
    "not strange? In spring the water rose to the doors. They moved their chairs and tables to the upper floor. "
)
RULES = [
    (GopherRepetition, GopherRepetitionFilter),
    (GopherQuality, GopherQualityFilter),
    (C4Quality, C4QualityFilter),
    (FineWebQuality, FineWebQualityFilter),
]


def varied(count, seed=0):
    """Sentences of made-up words: prose that repeats nothing."""
    generator = random.Random(seed)
    words = [
        "".join(generator.choice("abcdefghilmnoprstuvw") for _ in range(generator.randint(2, 9))) for _ in range(900)
    ]
    words += ["the", "of", "and", "to", "that"] * 60
    lines = []
    for _ in range(count):
        sentence = " ".join(generator.choice(words) for _ in range(generator.randint(6, 16)))
        lines.append(sentence.capitalize() + generator.choice(".!?."))
    return lines


def crafted():
    """Texts that lie on either side of each rule, and at its edge."""
    lines = varied(40)
    yield from (
        "",
        " ",
        "\n",
        "x",
        "...",
        "a b",
        PROSE,
        PROSE * 3,
        "\n".join(lines),
        "\n\n".join(lines),
        " ".join(lines),
    )
    for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6):
        repeated = [*lines, *([lines[0]] * int(share * 60))]
        yield "\n".join(repeated)
        yield "\n\n".join(repeated)
        yield " ".join(repeated)
        yield " ".join([*lines, *(["very good indeed my friend"] * int(share * 100))])
        yield "\n".join([f"- {line}" if n < share * 40 * 2 else line for n, line in enumerate(lines)])
        yield "\n".join([f"{line[:-1]}..." if n < share * 40 else line for n, line in enumerate(lines)])
        yield "\n".join([*lines, "# heading #"] * int(share * 10))
        yield "\n".join([line[:20] if n < share * 50 else line for n, line in enumerate(lines)])
        yield "\n".join(line.rstrip(".!?") if n < share * 60 else line for n, line in enumerate(lines))
    yield "\n".join(f"{n} {n * 7919} + {n % 13} = {n * 3}." for n in range(200))
    yield "\n".join(
        [*lines, "We use cookies to make it better.", "Turn on JavaScript to go on.", "Cited here[3][edit]."]
    )
    yield "\n".join([*lines, "Lorem ipsum dolor sit amet."])
    yield "\n".join([*lines, "if (x) { return; } is code."])
    yield "\n".join([*lines, "x" * 1200 + " is a long word."])
    yield "The end is near.  ) And so on.\tTabs here. [12] And more [citation needed]. Final line." * 3
    for words in (1, 2, 3):  # newlines a word on either side of the bound
        yield "\n".join(" ".join([f"{'x' * 36}{n}"] * 1 + [f"y{n}"] * words) + "." for n in range(40))
    yield "\u2028".join(lines)
    yield "的。".join(["这是一个句子"] * 30)
    for n in (5, 6, 7, 8, 9, 10):
        phrase = " ".join(varied(3, seed=n)[0].split()[:n])
        yield " ".join(part for line in varied(40, seed=n) for part in (line, phrase if len(line) % 3 else ""))
    yield " ".join(["ab c", "a bc"] * 30)  # other words of the same characters


def real():
    files = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "davinci_jax").rglob("*.py"))[::12]]
    return [path.read_text() for path in files]


def ours(rule, text):
    why, out = [], []
    for document in rule.apply(iter([Document(id="d", text=text)]), lambda document, reason: why.append(reason)):
        out.append(document.text)
    return why[0].split(":")[0] if why else None, out[0] if out else None  # the numbers are ours alone


def theirs(filter_, text):
    document = Theirs(text=text, id="d")
    try:
        result = filter_.filter(document)
    except ZeroDivisionError:  # a text of nothing: no decision to compare with
        return None
    kept, reason = result if isinstance(result, tuple) else (result, None)
    return (None, document.text) if kept else (reason, None)


@pytest.mark.slow
@pytest.mark.parametrize("tokeniser", ["spacy-chunks", "spacy"])
@pytest.mark.parametrize(("rule", "filter_"), RULES, ids=lambda kind: kind.__name__)
def test_crafted_texts_are_decided_as_datatrove_decides_them(rule, filter_, tokeniser):
    reference, reasons = filter_(), set()
    rule = rule(tokeniser=tokeniser)
    for text in crafted():
        expected = theirs(reference, text)
        if expected is not None:
            assert ours(rule, text) == expected, text[:200]
            reasons.add(expected[0])
    assert len(reasons) >= 3  # the texts reach several rules of the filter, and some pass


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "filter_"), RULES, ids=lambda kind: kind.__name__)
def test_real_texts_are_decided_as_datatrove_decides_them(rule, filter_):
    reference = filter_()
    for text in real():
        assert ours(rule(), text) == theirs(reference, text)


def test_words_are_told_apart_only_where_blanks_leave_the_list_rule_open(monkeypatch):
    asked, ids = [], WordTokeniser.ids
    monkeypatch.setattr(WordTokeniser, "ids", lambda tokeniser, text: asked.append(text) or ids(tokeniser, text))
    reference = FineWebQualityFilter()
    # Stretches between blanks: enough for the lines, enough once marks are words of their own, too few.
    texts = {
        "prose": "\n".join(f"The line {n} has a number of words." for n in range(30)),
        "marks": "\n".join(f"well-known(ly), half-baked: sixty-four-{n}." for n in range(30)),
        "list": "\n".join(f"thisisanentryofalonglistofwords{n}." for n in range(30)),
    }
    found = {name: ours(FineWebQuality(), text) for name, text in texts.items()}
    assert found == {name: theirs(reference, text) for name, text in texts.items()}
    assert {name: reason for name, (reason, _) in found.items()} == {"prose": None, "marks": None, "list": "list_ratio"}
    assert asked == [texts["marks"], texts["list"]]


def test_thresholds_move_the_decision():
    text = "\n".join(varied(40))
    assert ours(GopherQuality(), text)[0] is None
    assert ours(GopherQuality(min_words=100_000), text)[0] == "gopher_short_doc"
    assert ours(GopherQuality(min_stop_words=6), text)[0] == "gopher_enough_stop_words"
    assert ours(FineWebQuality(min_final_marks=1.01), text)[0] == "line_punct_ratio"
    assert ours(C4Quality(min_sentences=41), text)[0] == "too_few_sentences"
    repeated = "\n".join([*varied(40), *[varied(1)[0]] * 5])
    assert ours(GopherRepetition(), repeated)[0] is None
    assert ours(GopherRepetition(duplicate_lines=0.05), repeated)[0] == "dup_line_frac"


def test_reasons_have_the_number_and_its_bound():
    def why(rule, text):
        reasons = []
        list(rule.apply(iter([Document(id="d", text=text)]), lambda document, reason: reasons.append(reason)))
        return reasons[0]

    text = "\n".join(varied(40))
    assert why(GopherQuality(), "word " * 40) == "gopher_short_doc: 40, below 50"
    assert (
        why(GopherQuality(max_word_length=3.5), " ".join(["four"] * 60)) == "gopher_above_avg_threshold: 4, above 3.5"
    )
    assert why(GopherRepetition(), "a line\na line\nanother") == "dup_line_frac: 0.3333, above 0.3"
    assert why(FineWebQuality(min_final_marks=1.01), text) == "line_punct_ratio: 1, below 1.01"
    assert why(C4Quality(min_sentences=1_000), text) == "too_few_sentences: 40, below 1000"


def test_brackets_may_stay_where_text_is_about_programs():
    text = "\n".join([*varied(6), "The set {a, b} is small."])
    assert ours(C4Quality(), text) == ("curly_bracket", None)
    assert ours(C4Quality(curly_brackets=False), text) == (None, text)


PIECES = st.sampled_from(
    ["It is {n} words long", " and {n} so on", "?\n", ".\n\n", ".  \r\n\t", "[3]", " [edit] ", "No mark {n} here\n",
     "Cookie policy {n} here.\n", "\n", "  "]
)  # fmt: skip


@hypothesis.given(st.lists(PIECES, max_size=12), st.lists(st.integers(0, 200), min_size=2, max_size=8))
def test_marks_stay_with_the_lines_that_they_mark(pieces, places):
    """Each word has a number of its own, so the words that a mark leads to tell whether it is right."""
    text = "".join(piece.format(n=f"n{n}n") for n, piece in enumerate(pieces))
    places = [min(place, len(text)) for place in places]
    spans = tuple((min(pair), max(pair)) for pair in itertools.pairwise(places) if len(set(pair)) == 2)
    parts = tuple((f"part{n}", *span) for n, span in enumerate(spans))
    rule = C4Quality(min_sentences=0, min_words=2)
    given = Document(id="d", text=text, questions=spans, parts=parts)
    plain = next(rule.apply(iter([Document(id="d", text=text)]), None))
    (made,) = rule.apply(iter([given]), None)
    assert made.text == plain.text
    moved = {name: made.text[start:end] for name, start, end in made.parts}
    assert [made.text[start:end] for start, end in made.questions] == list(moved.values())
    for n, (start, end) in enumerate(spans):
        left = set(re.findall(r"n\d+n", plain.text))
        marked = [number for number in re.findall(r"n\d+n", text[start:end]) if number in left]
        assert re.findall(r"n\d+n", moved.get(f"part{n}", "")) == marked


def test_a_question_stays_marked_where_lines_before_and_in_it_go():
    question = "What is it[2] for?\nMenu\nAnd who made it?\n"
    answers = "".join(f"This is answer number {n}.\n" for n in range(5))
    text = f"Home\nThis is the first line.\n{question}{answers}Home\n"
    at = text.index(question)
    given = Document(id="d", text=text, questions=((at, at + len(question)), (len(text) - 5, len(text))))
    (made,) = C4Quality().apply(iter([given]), None)
    assert [made.text[start:end] for start, end in made.questions] == ["What is it for?\nAnd who made it?\n"]


def test_lines_and_paragraphs_are_split_as_the_patterns_of_the_filter_split_them():
    for length in range(1, 9):
        for letters in itertools.product("a\n", repeat=length):
            text = "".join(letters)
            assert split_lines(text) == re.split("\n+", text)
            assert split_paragraphs(text.strip()) == re.split("\n{2,}", text.strip())


def brute_repeated(words, n):
    """Characters of n-grams that came before, reading on after each one that did."""
    seen, total, at = set(), 0, 0
    while at + n <= len(words):
        gram = "".join(words[at : at + n])
        if gram in seen:
            total, at = total + len(gram), at + n
        else:
            seen.add(gram)
            at += 1
    return total


def test_ngrams_are_counted_as_by_hand():
    generator = random.Random(3)
    for length in (0, 1, 4, 60, 300):
        words = [generator.choice(["a", "bc", "ab", "c", "dd"]) for _ in range(length)]
        tokeniser = WordTokeniser("blanks")
        ngrams = NGrams(tokeniser.ids(" ".join(words)), tokeniser.vocabulary)
        for n in (2, 3, 4):
            spaced = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
            counts = {gram: spaced.count(gram) for gram in spaced}
            top = max(counts.values(), default=0)
            first = next((gram for gram in spaced if counts[gram] == top), "")
            assert ngrams.top_characters(n, -1) == len(first) * top
            assert ngrams.repeated_characters(n, -1) == brute_repeated(words, n)
            assert ngrams.top_characters(n, 10**9) >= len(first) * top  # a bound may come instead, never a lower one
            assert ngrams.repeated_characters(n, 10**9) >= brute_repeated(words, n)


def test_the_tokeniser_is_a_parameter_with_its_version():
    for rule in (GopherRepetition, GopherQuality, C4Quality, FineWebQuality):
        assert rule(tokeniser="blanks").parameters()["tokeniser"] == "blanks 1"
        assert rule().parameters()["tokeniser"].startswith("spacy-chunks ")
        with pytest.raises(ConfigError, match="did you mean 'spacy'"):
            rule(tokeniser="spacyy")
