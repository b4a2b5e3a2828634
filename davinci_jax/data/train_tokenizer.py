"""A byte-level BPE of Qwen2's kind, trained on a sample of an experiment's documents."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from davinci_jax.curation.documents import document_files, documents_path
from davinci_jax.data.documents import DocumentReader, is_held_out
from davinci_jax.errors import DataError
from davinci_jax.experiment import Experiment, Source
from davinci_jax.files import write_atomically
from davinci_jax.text import END_OF_TEXT, QWEN2_SPLIT

EOS_TOKEN = END_OF_TEXT[0]


def train_tokenizer(
    experiment: Experiment, sample_bytes: int = 16_000_000, log: Callable[[str], None] = print
) -> pathlib.Path:
    """Trains the tokenizer that `data.tokenizer` names, unless it is there; returns its path.

    The vocabulary has `model.vocab_size` ids. Domains enter the sample by their share of the whole curriculum,
    sources of a domain alike, as far as they have text; documents are chosen by a hash of their text, and held-out
    ones never. The same documents give the same file. They are all read, twice, so for a large pool bring a
    tokenizer instead. A `tokenizer_config.json`, which names the end-of-text token, is written beside it unless
    there is one.

    Args:
      experiment: the run that the tokenizer is for.
      sample_bytes: most text to train on, in bytes.
      log: is given lines to show.

    Raises:
      DataError: `data.tokenizer` is no `.json`, a source has no documents, or they are too few for the vocabulary.
    """
    path = pathlib.Path(experiment.data.root) / experiment.data.tokenizer
    if path.exists():
        log(f"tokenizer: {path} is there")
        return path
    if path.suffix != ".json":
        raise DataError(
            "data.tokenizer",
            str(path),
            "does not exist, and only a .json can be trained",
            "copy the SentencePiece model there or name a tokenizer.json",
        )
    log(f"tokenizer: training {experiment.model.vocab_size} ids on up to {sample_bytes / 1e6:.0f} MB of documents")
    tokenizer = train(sample(experiment, sample_bytes), experiment.model.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    if not path.with_name("tokenizer_config.json").exists():
        write_atomically(path.with_name("tokenizer_config.json"), json.dumps(config, indent=1) + "\n")
    write_atomically(path, tokenizer.to_str(pretty=True))
    log(f"tokenizer: -> {path}")
    return path


def train(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE with NFC, Qwen2's split and `vocab_size` ids, `<|endoftext|>` the last of them.

    Raises:
      DataError: the texts do not hold enough different pairs for so many ids.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise DataError(
            "model.vocab_size", vocab_size, "has no room for 256 bytes and an end of text", "use 257 or more"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([EOS_TOKEN])
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            "model.vocab_size",
            vocab_size,
            f"is more than the {tokenizer.get_vocab_size()} ids that the documents give",
            "use a smaller vocabulary or more documents",
        )
    return tokenizer


def sample(experiment: Experiment, sample_bytes: int) -> Iterator[str]:
    """Yields texts of all sources, about `sample_bytes` bytes in all; held-out documents are left out."""
    shares = _domain_shares(experiment)
    for source in experiment.data.sources:
        alike = sum(other.domain == source.domain for other in experiment.data.sources)
        budget = sample_bytes * shares.get(source.domain, 0.0) / alike
        total = sum(len(text.encode()) for text in _training_texts(experiment, source))
        threshold = 2**64 * min(1.0, budget / total) if total else 0.0
        for text in _training_texts(experiment, source):
            if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < threshold:
                yield text


def _training_texts(experiment: Experiment, source: Source) -> Iterator[str]:
    folder = documents_path(experiment.data, source)
    files = document_files(experiment.data, source)
    # `davinci shard` names the lines that are no documents.
    reader = DocumentReader(files, folder if folder.is_dir() else folder.parent, source.level, lambda reject: None)
    for document in reader:
        if not is_held_out(document.group, experiment.data.heldout):
            yield document.text


def _domain_shares(experiment: Experiment) -> dict[str, float]:
    """Returns domain -> share of the tokens of the whole run."""
    shares: dict[str, float] = {}
    run = sum(stage.tokens for stage in experiment.curriculum)
    for stage in experiment.curriculum:
        total = sum(stage.mixture.values())
        for domain, share in stage.mixture.items():
            shares[domain] = shares.get(domain, 0.0) + stage.tokens / run * share / total
    return shares
