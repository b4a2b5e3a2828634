"""Batched generation with a cache: prompts of any length go in together, each row stops at its own end."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from davinci_jax import sharding
from davinci_jax.data.tokenizer import Tokenizer
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import ModelConfig
from davinci_jax.inference.sampling import Sampling, draw
from davinci_jax.models.cache import Cache, decode, init_cache
from davinci_jax.models.decoder import Decoder

# Prompts go through the model in pieces of this many tokens, which bounds the attention scores held at once; lengths
# are rounded up to it, so that few programs are compiled.
PIECE = 128


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
) -> list[str]:
    """Continues texts.

    Args:
      decoder: the model; its mesh must be the current one.
      tokenizer: the model's tokenizer.
      prompts: at least one token each.
      max_new_tokens: the most tokens added to each prompt; a row ends earlier at the end-of-document token.
      sampling: how tokens are drawn.

    Returns:
      The continuation of each prompt, without the prompt and without the end-of-document token.

    Raises:
      ConfigError: a prompt is empty, too long for the model with the tokens to be added, or of another vocabulary.
    """
    ids = generate_ids(
        decoder,
        tokenizer.encode_batch(prompts),
        max_new_tokens,
        eos_id=tokenizer.eos_id,
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
    )
    return [tokenizer.decode(row) for row in ids]


def generate_ids(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    *,
    eos_id: int,
    sampling: Sampling = Sampling(),
    vocab_size: int | None = None,
) -> list[np.ndarray]:
    """Continues token ids; returns int32 [n] new ids for each prompt, `eos_id` cut off, n <= max_new_tokens.

    Args:
      decoder: as in `generate`.
      prompts: ids, at least one each.
      max_new_tokens: as in `generate`.
      eos_id: ends a row.
      sampling: how tokens are drawn.
      vocab_size: ids from here on are never drawn; a model may have more rows than its tokenizer has tokens.

    Raises:
      ConfigError: as in `generate`.
    """
    check_prompts(prompts, max_new_tokens, decoder.config)
    if not prompts:
        return []
    length = -(-max(map(len, prompts)) // PIECE) * PIECE
    mesh = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(mesh.get(axis, 1) for axis in sharding.RULES["batch"])
    # Rows are filled up to the devices that share the batch, with copies of the first.
    rows = [*prompts, *[prompts[0]] * (-len(prompts) % devices)]
    tokens = np.zeros((len(rows), length), np.int32)
    for row, prompt in zip(tokens, rows, strict=True):
        row[length - len(prompt) :] = prompt
    padding = np.array([length - len(prompt) for prompt in rows], np.int32)
    new = np.asarray(
        _generate(
            decoder, tokens, padding, np.uint32(sampling.seed % 2**32), max_new_tokens=max_new_tokens, eos_id=eos_id,
            sampling=dataclasses.replace(sampling, seed=0), vocab_size=vocab_size or decoder.config.vocab_size,
        )
    )  # fmt: skip
    return [row[: _end(row, eos_id)] for row in new[: len(prompts)]]


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "eos_id", "sampling", "vocab_size"))
def _generate(
    decoder: Decoder,
    tokens: jax.Array,
    padding: jax.Array,
    seed: jax.Array,
    *,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling,
    vocab_size: int,
) -> jax.Array:
    """Prompts int32 [B, T], padded on the left, -> new tokens int32 [B, max_new_tokens], void after `eos_id`.

    The seed, uint32, is a value and not part of the program: a server is asked with a new one every time.
    """
    batch, length = tokens.shape
    cache = init_cache(decoder.config, batch, length + max_new_tokens, padding)
    logits, cache = _read_prompts(decoder, cache, tokens)

    def more(carry: tuple) -> jax.Array:
        _, _, new, step = carry
        return (step < max_new_tokens) & ~_ended(new, step, eos_id).all()

    def body(carry: tuple) -> tuple:
        logits, cache, new, step = carry
        token = draw(_whole(logits)[:, :vocab_size], sampling, step, seed)
        new = jax.lax.dynamic_update_slice(new, token[:, None], (0, step))
        logits, cache = decode(decoder, cache, token[:, None])
        return logits, cache, new, step + 1

    new = jnp.full((batch, max_new_tokens), eos_id, jnp.int32)
    return jax.lax.while_loop(more, body, (logits, cache, new, jnp.int32(0)))[2]


def _read_prompts(decoder: Decoder, cache: Cache, tokens: jax.Array) -> tuple[jax.Array, Cache]:
    """Fills the cache piece by piece; returns the logits [B, V] after the last token, and the cache."""
    pieces = tokens.reshape(tokens.shape[0], -1, PIECE).swapaxes(0, 1)
    logits, cache = decode(decoder, cache, pieces[0])

    def body(carry: tuple, piece: jax.Array) -> tuple:
        return decode(decoder, carry[1], piece), None

    return jax.lax.scan(body, (logits, cache), pieces[1:])[0]


def _ended(new: jax.Array, step: jax.Array, eos_id: int) -> jax.Array:
    """Whether each row of [B, N], of which `step` tokens are written, has ended; bool [B]."""
    return ((new == eos_id) & (jnp.arange(new.shape[1]) < step)).any(axis=1)


def _end(row: np.ndarray, eos_id: int) -> int:
    """Where the first `eos_id` of a row is, or the row's length."""
    found = np.flatnonzero(row == eos_id)
    return int(found[0]) if found.size else len(row)


def _whole(x: jax.Array) -> jax.Array:
    """Returns `x` whole on every device of the current mesh."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, PartitionSpec())


def check_prompts(prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int, config: ModelConfig) -> None:
    """Raises `ConfigError` unless the model can continue every prompt by `max_new_tokens`."""
    if max_new_tokens < 1:
        raise ConfigError("max_new_tokens", max_new_tokens, "adds nothing", "give at least 1")
    for n, prompt in enumerate(prompts):
        field = f"prompt {n + 1}"
        if not len(prompt):
            raise ConfigError(field, None, "is empty", "give at least one token of text to continue")
        if len(prompt) + max_new_tokens > config.max_positions:
            raise ConfigError(
                field,
                None,
                f"has {len(prompt)} tokens, which with {max_new_tokens} new ones is more than the "
                f"{config.max_positions} positions of the model",
                "shorten it or ask for fewer",
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ConfigError(
                field,
                max(prompt),
                f"is an id outside the model's {config.vocab_size}",
                "use the tokenizer that the model was trained with",
            )
