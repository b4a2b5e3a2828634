"""The word tokenisers against spaCy itself, and what the recipe says of them."""

import pathlib
import random
import re
import socket

import pytest
import spacy

import davinci_jax
from davinci_jax.curation import words
from davinci_jax.curation.words import TOKENISERS, WordTokeniser, word_tokeniser
from davinci_jax.errors import ConfigError

ROOT = pathlib.Path(davinci_jax.__file__).parents[1]
TEXTS = [path.read_text() for path in [*sorted((ROOT / "docs").glob("*.md"))[:6], ROOT / "README.md"]]
TRICKY = [
    "Don't! won't, can't... I'm; you're he'd've y'all's O'Neil's U.S.A. e.g. i.e. etc., a.m. 10km 5°C 3.14 $5 US$10 9%",
    "https://example.com/a?b=c,d (see www.x.org). mail me@x.org; C++ foo_bar(x)[1] --flag=value a/b and/or well-known",
    ":) :-( xD :P ;) <3 </3 ... … “quoted” ‘single’ «french» 中文。日本語 ünïcödé naïve’s rock'n'roll 'tis 'em gonna",
    "tab\tand\nnewline  two spaces   three\u00a0nbsp \u2003em - – — -- --- a--b 1-2 1+1=2 x^2 a*b ~home #tag @user",
    "I.B.M. Mr. Smith's Ph.D. A. B. C. end.Next word.Word 12:30pm 9:00a.m. 8) ( ) [ ] {a:b} \"x\" `code` 'q'",
]


def spacys(text):
    return [token.text for token in spacy.blank("en").tokenizer(text) if not token.is_space]


@pytest.mark.slow
@pytest.mark.parametrize("text", [*TRICKY, "", " ", "\n\n"])
def test_chunks_are_split_as_spacy_splits_the_whole_text(text):
    assert word_tokeniser("spacy-chunks").words(text) == spacys(text) == word_tokeniser("spacy").words(text)


def test_real_text_has_the_words_of_spacy():
    chunked, whole = word_tokeniser("spacy-chunks"), spacy.blank("en").tokenizer
    for text in TEXTS:
        assert chunked.words(text) == [token.text for token in whole(text) if not token.is_space]


@pytest.mark.slow
def test_random_marks_and_letters_have_the_words_of_spacy():
    generator = random.Random(5)
    alphabet = "ab1A9):(-=8DPo][:;)).pm.,;:!?()[]{}'\"’-–—_/$%#*&<>=+~…°²kmsdont'SU£§ét中ё"
    whole, split = spacy.blank("en").tokenizer, words.SpacyChunks()
    for _ in range(6000):
        chunk = "".join(generator.choice(alphabet) for _ in range(generator.randint(1, 9)))
        assert split(chunk) == [token.text for token in whole(chunk)], chunk


def test_the_name_of_the_symbol_that_breaks_spacy_is_left_out():
    for name in ("spacy", "spacy-chunks"):
        assert word_tokeniser(name).words("a IS_ALPHA b (IS_ALPHA)") == ["a", "b", "(", ")"]


def test_sentences_are_counted_as_spacy_counts_them():
    pipeline = spacy.blank("en")
    pipeline.add_pipe("sentencizer")
    lines = [line.strip() for text in [*TEXTS[:3], *TRICKY] for line in text.splitlines() if line.strip()]
    lines += ["One. Two! Three?", "One.  ) two", 'He said "no." Then', "a . . . b", "dots... and more. (paren.) x"]
    for name in ("spacy", "spacy-chunks"):
        counted = word_tokeniser(name).count_sentences
        assert [counted(line) for line in lines] == [len(list(pipeline(line).sents)) for line in lines]


def test_the_tokeniser_needs_no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a word tokeniser must not reach for the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    words._spacy.cache_clear()
    try:
        assert WordTokeniser("spacy-chunks").words("It isn't far.") == ["It", "is", "n't", "far", "."]
    finally:
        words._spacy.cache_clear()


def test_a_name_that_is_none_and_the_version_that_the_recipe_keeps():
    with pytest.raises(ConfigError, match="spacy"):
        word_tokeniser("spacey")
    assert re.fullmatch(r"spacy-chunks \d+\.\d+\S*", words.tokeniser_version("spacy-chunks"))


def test_memory_that_is_full_is_emptied_and_changes_no_word(monkeypatch):
    small = WordTokeniser("spacy-chunks")
    expected = [small.words(text) for text in TRICKY]
    monkeypatch.setattr(words, "REMEMBERED", 10)
    small = WordTokeniser("spacy-chunks")
    assert [small.words(text) for text in TRICKY] == expected
    assert len(small.vocabulary) < 60  # what one text brings, not five


def by_hand(word):
    code = 0
    for character in word:
        code = (code * words.BASE + ord(character) + 1) % 2**64
    return code


def test_columns_of_the_vocabulary():
    tokeniser = WordTokeniser("blanks")
    ids = tokeniser.ids("ab c ... 12 é!")
    table = tokeniser.vocabulary
    assert table.length[ids].tolist() == [2, 1, 3, 2, 2]
    assert table.is_symbol[ids].tolist() == [False, False, True, False, False]
    assert table.has_letter[ids].tolist() == [True, True, False, False, True]
    joined = table.code[ids[:1]] * table.power[ids[1:2]] + table.code[ids[1:2]]
    assert joined == by_hand("abc")
    assert table.code[ids].tolist() == [by_hand(word) for word in ("ab", "c", "...", "12", "é!")]


def test_a_vocabulary_that_grows_keeps_its_rows():
    tokeniser = WordTokeniser("blanks")
    text = " ".join(f"w{n}" for n in range(10_000))
    assert tokeniser.words(text) == text.split()
    ids = tokeniser.ids(text)
    assert tokeniser.vocabulary.length[ids].tolist() == [len(word) for word in text.split()]


def test_a_text_has_at_least_as_many_words_as_stretches_between_blanks():
    texts = [*TRICKY, "", "one two\n\nthree\u00a0four", "IS_ALPHA", "a IS_ALPHA b", "\x1c x \u2028y", "I 'm a. m."]
    for name in TOKENISERS:
        tokeniser = word_tokeniser(name)
        assert all(tokeniser.least_words(text) <= len(tokeniser.ids(text)) for text in texts)
    assert word_tokeniser("spacy-chunks").least_words(texts[-5]) == 4
