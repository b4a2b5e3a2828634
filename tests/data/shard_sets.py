"""Shard sets made from token lists, and a tokenizer of bytes, for tests of what reads and writes them."""

import pathlib
from unittest import mock

import numpy as np

from davinci_jax.data.manifest import SPLITS, Manifest, TokenizerEntry
from davinci_jax.data.shard_writer import SplitWriter

TOKENIZER = TokenizerEntry("feedface", 60000, 59999)


def write_shards(
    folder: pathlib.Path, documents, spans=None, heldout=(), block_tokens=8, shard_blocks=3, dtype="uint16"
) -> Manifest:
    """Writes a shard set: `documents` is a list of token lists, `spans` the masked spans of each."""
    # What is gone after the test need not survive a power failure.
    with mock.patch("os.fsync"):
        folder.mkdir(parents=True)
        shard_bytes = shard_blocks * block_tokens * np.dtype(dtype).itemsize
        splits = {}
        for split, tokens in zip(SPLITS, (documents, heldout), strict=True):
            writer = SplitWriter(folder, split, dtype, block_tokens, shard_bytes)
            for n, ids in enumerate(tokens):
                masked = np.array(spans[n] if spans and split == "train" else [], np.int64).reshape(-1, 2)
                record = {"id": f"{split}/{n}", "level": "L2", "lineage": [{"name": "made", "n": n}]}
                writer.add(np.array(ids), masked, record)
            splits[split] = writer.close()
        manifest = Manifest("made", "Code", "L2", TOKENIZER, dtype, block_tokens, 0.1, (), (), {}, splits)
        manifest.write(folder)
    return manifest


class ByteTokenizer:
    """A token is a byte of UTF-8; a stand-in that needs no file."""

    def __init__(self, vocab_size=257):
        self.vocab_size, self.eos_id, self.fingerprint = vocab_size, 256, f"bytes-{vocab_size}"

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_with_offsets(self, text):
        owners = np.repeat(np.arange(len(text)), [len(character.encode()) for character in text])
        return self.encode_batch([text])[0], np.stack([owners, owners + 1], axis=1)
