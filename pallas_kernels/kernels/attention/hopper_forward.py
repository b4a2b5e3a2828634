"""Attention forward on Hopper: FlashAttention-3 (arXiv 2407.08608) in Mosaic GPU.

One warpgroup loads tiles of keys and values, two compute, each for its own rows of queries. Scores of tile i + 1 are
multiplied on the tensor cores while tile i goes through the softmax, and the two warpgroups take turns at starting
products, so that the softmax of one hides behind the products of the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kernels import hopper_device as device
from pallas_kernels.kernels.attention import hopper_ranges, hopper_scores
from pallas_kernels.kernels.attention.spec import AttentionSpec
from pallas_kernels.partition import out_struct

ROWS = 64  # of queries per warpgroup: the height of one tensor-core instruction
WARPGROUPS = 2
BLOCK_Q = ROWS * WARPGROUPS
LOADER = WARPGROUPS  # the index of the warpgroup that loads


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one kernel is specialised for."""

    spec: AttentionSpec
    block_kv: int
    stages: int
    heads: int
    heads_per_group: int
    q_tiles: int
    head_dim: int


def forward(q, k, v, limits: hopper_ranges.Bounds, *, spec: AttentionSpec, block_kv: int, stages: int):
    """q [B,T,H,K], k, v [B,S,G,K] -> out [B,T,H,K], lse float32 [B,H,T]."""
    (batch, queries, heads, head_dim), (keys, groups) = q.shape, k.shape[1:3]
    ranges = hopper_ranges.tile_ranges(limits, BLOCK_Q, block_kv, keys, of="q")
    q = hopper_ranges.padded(q, BLOCK_Q, 1)
    k, v = (hopper_ranges.padded(x, block_kv, 1) for x in (k, v))
    limits = limits.padded(BLOCK_Q, block_kv)
    length = q.shape[1]
    plan = _Plan(spec, block_kv, stages, heads, heads // groups, length // BLOCK_Q, head_dim)
    out, lse = device.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(out_struct(q.shape, q.dtype, q), out_struct((batch, heads, length), jnp.float32, q)),
        scratch_types=_scratch(plan, q.dtype),
        blocks=plan.q_tiles * batch * heads,
        warpgroups=WARPGROUPS + 1,
        name="attention_forward",
    )(q, k, v, *(jnp.asarray(x) for x in (ranges, *limits.arrays())))
    return out[:, :queries], lse[:, :, :queries]


def _scratch(plan: _Plan, dtype):
    kv = device.tiled((plan.stages, plan.block_kv, plan.head_dim), dtype)
    return {
        "smem": {
            "q": device.tiled((WARPGROUPS, ROWS, plan.head_dim), dtype),  # the output leaves through here
            "k": kv,
            "v": kv,
            "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        },
        "barriers": {
            "q": plgpu.Barrier(num_barriers=WARPGROUPS),
            "k": plgpu.Barrier(num_barriers=plan.stages),
            "v": plgpu.Barrier(num_barriers=plan.stages),
            "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=plan.stages),
            "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=plan.stages),
            "turn": plgpu.Barrier(num_barriers=WARPGROUPS),
        },
        "imitations": device.imitated([(ROWS, plan.head_dim), (ROWS, plan.block_kv)], WARPGROUPS),
    }


def _kernel(q, k, v, ranges, first, last, *refs, plan: _Plan, smem, barriers, imitations):
    *positions, out, lse = refs
    warpgroup = lax.axis_index("wg")
    block = _Block.current(plan, ranges)

    @pl.when(warpgroup == LOADER)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _load_keys(block, k, v, smem, barriers)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        rows = (block.batch, pl.ds(block.tile * BLOCK_Q + warpgroup * ROWS, ROWS), block.head)
        own = {name: smem[name].at[warpgroup] for name in ("q", "lse")}
        plgpu.copy_gmem_to_smem(q.at[rows], own["q"], barriers["q"].at[warpgroup])
        limits, tile = (first, last, *positions), (ROWS, plan.block_kv)
        mask = hopper_scores.Mask(limits, block.batch, rows[1], tile, queries_along=0)
        plgpu.barrier_wait(barriers["q"].at[warpgroup])
        worker = _Worker(block, mask, own["q"], smem, barriers, imitations, warpgroup)
        result, log_sum = worker.attend()
        own["q"][...] = result.astype(out.dtype)
        own["lse"][...] = log_sum
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own["q"], out.at[rows])
        plgpu.copy_smem_to_gmem(own["lse"], lse.at[block.batch, block.head, rows[1]])
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Block:
    """What one block works on: a tile of queries of one head, and the keys that any of them sees.

    Attributes:
      batch, head, tile: of the queries.
      start, end: tiles of keys that some of the queries see, at least one.
      full_start, full_end: those among them that all of the queries see.
    """

    plan: _Plan
    batch: jax.Array
    head: jax.Array
    tile: jax.Array
    start: jax.Array
    full_start: jax.Array
    full_end: jax.Array
    end: jax.Array

    @classmethod
    def current(cls, plan: _Plan, ranges) -> Self:
        """The block that this program runs for; `ranges` as `hopper_ranges.tile_ranges` gives them."""
        # Late rows of queries see most keys when causal: they go first, so that short blocks fill the gaps at the end.
        block = lax.axis_index("block")
        rest, head = lax.div(block, plan.heads), lax.rem(block, plan.heads)
        batch, tile = lax.div(rest, plan.q_tiles), lax.rem(rest, plan.q_tiles)
        tile = plan.q_tiles - 1 - tile if plan.spec.causal else tile
        start, full_start, full_end, end = (ranges[hopper_scores.shared(ranges, batch), tile, i] for i in range(4))
        end = jnp.maximum(end, start + 1)  # a masked tile where there is none: blind rows need no path of their own
        return cls(plan, batch, head, tile, start, full_start, full_end, end)


def _load_keys(block: _Block, k, v, smem, barriers) -> None:
    """Copies tiles of keys and of values, ahead of the warpgroups that compute."""
    plan, start, end = block.plan, block.start, block.end
    group = lax.div(block.head, plan.heads_per_group)

    def load(step, _):
        slot = lax.rem(step, plan.stages)
        window = (block.batch, pl.ds((start + step) * plan.block_kv, plan.block_kv), group)
        for name, source in (("k", k), ("v", v)):
            device.wait_if(step >= plan.stages, barriers[name + "_free"].at[slot])
            plgpu.copy_gmem_to_smem(source.at[window], smem[name].at[slot], barriers[name].at[slot])

    lax.fori_loop(0, end - start, load, None)

    # Every arrival is observed, also those that nothing waits for any more.
    def drain(step, _):
        slot = lax.rem(step, plan.stages)
        plgpu.barrier_wait(barriers["k_free"].at[slot])
        plgpu.barrier_wait(barriers["v_free"].at[slot])

    lax.fori_loop(jnp.maximum(end - start - plan.stages, 0), end - start, drain, None)


@dataclasses.dataclass(frozen=True)
class _Worker:
    """One of the two warpgroups that compute."""

    block: _Block
    mask: hopper_scores.Mask
    q: Any
    smem: dict[str, Any]
    barriers: dict[str, Any]
    imitations: Sequence[Any]
    warpgroup: jax.Array

    @property
    def plan(self) -> _Plan:
        return self.block.plan

    def attend(self) -> tuple[jax.Array, jax.Array]:
        """Attention over the block's tiles of keys: the output and the log-sum-exp."""
        start, end, turn = self.block.start, self.block.end, self.barriers["turn"]

        @pl.when(self.warpgroup == 1)
        def _():
            plgpu.barrier_arrive(turn.at[0])  # warpgroup 0 begins

        def run(out):
            scores = self._scores(0, lambda: None, in_flight=0)
            lowest = device.full((ROWS,), -jnp.inf, reduced=1)
            nothing = device.full((ROWS,), 0.0, reduced=1)
            p, top, total, _ = self._softmax(self._visible(scores, start), lowest, nothing)

            def step(i, carry):
                p, top, total = carry
                scores = self._scores(i, lambda: self._add_values(out, p, i - 1), in_flight=1)
                p, top, total, rescale = self._softmax(self._visible(scores, start + i), top, total)
                value = out.read()
                self._release("v", i - 1)
                out.set(value * device.rows(rescale, value.shape))
                return p, top, total

            steps = end - start
            p, top, total = lax.fori_loop(1, steps, step, (p, top, total))
            self._add_values(out, p, steps - 1)
            value = out.read()
            self._release("v", steps - 1)
            return value, top, total

        shape = (ROWS, self.plan.head_dim)
        value, top, total = device.accumulators(run, [shape], self.imitations[:1], self.warpgroup)

        @pl.when(self.warpgroup == 0)
        def _():
            plgpu.barrier_wait(turn.at[0])  # the turn that is left over

        # No key is visible to a row whose sum is zero.
        safe = jnp.where(total > 0, total, 1.0)
        log_sum = jnp.where(total > 0, top / hopper_scores.LOG2E + jnp.log(safe), -jnp.inf)
        return value * device.rows(1.0 / safe, shape), log_sum

    def _scores(self, i: int | jax.Array, meanwhile: Callable[[], None], in_flight: int) -> jax.Array:
        """Queries times the keys of tile `i`; `meanwhile` starts products that stay in flight behind these."""
        slot, turn = lax.rem(jnp.int32(i), self.plan.stages), self.barriers["turn"]
        plgpu.barrier_wait(self.barriers["k"].at[slot])
        plgpu.barrier_wait(turn.at[self.warpgroup])

        def start(products):
            products.add(self.q, self.smem["k"].at[slot], transposed="b")
            meanwhile()
            plgpu.barrier_arrive(turn.at[1 - self.warpgroup])
            return products.read(in_flight)

        shape = (ROWS, self.plan.block_kv)
        scores = device.accumulators(start, [shape], self.imitations[1:], self.warpgroup)
        self._release("k", i)
        return scores

    def _visible(self, scores: jax.Array, index: jax.Array) -> jax.Array:
        """Soft-capped scores of a tile of keys, -inf where a query does not see a key."""
        block = self.block
        scores = hopper_scores.capped(scores, self.plan.spec)
        whole = (index >= block.full_start) & (index < block.full_end)
        return lax.cond(whole, lambda x: x, lambda x: self.mask(x, index * self.plan.block_kv, -jnp.inf), scores)

    def _add_values(self, out, p: jax.Array, i: jax.Array) -> None:
        slot = lax.rem(i, self.plan.stages)
        plgpu.barrier_wait(self.barriers["v"].at[slot])
        out.add(p, self.smem["v"].at[slot])

    def _release(self, name: str, i: int | jax.Array) -> None:
        plgpu.barrier_arrive(self.barriers[name + "_free"].at[lax.rem(jnp.int32(i), self.plan.stages)])

    def _softmax(self, scores: jax.Array, top: jax.Array, total: jax.Array):
        """One step of the online softmax, in powers of two.

        Returns:
          the unnormalised probabilities, the new maximum and sum of each row, and what earlier values are scaled by.
        """
        factor = hopper_scores.exponent(self.plan.spec)
        new_top = jnp.maximum(top, scores.max(axis=1) * factor)
        safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        rescale = jnp.exp2(top - safe)
        p = jnp.exp2(scores * factor - device.rows(safe, scores.shape))
        return p.astype(self.smem["v"].dtype), new_top, total * rescale + p.sum(axis=1), rescale
