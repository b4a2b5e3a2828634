"""The mixture index: global sequence index -> (source, epoch, row), a pure function in constant time and memory.

Within a stage the order of sources comes from a binary tree with the sources as leaves. Shares are integers that
add up to W = 2^32. A node of weight w with a left child of weight v sends

    left(x) = floor((x v + w // 2) / w)

of its first x sequences to the left and x - left(x) to the right. Both counts grow by 0 or 1 with x, so sequence x
goes left exactly where left(x + 1) > left(x), and its position among the left child's sequences is left(x): the
look-up walks down the tree. What that gives:

- At every prefix x of a stage each source and each group of sources (a domain) has been drawn x times its share,
  give or take a little: a node's count is within 1/2 of its part of its parent's count, so it is within
  sum over n of (its weight / weight of n) / 2 of its share, n going from the node itself up to the root's children.
  The tree is Huffman's, whose weights grow along a path at least like Fibonacci's numbers, which keeps the sum
  below 1.7 whatever the shares; with groups, that of a source below twice that.
- At multiples of 2^32 sequences every count is exact, so the order repeats and no product exceeds 64 bits.
- The order depends on the shares alone, not on the length of the stage: a stage may be cut short or prolonged, and
  stages may be appended, without moving a sequence that was drawn before.

Draws of a source are numbered through all stages, so a later stage goes on where the earlier ones left off. Draw d
of a source with r rows is in epoch d // r, where the rows are shuffled by a permutation keyed by (seed, source
name, epoch): no row comes twice in an epoch, and adding a source to the pool does not reshuffle the others.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from davinci_jax.data.permutation import mix, permute, text_key
from davinci_jax.errors import DataError

PERIOD = 1 << 32


class Lookup(NamedTuple):
    """Where sequences come from.

    Attributes:
      source: int32 [k], position in the pool.
      epoch: int64 [k], how often the source has been gone through before.
      row: int64 [k], row of the source.
    """

    source: np.ndarray
    epoch: np.ndarray
    row: np.ndarray


class Node(NamedTuple):
    """A node of the tree: a source (`source` >= 0) or two children by their position in `Tree.nodes`."""

    weight: int
    source: int
    left: int
    right: int


@dataclasses.dataclass(frozen=True)
class Tree:
    """The order of sources within a stage.

    Attributes:
      nodes: children before parents; the root is last.
      weights: integer share of each source, adding up to `PERIOD`.
    """

    nodes: tuple[Node, ...]
    weights: tuple[int, ...]

    @classmethod
    def build(cls, shares: Sequence[float], names: Sequence[str], groups: Sequence[str] | None = None) -> Tree:
        """Returns the tree of the sources with a positive share: Huffman's over groups, and inside each group.

        Names break ties, so the order does not depend on the positions of the sources.
        """
        weights = integer_shares(shares)
        nodes: list[Node] = []
        members: dict[str, list[tuple[int, str, int]]] = {}
        for source in np.flatnonzero(weights).tolist():
            group = names[source] if groups is None else groups[source]
            members.setdefault(group, []).append((weights[source], names[source], len(nodes)))
            nodes.append(Node(weights[source], source, -1, -1))
        roots = [(group, _join(nodes, items)) for group, items in members.items()]
        _join(nodes, [(nodes[root].weight, group, root) for group, root in roots])
        return cls(tuple(nodes), tuple(weights))

    def lookup(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source int32 [k], draw of that source within the stage int64 [k]) of positions int64 [k]."""
        source = np.empty(x.shape, np.int32)
        draw = np.empty(x.shape, np.int64)
        periods, start = np.divmod(x.astype(np.uint64), np.uint64(PERIOD))
        open_parts = [(len(self.nodes) - 1, np.arange(x.size), start)]
        while open_parts:
            position, where, x_node = open_parts.pop()
            node = self.nodes[position]
            if node.source >= 0:
                source[where] = node.source
                draw[where] = x_node + periods[where] * np.uint64(node.weight)
                continue
            # x < weight <= 2^32 and left weight < weight, so the product and its rounding stay below 2^64.
            weight, left_weight = np.uint64(node.weight), np.uint64(self.nodes[node.left].weight)
            left_count, rest = np.divmod(x_node * left_weight + weight // np.uint64(2), weight)
            goes_left = rest + left_weight >= weight
            for child, chosen, counts in (
                (node.left, goes_left, left_count),
                (node.right, ~goes_left, x_node - left_count),
            ):
                if chosen.any():
                    open_parts.append((child, where[chosen], counts[chosen]))
        return source, draw

    def counts(self, x: int) -> np.ndarray:
        """Returns how often each source is drawn in the first x sequences, int64 [sources]."""
        counts = np.zeros(len(self.weights), np.int64)
        open_parts = [(len(self.nodes) - 1, x)]
        while open_parts:
            position, x_node = open_parts.pop()
            node = self.nodes[position]
            if node.source >= 0:
                counts[node.source] = x_node
                continue
            left_count = (x_node * self.nodes[node.left].weight + node.weight // 2) // node.weight
            open_parts += [(node.left, left_count), (node.right, x_node - left_count)]
        return counts


def _join(nodes: list[Node], items: list[tuple[int, str, int]]) -> int:
    """Appends Huffman's tree over (weight, name, position) items and returns the position of its root."""
    queue = [(weight, order, position) for order, (weight, _, position) in enumerate(sorted(items))]
    heapq.heapify(queue)
    for order in range(len(queue), 2 * len(queue) - 1):
        (right_weight, _, right), (left_weight, _, left) = heapq.heappop(queue), heapq.heappop(queue)
        heapq.heappush(queue, (left_weight + right_weight, order, len(nodes)))
        nodes.append(Node(left_weight + right_weight, -1, left, right))
    return queue[0][2]


def integer_shares(shares: Sequence[float]) -> list[int]:
    """Returns shares as integers that add up to `PERIOD`, by largest remainder; the earlier source wins a tie."""
    exact = [Fraction(share) for share in shares]
    total = sum(exact)
    if any(share < 0 for share in exact) or not total:
        raise ValueError(f"shares must be at least 0 and not all 0, not {tuple(shares)}")
    exact = [share * PERIOD / total for share in exact]
    weights = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda s: weights[s] - exact[s])
    for source in by_remainder[: PERIOD - sum(weights)]:
        weights[source] += 1
    return weights


class MixtureIndex:
    """All sequences of a run, addressed. Small, immutable and safe to pickle.

    Args:
      stages: (number of sequences, share of each source) of every stage, in order.
      rows: rows of each source; a source that no stage draws may have none.
      seed: keys the shuffling of rows. The order of sources does not depend on it.
      names: name of each source; it keys the source's shuffling. Default: its position.
      groups: group (domain) of each source; groups are mixed as closely as sources are. Default: none.

    Raises:
      DataError: a stage draws from a source that has no rows.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, Sequence[float]]],
        rows: Sequence[int],
        seed: int,
        names: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
    ):
        self.rows = tuple(int(count) for count in rows)
        self.seed = seed
        self.names = tuple(names) if names is not None else tuple(str(s) for s in range(len(self.rows)))
        self.trees = tuple(Tree.build(shares, self.names, groups) for _, shares in stages)
        self.starts = tuple(int(x) for x in np.cumsum([0, *(count for count, _ in stages)]))
        bases = [np.zeros(len(self.rows), np.int64)]
        for tree, (count, _) in zip(self.trees, stages, strict=True):
            bases.append(bases[-1] + tree.counts(int(count)))
        self._bases = tuple(bases)
        self._keys = np.array([text_key(int(seed), str(name)) for name in self.names], np.uint64)
        for name, count, drawn in zip(self.names, self.rows, bases[-1], strict=True):
            if drawn and count < 1:
                raise DataError(
                    f"data.sources[{name}]",
                    None,
                    f"has {count} rows, and the stages draw {drawn}",
                    "give it more documents or take it out of the mixture",
                )

    @property
    def num_sequences(self) -> int:
        """Sequences of all stages."""
        return self.starts[-1]

    def lookup(self, indices: np.ndarray) -> Lookup:
        """Returns source, epoch and row of global sequence indices, int64 [k], in any order.

        Raises:
          IndexError: an index outside [0, num_sequences).
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_sequences:
            raise IndexError(f"sequences {indices.min()} to {indices.max()} are outside [0, {self.num_sequences})")
        stage = np.searchsorted(self.starts, indices, side="right") - 1
        source = np.empty(indices.shape, np.int32)
        draw = np.empty(indices.shape, np.int64)
        for number in np.unique(stage):
            where = stage == number
            source[where], within = self.trees[number].lookup(indices[where] - self.starts[number])
            draw[where] = within + self._bases[number][source[where]]
        rows = np.array(self.rows, np.uint64)[source]
        epoch, position = np.divmod(draw.astype(np.uint64), rows)
        row = permute(position, rows, mix(self._keys[source] + mix(epoch)))
        return Lookup(source, epoch.astype(np.int64), row.astype(np.int64))

    def draws(self, x: int) -> np.ndarray:
        """Returns how often each source is drawn in the first x sequences of the run, int64 [sources]."""
        if not 0 <= x <= self.num_sequences:
            raise IndexError(f"prefix {x} is outside [0, {self.num_sequences}]")
        stage = min(int(np.searchsorted(self.starts, x, side="right")) - 1, len(self.trees) - 1)
        return self._bases[stage] + self.trees[stage].counts(x - self.starts[stage])
