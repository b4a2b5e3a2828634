"""Tokenizers: Hugging Face `tokenizer.json` and SentencePiece `.model` files behind one class.

Text is data: a document that spells `<|endoftext|>` gets the ids of those characters, never the special id, so
no document can end itself or another.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from davinci_jax.data.fast_bpe import FastEncoder, fast_encoder
from davinci_jax.errors import DataError
from davinci_jax.text import END_OF_TEXT

# What the libraries raise on something that is no Unicode text; `_no_text` finds out which text it was.
_TEXT_ERRORS = (TypeError, AttributeError, UnicodeEncodeError, RuntimeError)


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      content: bytes of the tokenizer file.
      eos_token: the token that ends a document, as `tokenizer_config.json` names it; `None` looks for a usual one.
      origin: the file, for messages.
    """

    def __init__(self, content: bytes, eos_token: str | None = None, origin: str = "tokenizer"):
        self.content, self.eos_token, self.origin = content, eos_token, origin
        self._model = self._load()
        if self._model is None:
            raise DataError("data.tokenizer", origin, "is empty", "give a whole tokenizer.json or .model file")
        self.eos_id: int = self._find_eos()

    def __reduce__(self):
        # By content: a worker in another folder, or after the file has changed, gets the same tokenizer.
        return type(self), (self.content, self.eos_token, self.origin)

    @abc.abstractmethod
    def _load(self) -> Any:
        """Returns the library's tokenizer; raises `DataError` if the content is none."""

    @abc.abstractmethod
    def _token_id(self, token: str) -> int | None:
        """Returns the id of a token spelt in full, or `None`."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the largest id + 1."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns int32 [n] ids for each text; no special token is added, found or cut off."""

    @abc.abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 [n] and the characters [start, end) each stands for, int32 [n, 2].

        The tokens that share a character, as the bytes of a rare one do, all carry its whole span. A token that
        stands for no character of the text, such as SentencePiece's leading space, has an empty span.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Returns int32 [vocab_size]: UTF-8 bytes of text that each id stands for, 0 for special tokens.

        Over the ids of a text they add up to the bytes of the text as the tokenizer normalises it (NFC for
        Qwen2), which is what bits per byte divides by.
        """

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 [n] ids of a text, without an end-of-text id."""
        return self.encode_batch([text])[0]

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the file's content and the end-of-text id; the path does not enter."""
        digest = hashlib.sha256(self.content)
        digest.update(f"|eos={self.eos_id}".encode())
        return digest.hexdigest()[:16]

    def _find_eos(self) -> int:
        names = END_OF_TEXT if self.eos_token is None else (self.eos_token,)
        for name in names:
            found = self._token_id(name)
            if found is not None:
                return found
        if self.eos_token is None:
            raise DataError(
                "data.tokenizer",
                self.origin,
                f"has no end-of-text token (looked for {', '.join(END_OF_TEXT)})",
                'name one with "eos_token" in a tokenizer_config.json beside it',
            )
        raise DataError(
            "eos_token",
            self.eos_token,
            f"is named by tokenizer_config.json but is no token of {self.origin}",
            "name a token of the vocabulary",
        )


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`: byte-level BPE as in GPT-2 and Qwen2, or SentencePiece-like with "▁" for the space."""

    def _load(self) -> tokenizers.Tokenizer | None:
        if not self.content:
            return None
        try:
            model = tokenizers.Tokenizer.from_buffer(self.content)
        except Exception as error:  # the library raises bare Exception
            raise _damaged(self.origin, error) from error
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        self._parts = json.loads(self.content)
        self._byte_level = any(_mentions(self._parts.get(part), "ByteLevel") for part in ("pre_tokenizer", "decoder"))
        if not self._byte_level and self._parts["model"].get("type") not in ("BPE", "Unigram"):
            raise DataError(
                "data.tokenizer",
                self.origin,
                f"is a {self._parts['model'].get('type')} tokenizer, which loses bytes of the text",
                "use byte-level BPE or SentencePiece",
            )
        return model

    def _token_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def _fast(self) -> FastEncoder | None:
        return fast_encoder(self.content)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            found = [None if self._fast is None else self._fast.encode(text) for text in texts]
            left = [n for n, ids in enumerate(found) if ids is None]
            encodings = self._model.encode_batch_fast([texts[n] for n in left], add_special_tokens=False)
        except _TEXT_ERRORS as error:
            raise _no_text(texts) from error
        for n, encoding in zip(left, encodings, strict=True):
            found[n] = np.array(encoding.ids, np.int32)
        return found

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            encoding = self._model.encode(text, add_special_tokens=False)
        except _TEXT_ERRORS as error:
            raise _no_text([text]) from error
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        length = _byte_level_length if self._byte_level else _piece_length
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self._model.get_vocab(with_added_tokens=False).items():
            lengths[i] = length(token)
        for token in self._parts.get("added_tokens", ()):
            lengths[token["id"]] = 0 if token["special"] else len(token["content"].encode())
        unknown = self._parts["model"].get("unk_token")
        if unknown is not None and self._token_id(unknown) is not None:
            lengths[self._token_id(unknown)] = 0
        return lengths


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`, unigram or BPE, with or without byte fallback."""

    def _load(self) -> sentencepiece.SentencePieceProcessor | None:
        if not self.content:
            return None
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.load_from_serialized_proto(self.content)
        except (RuntimeError, ValueError, OSError) as error:
            raise _damaged(self.origin, error) from error
        return model

    def _find_eos(self) -> int:
        if self.eos_token is None and self._model.eos_id() >= 0:
            return self._model.eos_id()
        return super()._find_eos()

    def _token_id(self, token: str) -> int | None:
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    @property
    def vocab_size(self) -> int:
        return self._model.get_piece_size()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            return [np.array(ids, np.int32) for ids in self._model.encode(list(texts))]
        except _TEXT_ERRORS as error:
            raise _no_text(texts) from error

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            mapping = self._model.encode(text, return_type="offset_mapping")
        except _TEXT_ERRORS as error:
            raise _no_text([text]) from error
        ids = np.array(mapping["ids"], np.int32)
        spans = np.array(mapping["offsets"], np.int32).reshape(-1, 2)
        for i in range(len(ids) - 2, -1, -1):
            # Byte pieces: the library gives the character to the last of its bytes only.
            if spans[i, 0] == spans[i, 1] == spans[i + 1, 0] and self._model.is_byte(int(ids[i])):
                spans[i, 1] = spans[i + 1, 1]
        return ids, spans

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if not (self._model.is_control(i) or self._model.is_unknown(i)):
                lengths[i] = 1 if self._model.is_byte(i) else _piece_length(self._model.id_to_piece(i))
        return lengths


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Returns the tokenizer of a file.

    The end-of-text token is `eos_token` of a `tokenizer_config.json` beside the file, else SentencePiece's own,
    else the first of `END_OF_TEXT` that the vocabulary holds.

    Args:
      path: a `tokenizer.json`, a SentencePiece `.model`, or a folder that holds `tokenizer.json` or
        `tokenizer.model`.

    Raises:
      DataError: no such file, a damaged one, one of another kind, or no end-of-text token.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        inside = [file / name for name in ("tokenizer.json", "tokenizer.model") if (file / name).is_file()]
        file = inside[0] if inside else file / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            "data.tokenizer",
            str(file),
            "does not exist",
            "copy a tokenizer.json or SentencePiece .model there, or train one: davinci shard CONFIG --new-tokenizer",
        )
    kinds = {".json": HuggingFaceTokenizer, ".model": SentencePieceTokenizer}
    if file.suffix not in kinds:
        raise DataError(
            "data.tokenizer",
            str(file),
            "is neither a tokenizer.json nor a SentencePiece .model",
            "name a file that ends in .json or .model",
        )
    return kinds[file.suffix](file.read_bytes(), _configured_eos(file.parent / "tokenizer_config.json"), str(file))


def _configured_eos(file: pathlib.Path) -> str | None:
    if not file.is_file():
        return None
    try:
        named = json.loads(file.read_bytes()).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError("data.tokenizer", str(file), f"is not a JSON object ({error})", "mend or remove it") from error
    return named.get("content") if isinstance(named, dict) else named


def _mentions(part: Any, kind: str) -> bool:
    """Whether a part of a tokenizer.json is of a kind or a sequence that holds one."""
    if not isinstance(part, dict):
        return False
    inner = [*part.get("pretokenizers", ()), *part.get("decoders", ())]
    return part.get("type") == kind or any(_mentions(item, kind) for item in inner)


@functools.cache
def _byte_alphabet() -> frozenset[str]:
    """The 256 characters that byte-level BPE writes bytes with (GPT-2, Radford et al. 2019)."""
    return frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _byte_level_length(token: str) -> int:
    return len(token) if _byte_alphabet().issuperset(token) else len(token.encode())


def _piece_length(piece: str) -> int:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace("▁", " ").encode())


def _damaged(origin: str, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0][:160]
    return DataError("data.tokenizer", origin, f"cannot be read as a tokenizer ({reason})", "copy it again")


def _no_text(texts: Sequence[object]) -> DataError:
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            return DataError(f"text {n}", type(text).__name__, "is not text", "give strings")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return DataError(
                f"text {n}", text[error.start : error.end], "is half of a surrogate pair", "leave the document out"
            )
    return DataError("texts", None, "cannot be encoded", "give a list of strings")
