"""Heads of a (batch, sequence, heads, head size) array, one at a time, from and to blocks in vector memory.

A block holds several heads, whose rows lie interleaved. Loads and stores with a stride pick one head out; two rows of
bfloat16 share a 32-bit word with another head, so two heads are picked and their halves swapped. Head sizes and head
counts for which the tiling of the memory gives no even stride are read as (batch, sequence, heads x head size), which
costs XLA a copy of the array.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import target

LANES = 128
_TILED = (2, 4, 8, 16)  # heads of a block that fill whole tiles


@dataclasses.dataclass(frozen=True)
class HeadBlocks:
    """How the heads of one array are cut into blocks.

    Attributes:
      heads: of the array.
      size: of a head.
      block: heads of a block.
      direct: the array is taken as it is, in four dimensions.
    """

    heads: int
    size: int
    block: int
    direct: bool

    @classmethod
    def of(cls, heads: int, size: int, together: int, dtype, exact: bool = False) -> "HeadBlocks | None":
        """Blocks that hold `together` heads each in one block; `exact`: those and no others. None: there is none."""
        itemsize = jnp.dtype(dtype).itemsize
        for block in [together] if exact else [n for n in range(together, heads + 1, together) if heads % n == 0]:
            if size == LANES and itemsize in (2, 4) and block in _TILED and (block == heads or block % 8 == 0):
                return cls(heads, size, block, True)
        for block in [together] if exact else [n for n in range(together, heads + 1, together) if heads % n == 0]:
            if block == heads or (block * size) % LANES == 0:
                return cls(heads, size, block, False)
        return None

    def array(self, x: jax.Array) -> jax.Array:
        """The array in the shape that the kernel takes."""
        return x if self.direct else x.reshape(*x.shape[:2], -1)

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Of the array as the kernel takes it."""
        return (batch, length, self.heads, self.size) if self.direct else (batch, length, self.heads * self.size)

    def spec(self, rows: int, index) -> pl.BlockSpec:
        """Blocks of `rows` positions; `index` gives (batch row, block of positions, block of heads)."""
        if self.direct:
            return pl.BlockSpec((1, rows, self.block, self.size), lambda *at: (*index(*at), 0))
        return pl.BlockSpec((1, rows, self.block * self.size), index)

    def load(self, ref, head: int) -> jax.Array:
        """One head of a block, [rows, size]."""
        if not self.direct:
            return ref[0, :, head * self.size : (head + 1) * self.size]
        if target.current().interpret:  # the interpreter has no views of references
            return ref[0, :, head, :]
        rows = ref.shape[1]
        if ref.dtype.itemsize == 4:
            return ref.at[0].reshape(rows * self.block, self.size)[pl.ds(head, rows, stride=self.block), :]
        stride = self.block // 2
        words = ref.at[0].bitcast(jnp.uint32).reshape(rows * stride, self.size)
        even = words[pl.ds(head // 2, rows // 2, stride=2 * stride), :]
        odd = words[pl.ds(head // 2 + stride, rows // 2, stride=2 * stride), :]
        return pltpu.bitcast(swap_halves(even, odd)[head % 2], ref.dtype)

    def store(self, ref, heads) -> None:
        """Writes all heads of a block; `heads(n)` gives head n, [rows, size] in the dtype of `ref`."""
        if not self.direct:
            for n in range(self.block):
                ref[0, :, n * self.size : (n + 1) * self.size] = heads(n)
            return
        rows = ref.shape[1]
        if target.current().interpret:
            for n in range(self.block):
                ref[0, :, n, :] = heads(n)
            return
        if ref.dtype.itemsize == 4:
            view = ref.at[0].reshape(rows * self.block, self.size)
            for n in range(self.block):
                view[pl.ds(n, rows, stride=self.block), :] = heads(n)
            return
        stride = self.block // 2
        words = ref.at[0].bitcast(jnp.uint32).reshape(rows * stride, self.size)
        for n in range(stride):
            pair = (pltpu.bitcast(heads(2 * n + k), jnp.uint32) for k in range(2))
            even, odd = swap_halves(*pair)
            words[pl.ds(n, rows // 2, stride=2 * stride), :] = even
            words[pl.ds(n + stride, rows // 2, stride=2 * stride), :] = odd


def swap_halves(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low halves of the words of `a` and `b`, and their high halves: its own inverse.

    A word holds one position of two heads, or, in a vector register of one head, two positions.
    """
    return (a & 0xFFFF) | (b << 16), (a >> 16) | ((b >> 16) << 16)


@dataclasses.dataclass(frozen=True)
class Units:
    """Heads that one step of the grid works on.

    Attributes:
      q: blocks of query heads; a unit is one of them.
      kv: blocks of key heads.
      ratio: query heads to one key head.
    """

    q: HeadBlocks
    kv: HeadBlocks
    ratio: int

    @property
    def count(self) -> int:
        return self.q.heads // self.q.block

    @property
    def kv_heads(self) -> int:
        """Key heads that a unit reads."""
        return max(1, self.q.block // self.ratio)

    @property
    def sharing(self) -> int:
        """Query heads of a unit that read the same key head."""
        return min(self.ratio, self.q.block)

    def kv_block(self, unit):
        """The block of key heads that holds those of a unit."""
        return unit * self.q.block // self.ratio // self.kv.block

    def each_kv(self, unit, action) -> None:
        """Calls `action(n, head)` for the unit's key head n, which is `head` of its block."""
        offset = (unit * self.q.block // self.ratio) % self.kv.block
        for start in range(0, self.kv.block, self.kv_heads):

            def run(start=start):
                for n in range(self.kv_heads):
                    action(n, start + n)

            run() if self.kv.block == self.kv_heads else pl.when(offset == start)(run)


@functools.cache
def units(q_heads: int, kv_heads: int, size: int, dtype, together: int | None = None) -> Units:
    """The largest units of at most `together` query heads (8 if None) that need no copy of the queries, else any."""
    ratio = q_heads // kv_heads
    candidates = []
    for n in range(1, q_heads + 1):
        if q_heads % n or (n % ratio and ratio % n):
            continue
        q = HeadBlocks.of(q_heads, size, n, dtype, exact=True)
        kv = HeadBlocks.of(kv_heads, size, max(1, n // ratio), dtype)
        if q and kv:
            candidates.append(Units(q, kv, ratio))
    within = [u for u in candidates if u.q.block <= (together or 8)]
    pool = within or candidates[:1]
    return max(pool, key=lambda u: (u.q.direct, u.q.block))


def block_bytes(blocks: HeadBlocks, rows: int, dtype) -> int:
    """Vector memory of one block; lanes fill up whole tiles."""
    size = blocks.size if blocks.direct else blocks.block * blocks.size
    lanes = math.ceil(size / LANES) * LANES
    return rows * lanes * (blocks.block if blocks.direct else 1) * jnp.dtype(dtype).itemsize
