"""Byte-level BPE through tiktoken, several times as fast as `tokenizers`, with the same ids or not at all.

tiktoken merges any two tokens that spell a third, in the order of the third; `tokenizers` merges the pairs of a list.
The two agree if every merged token comes out whole when its own bytes are merged: then no other two neighbours that
spell it can ever meet. That is checked for each token when a tokenizer is loaded, as is everything else that decides;
where something does not fit, `fast_encoder` returns `None`. A text that tiktoken cannot split gives `None` likewise.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers

from davinci_jax.text import END_OF_TEXT, QWEN2_SPLIT

# How GPT-2 cuts text (Radford et al. 2019), which `tokenizers` does where a ByteLevel step brings its own pattern.
GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# These patterns match every character, so that no text falls between two matches.
_SPLITS = frozenset({GPT2_SPLIT, QWEN2_SPLIT})
_NORMALISE: dict[str | None, Callable[[str], str]] = {
    None: lambda text: text,
    "NFC": lambda text: text if text.isascii() else unicodedata.normalize("NFC", text),
}


class FastEncoder:
    """Encodes as the tokenizer.json that it was made from.

    Args:
      tokens: bytes of each token by rank: the 256 bytes, then the merges in their order.
      ids: int32 [ranks], the id of each.
      split: pattern that cuts a text before merging.
      normalise: what comes before that.
    """

    def __init__(self, tokens: list[bytes], ids: np.ndarray, split: str, normalise: Callable[[str], str]):
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(tokens)}
        # Without any special token tiktoken looks for one at every character. This one is never let through.
        special = {END_OF_TEXT[0]: len(tokens)}
        self._encoding = tiktoken.Encoding(
            "tokenizer.json", pat_str=split, mergeable_ranks=ranks, special_tokens=special
        )
        self._ids, self._normalise = ids, normalise
        self._lengths = np.array([len(token) for token in tokens])

    def encode(self, text: str) -> np.ndarray | None:
        """Returns int32 [n] ids; `None` if the text is too odd for the library, or not all of it came out.

        Raises:
          UnicodeEncodeError: the text holds half of a surrogate pair.
          AttributeError: it is no text.
        """
        text = self._normalise(text)
        size = len(text.encode())
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # the splitter gives up, as on a megabyte of blanks
            return None
        return self._ids[ranks] if self._lengths[ranks].sum() == size else None


def fast_encoder(content: bytes) -> FastEncoder | None:
    """Returns the encoder of a tokenizer.json, `None` where it could give other ids or tiktoken is not installed."""
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        return None
    parts = json.loads(content)
    model, split, normaliser = parts["model"], _split(parts.get("pre_tokenizer")), parts.get("normalizer")
    form = normaliser.get("type") if isinstance(normaliser, dict) else None
    # A token that was added and is not special is found in the text before anything is cut.
    if split not in _SPLITS or form not in _NORMALISE or not all(t["special"] for t in parts.get("added_tokens", ())):
        return None
    ranked = _ranked_tokens(model)
    if ranked is None:
        return None
    tokens, ids = ranked
    return FastEncoder(tokens, np.array(ids, np.int32), split, _NORMALISE[form])


def _ranked_tokens(model: dict[str, Any]) -> tuple[list[bytes], list[int]] | None:
    """Returns the tokens in the order of merging with their ids, `None` if order and ids do not decide alone."""
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if model.get("type") != "BPE" or any(model.get(option) for option in odd):
        return None
    vocabulary, to_byte = model["vocab"], _bytes_of_characters()
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    spelt = [*sorted(to_byte, key=to_byte.__getitem__), *("".join(pair) for pair in merges)]
    if len(set(spelt)) != len(spelt) or not all(token in vocabulary for token in spelt):
        return None
    merger = tokenizers.models.BPE(vocabulary, merges)
    whole = tokenizers.Tokenizer(merger).encode_batch_fast(spelt, add_special_tokens=False)
    if any(encoding.ids != [vocabulary[token]] for encoding, token in zip(whole, spelt, strict=True)):
        return None
    return [bytes(to_byte[character] for character in token) for token in spelt], [vocabulary[t] for t in spelt]


def _split(part: Any) -> str | None:
    """Returns the pattern of a pre-tokenizer that cuts by one and then writes bytes, `None` for any other."""
    if not isinstance(part, dict):
        return None
    steps = part["pretokenizers"] if part.get("type") == "Sequence" else [part]
    *cuts, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not cuts:
        return GPT2_SPLIT if last.get("use_regex", True) else None
    (cut, *more) = cuts
    fits = cut.get("type") == "Split" and cut.get("behavior") == "Isolated" and not cut.get("invert")
    return cut["pattern"].get("Regex") if fits and not more and not last.get("use_regex", True) else None


def _bytes_of_characters() -> dict[str, int]:
    """Returns character -> byte of GPT-2's alphabet: printable bytes stand for themselves, others follow from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
