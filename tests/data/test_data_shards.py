"""Shard sets: the record format, the manifest, and damage that is found and named."""

import collections
import json
import pathlib
import pickle
import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import TOKENIZER, write_shards

from davinci_jax.data import blocks
from davinci_jax.data.best_fit import BestFitRows
from davinci_jax.data.blocks import Block
from davinci_jax.data.manifest import Manifest
from davinci_jax.data.records import ReaderCache
from davinci_jax.data.rows import ConcatRows
from davinci_jax.data.shards import ShardSet
from davinci_jax.errors import DataError


def corpus(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 60000, n).tolist() for n in rng.integers(1, 90, count)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "made"
    write_shards(folder, corpus(), heldout=[[7, 8, 9]])
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return pathlib.Path(shutil.copytree(original, tmp_path / "made"))


def block_of(n=5, dtype=np.uint16):
    tokens = np.arange(n + 1, dtype=dtype)
    starts, spans = np.array([0, n], np.uint32), np.array([[1, 2], [3, n + 1]], np.uint32)
    return Block(3, tokens, starts, spans)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_block_survives_encoding(dtype):
    block = block_of(dtype=dtype)
    again = blocks.decode(blocks.encode(block))
    for before, after in zip(block, again, strict=True):
        np.testing.assert_array_equal(before, after)
    assert again.num_tokens == 5
    assert again.tokens.dtype == dtype


@given(st.integers(0, 2**32), st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_to_a_block_or_to_a_value_error(where, new):
    record = bytearray(blocks.encode(block_of()))
    where %= len(record) + 1
    record[where : where + len(new)] = new
    for damaged in (bytes(record), bytes(record[:where]), new):
        try:
            block = blocks.decode(damaged)
        except ValueError:
            continue
        assert (np.diff(block.starts.astype(np.int64)) > 0).all()
        assert (block.starts <= block.num_tokens).all()
        assert (block.spans <= block.num_tokens + 1).all()


def test_blocks_hold_the_stream(folder):
    stream = np.concatenate(corpus())
    shards = ShardSet(folder)
    assert shards.num_tokens == len(stream)
    assert len(shards.entry.shards) > 3
    read = shards.read_blocks(np.arange(shards.entry.blocks))
    np.testing.assert_array_equal(np.concatenate([block.tokens[:-1] for block in read]), stream)
    starts = shards.document_offsets
    for block in read:
        first = block.index * 8
        inside = starts[(starts >= first) & (starts <= first + block.num_tokens)]
        assert (block.starts + first).tolist() == inside.tolist()
        if first + block.num_tokens < len(stream):
            assert block.tokens[-1] == stream[first + block.num_tokens]
    for n, entry in enumerate(shards.entry.shards):
        assert entry.tokens == min(24, len(stream) - 24 * n)
    assert pickle.loads(pickle.dumps(shards)).read_blocks(np.array([2]))[0].index == 2


def test_document_table(folder):
    shards = ShardSet(folder)
    records = shards.document_records([0, 59, 7])
    assert [record["id"] for record in records] == ["train/0", "train/59", "train/7"]
    assert records[1]["first_token"] + records[1]["num_tokens"] == shards.num_tokens
    assert records[2]["lineage"] == [{"name": "made", "n": 7}]
    assert ShardSet(folder, "heldout").document_records([0])[0]["id"] == "heldout/0"


def test_a_folder_without_a_manifest(folder, tmp_path):
    with pytest.raises(DataError, match="nothing: does not exist; make it with `davinci shard"):
        ShardSet(tmp_path / "nothing")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="made: holds no shard set; make it with `davinci shard"):
        ShardSet(folder)


def test_a_shard_that_is_missing_truncated_or_longer(folder):
    file = folder / "train-00001.array_record"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"train-00001.array_record: is truncated: \d+ bytes of \d+; restore"):
        ShardSet(folder)
    file.write_bytes(whole + b"x")
    with pytest.raises(DataError, match=r"train-00001.array_record: is altered"):
        ShardSet(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"train-00001.array_record: is missing"):
        ShardSet(folder)
    file.symlink_to(folder / "nowhere")
    with pytest.raises(DataError, match=r"train-00001.array_record: is missing"):
        ShardSet(folder)


def test_a_damaged_record_is_named(folder):
    file = folder / "train-00001.array_record"
    content = bytearray(file.read_bytes())
    record = blocks.encode(ShardSet(folder).read_blocks(np.array([4]))[0])
    content[content.index(record[-12:])] ^= 1  # random tokens are stored as they are
    file.write_bytes(content)
    with pytest.raises(
        DataError, match=r"train-00001.array_record, record 1: cannot be read \(.*hash mismatch.*; restore"
    ):
        ShardSet(folder).read_blocks(np.array([3, 4, 5]))
    assert len(ShardSet(folder).read_blocks(np.array([0, 6]))) == 2, "the other records can be read"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ConcatRows, BestFitRows])
def test_every_flip_or_truncation_is_found_or_harmless(folder, kind):
    random_ = random.Random(0)
    expected = _everything(folder, kind)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("heldout"))
    messages = collections.defaultdict(str)
    for n in range(60):
        file = files[n % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        # Files are mostly padding: aim at what is not.
        place = random_.choice([at for at, byte in enumerate(whole) if byte])
        if n % 5:
            damaged[place] ^= 1 << random_.randrange(8)
        else:
            del damaged[place:]
        file.write_bytes(damaged)
        try:
            assert _everything(folder, kind) == expected, f"{file.name}: wrong data without an error"
        except DataError as error:
            messages[file.name if file.parent == folder else file.parent.name] += str(error) + "\n"
        file.write_bytes(whole)
    assert all(name in line for name, lines in messages.items() for line in lines.splitlines())
    assert sum(lines.count("\n") for lines in messages.values()) > 30
    assert _everything(folder, kind) == expected


def _everything(folder, kind):
    """Returns all that can be read from a shard set, as JSON."""
    shards = ShardSet(folder)
    rows = kind(shards, 20)
    batch = rows.read(np.arange(rows.num_rows))
    records = shards.document_records(range(shards.entry.documents))
    return json.dumps([[array.tolist() for array in batch], records])


def test_another_shard_under_the_same_name(folder):
    sizes = {file.name: file.stat().st_size for file in folder.glob("train-0*")}
    names = [name for name, size in sorted(sizes.items()) if list(sizes.values()).count(size) > 1]
    shutil.copy(folder / names[0], folder / names[1])
    shards = ShardSet(folder)
    with pytest.raises(DataError, match=rf"{names[1]}.* holds block 0 where block 3 belongs"):
        shards.read_blocks(np.arange(6))
    with pytest.raises(DataError, match=rf"{names[1]}: was altered"):
        shards.verify()


def test_verify_reads_every_file(folder):
    seen = []
    ShardSet(folder).verify(seen.append)
    assert sum(seen) == sum(entry.bytes for entry in ShardSet(folder).entry.files)


def test_a_changed_manifest_is_refused(folder):
    file = folder / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"level": "L2"', '"level": "L9"'))
    with pytest.raises(DataError, match=r"manifest.json: does not match its own fingerprint"):
        Manifest.load(folder)
    file.write_text(text.replace('"domain"', '"domian"'))
    with pytest.raises(DataError, match=r"manifest.json: lacks or adds fields"):
        Manifest.load(folder)
    for broken, problem in ((text[:-20], "is not JSON"), ("[]", "is not of the format"), ('{"format": "x"}', "format")):
        file.write_text(broken)
        with pytest.raises(DataError, match=rf"manifest.json: {problem}|manifest.json: is not of the {problem}"):
            Manifest.load(folder)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not JSON"):
        Manifest.load(folder)


def test_the_manifest_fingerprint_tells_sets_apart(folder, tmp_path):
    write_shards(tmp_path / "same", corpus(), heldout=[[7, 8, 9]])
    write_shards(tmp_path / "other", corpus(seed=1), heldout=[[7, 8, 9]])
    prints = [ShardSet(path).fingerprint for path in (folder, tmp_path / "same", tmp_path / "other")]
    assert prints[0] == prints[1] != prints[2]


def test_tokens_of_another_tokenizer_or_vocabulary(folder):
    shards = ShardSet(folder)
    shards.require(TOKENIZER.fingerprint, TOKENIZER.vocab_size)
    with pytest.raises(DataError, match=r"made: was made with another tokenizer \(feedface, 60000 ids"):
        shards.require("0badcafe", TOKENIZER.vocab_size)
    with pytest.raises(DataError, match=r"model.vocab_size = 59999: is below the 60000 ids"):
        shards.require(TOKENIZER.fingerprint, TOKENIZER.vocab_size - 1)


def test_few_readers_stay_open(folder):
    shards = ShardSet(folder)
    cache = ReaderCache(capacity=2)
    keys = shards._shards
    for key, entry in zip(keys, shards.entry.shards, strict=True):
        for position in range(entry.blocks):
            block = blocks.decode(cache.read(key, entry.blocks, [position])[0])
            assert block.num_tokens <= 8
        assert len(cache) <= 2
    held = cache.get(keys[0], shards.entry.shards[0].blocks)
    cache.get(keys[1], shards.entry.shards[1].blocks)
    cache.get(keys[2], shards.entry.shards[2].blocks)
    assert held.is_open(), "a reader in use outlives its place in the cache"
