"""The fast encoder against `tokenizers`, which is written by others: the same ids, or it stands back."""

import json
import pathlib
import random
import sys
import unicodedata

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

import davinci_jax
from davinci_jax.data.fast_bpe import fast_encoder
from davinci_jax.data.tokenizer import HuggingFaceTokenizer
from davinci_jax.data.train_tokenizer import train

ROOT = pathlib.Path(davinci_jax.__file__).parents[1]
TEXTS = [
    path.read_text() for path in [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "davinci_jax").glob("*.py"))]
]


@pytest.fixture(scope="module")
def qwen2():
    return train(iter(TEXTS), 3000).to_str()


@pytest.fixture(scope="module")
def gpt2():
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(iter(TEXTS), 2000, show_progress=False, special_tokens=["<|endoftext|>"])
    return tokenizer._tokenizer.to_str()


def library(content):
    whole = tokenizers.Tokenizer.from_str(content)
    whole.encode_special_tokens = True  # the text of a special token is text
    return whole


def reference(content, text):
    return library(content).encode(text, add_special_tokens=False).ids


def same(content, text):
    encoder = fast_encoder(content.encode())
    return encoder.encode(text).tolist() == reference(content, text)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_real_text_has_the_same_ids(kind, request):
    content = request.getfixturevalue(kind)
    encoder, whole = fast_encoder(content.encode()), library(content)
    for text in TEXTS:
        assert encoder.encode(text).tolist() == whole.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def pairs(qwen2, gpt2):
    return [(fast_encoder(content.encode()), library(content)) for content in (qwen2, gpt2)]


@pytest.mark.slow
@hypothesis.given(st.text(max_size=60))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_text_has_the_same_ids(pairs, text):
    for encoder, whole in pairs:
        assert encoder.encode(text).tolist() == whole.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
@hypothesis.given(st.text(alphabet="aesdt'’SſK\u0301\u0327é ﬁÅ\u212b1٣\n\r\t\u00a0\u2028.,<|>_", max_size=80))
@hypothesis.settings(max_examples=500, deadline=None)
def test_accents_contractions_and_blanks_have_the_same_ids(pairs, text):
    for encoder, whole in pairs:
        assert encoder.encode(text).tolist() == whole.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
def test_characters_of_every_category_have_the_same_ids(pairs):
    """Every assigned character but for the large blocks of letters, private use and nothing, of which some."""
    rare = {"Lo": 12, "Co": 2000, "Cn": 2000, "Cs": 10**9}
    points = [n for n in range(sys.maxunicode + 1) if n % rare.get(unicodedata.category(chr(n)), 1) == 0]
    assert len(points) > 20_000
    texts = [f"a{c} {c}1{c}{c}'{c}.\n{c}" for c in map(chr, points) if not 0xD800 <= ord(c) < 0xE000]
    for encoder, whole in pairs:
        expected = [encoding.ids for encoding in whole.encode_batch_fast(texts, add_special_tokens=False)]
        assert [encoder.encode(text).tolist() for text in texts] == expected


def test_special_tokens_in_a_text_are_text(qwen2):
    tokenizer = HuggingFaceTokenizer(qwen2.encode())
    assert tokenizer._fast is not None
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")


@pytest.mark.slow
def test_what_the_library_cannot_split_goes_the_slow_way(qwen2):
    text = " " * 1_000_000
    tokenizer = HuggingFaceTokenizer(qwen2.encode())
    assert tokenizer._fast.encode(text) is None
    first, ids, last = tokenizer.encode_batch(["a b", text, "c"])
    assert tokenizer.decode(ids) == text
    assert (tokenizer.decode(first), tokenizer.decode(last)) == ("a b", "c")


def changed(content, **parts):
    tokenizer = json.loads(content)
    for path, value in parts.items():
        *outer, name = path.split("__")
        place = tokenizer
        for part in outer:
            place = place[part]
        place[name] = value
    return json.dumps(tokenizer).encode()


@pytest.mark.parametrize(
    "parts",
    [
        {"model__ignore_merges": True},
        {"model__dropout": 0.1},
        {"model__byte_fallback": True},
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
    ids=str,
)
def test_a_tokenizer_that_does_more_is_left_to_its_library(qwen2, parts):
    content = changed(qwen2, **parts)
    tokenizers.Tokenizer.from_str(content.decode())  # it is one that the library takes
    assert fast_encoder(content) is None


def test_an_added_token_that_is_not_special_is_left_to_its_library(qwen2):
    tokenizer = tokenizers.Tokenizer.from_str(qwen2)
    tokenizer.add_tokens(["def "])
    assert fast_encoder(tokenizer.to_str().encode()) is None


def test_merges_that_the_two_libraries_read_differently_are_found_out():
    """With merges (a b), (b c), (a bc): "abc" is ab + c, which tiktoken would go on to merge and the list does not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelt = [*alphabet, "ab", "bc", "abc"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({token: n for n, token in enumerate(spelt)}, [("a", "b"), ("b", "c"), ("a", "bc")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert len(tokenizer.encode("abc").ids) == 2
    assert fast_encoder(tokenizer.to_str().encode()) is None


def test_ids_need_not_follow_the_merges():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelt = ["abc", "ab", *alphabet, "d e", "de"]
    random.Random(1).shuffle(spelt)
    tokenizer = tokenizers.Tokenizer(
        models.BPE({t: n for n, t in enumerate(spelt)}, [("a", "b"), ("d", "e"), ("ab", "c")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC()
    for text in ("abcde abab cabc dedabc", "é e\u0301"):
        assert same(tokenizer.to_str(), text)


def test_without_the_library_nothing_is_fast(qwen2, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert fast_encoder(qwen2.encode()) is None
    assert HuggingFaceTokenizer(qwen2.encode()).encode("slow and sure").tolist() == reference(qwen2, "slow and sure")
