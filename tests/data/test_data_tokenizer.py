"""Tokenizers of both kinds: round trips, bytes, spans, end of text, and damaged files."""

import io
import json
import pickle
import shutil
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from davinci_jax.data.tokenizer import load_tokenizer
from davinci_jax.data.train_tokenizer import train
from davinci_jax.errors import DataError

TEXTS = [
    "def area(radius):\n    return 3.14159 * radius ** 2  # naïve\n",
    "The quick brown fox doesn't jump over the lazy dog; it's 2024.\n\n",
    "数学はたのしい。 Ελληνικά, кириллица, العربية, emoji 🙂🙃\t\r\n",
] * 8


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE in the form of Qwen2's tokenizer.json, with an ordinary added token."""
    model = train(iter(TEXTS), 330)
    model.add_tokens(["<tool>"])
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    model.save(str(file))
    return file


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def piece(request, tmp_path_factory):
    """A SentencePiece model with byte fallback that leaves the text as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=400 if request.param == "bpe" else 340,
        model_type=request.param,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file


def bytes_of(tokenizer, text):
    return int(tokenizer.token_bytes()[tokenizer.encode(text)].sum())


TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_byte_level_bpe_keeps_every_byte(bpe, text):
    tokenizer = load_tokenizer(bpe)
    normal = unicodedata.normalize("NFC", text)
    assert bytes_of(tokenizer, text) == len(normal.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == normal


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0▁"), max_size=60))
def test_sentencepiece_keeps_every_byte(piece, text):
    tokenizer = load_tokenizer(piece)
    assert bytes_of(tokenizer, text) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(text=TEXT, other=TEXT)
def test_offsets_cover_the_text_in_order(bpe, text, other):
    tokenizer = load_tokenizer(bpe)
    text = unicodedata.normalize("NFC", text + "é 数 " + other)
    ids, spans = tokenizer.encode_with_offsets(text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    check_spans(tokenizer, text, ids, spans)


def test_sentencepiece_offsets(piece):
    tokenizer = load_tokenizer(piece)
    text = "The fox 🙂 naïve  数 end"
    ids, spans = tokenizer.encode_with_offsets(text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    check_spans(tokenizer, text, ids, spans)


def check_spans(tokenizer, text, ids, spans):
    """Spans cover the text without a gap; a token that is a whole piece of text decodes to its characters."""
    assert spans.shape == (len(ids), 2)
    covered = np.zeros(len(text), bool)
    for i, (start, end) in zip(ids, spans, strict=True):
        assert start < end
        covered[start:end] = True
        if tokenizer.token_bytes()[i] == len(text[start:end].encode()):
            assert tokenizer.decode([i]) == text[start:end]
    assert covered.all()
    assert (np.diff(spans[:, 0]) >= 0).all()


def test_offsets_of_text_that_is_normalised_point_into_the_text_as_given(bpe):
    tokenizer = load_tokenizer(bpe)
    text = "nai\u0308ve!"
    ids, spans = tokenizer.encode_with_offsets(text)
    assert spans[-1].tolist() == [6, 7]
    assert tokenizer.decode(ids) == "naïve!"


def test_a_document_that_spells_the_end_of_text_does_not_end(bpe):
    tokenizer = load_tokenizer(bpe)
    text = "a <|endoftext|> b"
    for ids in (tokenizer.encode(text), tokenizer.encode_with_offsets(text)[0]):
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == text
    assert bytes_of(tokenizer, text) == len(text)
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"
    assert tokenizer.token_bytes()[tokenizer.eos_id] == 0


def test_added_tokens_count(bpe):
    tokenizer = load_tokenizer(bpe)
    assert tokenizer.vocab_size == 331
    assert tokenizer.encode("<tool>").tolist() == [330]
    assert tokenizer.token_bytes()[330] == len("<tool>")
    assert tokenizer.token_bytes().dtype == np.int32
    assert tokenizer.token_bytes().shape == (331,)


def test_batch_equals_one_by_one(bpe, piece):
    for file in (bpe, piece):
        tokenizer = load_tokenizer(file)
        for text, ids in zip(TEXTS[:3], tokenizer.encode_batch(TEXTS[:3]), strict=True):
            assert ids.dtype == np.int32
            np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert tokenizer.encode_batch([]) == []
        assert tokenizer.encode("").tolist() == []


def test_truncation_padding_and_templates_of_the_file_do_not_count(bpe, tmp_path):
    model = tokenizers.Tokenizer.from_file(str(bpe))
    model.enable_truncation(2)
    model.enable_padding(length=9)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", model.token_to_id("<|endoftext|>"))]
    )
    model.save(str(tmp_path / "tokenizer.json"))
    expected = load_tokenizer(bpe).encode(TEXTS[0])
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(tokenizer.encode(TEXTS[0]), expected)
    np.testing.assert_array_equal(tokenizer.encode_with_offsets(TEXTS[0])[0], expected)


def test_fingerprint_is_of_content_and_end_of_text(bpe, tmp_path):
    copy = tmp_path / "other.json"
    shutil.copy(bpe, copy)
    tokenizer = load_tokenizer(bpe)
    assert load_tokenizer(copy).fingerprint == tokenizer.fingerprint
    assert len(tokenizer.fingerprint) == 16
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<tool>"}}')
    assert load_tokenizer(copy).eos_id == 330
    assert load_tokenizer(copy).fingerprint != tokenizer.fingerprint
    (tmp_path / "tokenizer_config.json").unlink()
    copy.write_text(copy.read_text().replace('"<tool>"', '"<poop>"'))
    assert load_tokenizer(copy).fingerprint != tokenizer.fingerprint


def test_a_worker_gets_the_same_tokenizer(bpe, piece, tmp_path):
    shutil.copy(bpe, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<tool>"}')
    for file in (bpe, piece, tmp_path):
        tokenizer = load_tokenizer(file)
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert (copy.fingerprint, copy.eos_id, copy.vocab_size) == (
            tokenizer.fingerprint,
            tokenizer.eos_id,
            tokenizer.vocab_size,
        )
        text = "a <|endoftext|> </s> b"
        np.testing.assert_array_equal(copy.encode(text), tokenizer.encode(text))


def test_end_of_text_of_sentencepiece(piece, tmp_path):
    assert load_tokenizer(piece).eos_id == 2
    shutil.copy(piece, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    assert load_tokenizer(tmp_path).eos_id == 1


def test_llama_style_json_counts_bytes(tmp_path):
    """SentencePiece BPE converted to tokenizer.json: "▁" for the space, <0xNN> for bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "▁a"]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(pieces)},
            merges=[("▁", "a")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    model.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.eos_id == 2
    assert tokenizer.token_bytes()[[0, 1, 2, 3, 258, 259, 260, 261]].tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert bytes_of(tokenizer, "a a 数") == len("a a 数".encode())


def write(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "is empty"),
        ("tokenizer.json", b'{"version": "1.0", "model"', "cannot be read as a tokenizer"),
        ("tokenizer.json", b"[1, 2]", "cannot be read as a tokenizer"),
        ("tokenizer.json", b"\xff\xfe\x00", "cannot be read as a tokenizer"),
        ("tokenizer.model", b"", "is empty"),
        ("tokenizer.model", b"not a model", "cannot be read as a tokenizer"),
        ("tokenizer.txt", b"abc", "ends in .json or .model"),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path, name, content, message):
    file = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_files_are_told(bpe, piece, tmp_path):
    for file in (bpe, piece):
        content = file.read_bytes()
        short = write(tmp_path, file.name, content[: len(content) // 2])
        with pytest.raises(DataError, match="cannot be read as a tokenizer"):
            load_tokenizer(short)


def test_a_missing_file_and_a_missing_end_of_text_are_told(bpe, tmp_path):
    with pytest.raises(DataError, match=r"does not exist; .* train one: davinci shard CONFIG --new-tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path)
    content = bpe.read_text()
    file = write(tmp_path, "tokenizer.json", content.replace("<|endoftext|>", "<|other|>").encode())
    with pytest.raises(DataError, match="has no end-of-text token"):
        load_tokenizer(file)
    write(tmp_path, "tokenizer_config.json", json.dumps({"eos_token": "<nowhere>"}).encode())
    with pytest.raises(DataError, match=r"'<nowhere>'.*is no token of"):
        load_tokenizer(file)
    write(tmp_path, "tokenizer_config.json", b"{")
    with pytest.raises(DataError, match="is not a JSON object"):
        load_tokenizer(file)
    write(tmp_path, "tokenizer_config.json", json.dumps({"eos_token": "<|other|>"}).encode())
    assert load_tokenizer(file).eos_id == 329


def test_word_pieces_are_refused(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="WordPiece tokenizer, which loses bytes"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_text_that_is_no_unicode_is_told(bpe, piece):
    for file in (bpe, piece):
        tokenizer = load_tokenizer(file)
        with pytest.raises(DataError, match=r"text 1 = .*surrogate"):
            tokenizer.encode_batch(["fine", "half \ud83d"])
        with pytest.raises(DataError, match="surrogate"):
            tokenizer.encode_with_offsets("half \ud83d")
        with pytest.raises(DataError, match="text 0 = 'int'"):
            tokenizer.encode_batch([7])
