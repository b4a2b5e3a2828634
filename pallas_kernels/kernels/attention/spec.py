"""Which keys a query sees and how scores are made: what every attention kernel is specialised for."""

import dataclasses
from typing import NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static part of an attention call.

    Key s is visible to query t if their segments are equal and not negative, and, with p the positions,
    `causal` implies p_s <= p_t, and `window` (left, right) implies p_t - left <= p_s <= p_t + right.

    Attributes:
      causal: no query sees a later position.
      window: (left, right) numbers of neighbours seen beside the own position; -1 on a side means no bound there.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv 2408.00118).
      scale: scores are scale * q.k.
    """

    causal: bool
    window: tuple[int, int] | None
    soft_cap: float | None
    scale: float


class Masks(NamedTuple):
    """What is known of each query and key beside its place in the array; None where it was not given.

    Attributes:
      q_segments, kv_segments: [B, T], [B, S] int32, the document; negative ids are padding. Segments of the queries
        alone are those of the keys, too.
      q_positions, kv_positions: [B, T], [B, S] int32.
    """

    q_segments: jax.Array | None = None
    kv_segments: jax.Array | None = None
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None

    @property
    def key_segments(self) -> jax.Array | None:
        """[B, S]: those of the keys, given or not."""
        return self.q_segments if self.kv_segments is None else self.kv_segments

    def compared_positions(self, spec: AttentionSpec) -> tuple[jax.Array, jax.Array] | None:
        """Positions of queries and of keys, if they were given and causality or a window asks for them."""
        if self.q_positions is None or not (spec.causal or spec.window is not None):
            return None
        return self.q_positions, self.kv_positions
