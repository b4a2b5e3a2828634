"""Attention backward on Hopper in one pass of five matrix products, in Mosaic GPU (arXiv 2407.08608, section B.1).

A block owns a tile of keys and values, and goes over the queries that see it. Scores are held transposed, keys along
the rows, so that P and dS are left operands in registers for dV += P^T dO and dK += dS^T Q. Only dQ = dS K needs dS of
both computing warpgroups: it passes through shared memory, and each warpgroup multiplies one half of dQ, which the
copy engine adds to a float32 array in global memory. The order of those additions is not fixed.
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

ROWS = 64  # of keys per warpgroup, and rows and columns of a part of dQ
WARPGROUPS = 2
BLOCK_KV = ROWS * WARPGROUPS
LOADER = WARPGROUPS  # the index of the warpgroup that loads
SCORE_STAGES = 2  # dS of one step is still read while that of the next is written


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one kernel is specialised for."""

    spec: AttentionSpec
    head_dim: int
    stages: int
    groups: int
    heads_per_group: int
    splits: int

    @property
    def strips(self) -> int:
        """Strips of 64 queries in a step: so many that dQ of a step is 64 x 64 for each warpgroup."""
        return ROWS * WARPGROUPS // self.head_dim

    @property
    def block_q(self) -> int:
        return ROWS * self.strips

    @property
    def heads(self) -> int:
        """Query heads that one block goes over."""
        return self.heads_per_group // self.splits

    def share(self, warpgroup: jax.Array) -> tuple[jax.Array | int, Any]:
        """The strip of queries and the columns of dQ that a warpgroup multiplies."""
        if self.strips == 1:
            return 0, pl.ds(warpgroup * ROWS, ROWS)
        return warpgroup, pl.ds(0, ROWS)


def backward(q, k, v, lse, delta, dout, limits: hopper_ranges.Bounds, *, spec: AttentionSpec, stages: int, splits: int):
    """q, dout [B,T,H,K], k, v [B,S,G,K], lse, delta [B,H,T] -> dq, dk, dv. `splits` blocks share a group's heads."""
    (batch, queries, heads, head_dim), (keys, groups) = q.shape, k.shape[1:3]
    plan = _Plan(spec, head_dim, stages, groups, heads // groups, splits)
    ranges = hopper_ranges.tile_ranges(limits, plan.block_q, BLOCK_KV, keys, of="kv")
    limits = limits.padded(plan.block_q, BLOCK_KV)
    qp, doutp = (hopper_ranges.padded(x, plan.block_q, 1) for x in (q, dout))
    kp, vp = (hopper_ranges.padded(x, BLOCK_KV, 1) for x in (k, v))
    # An infinite sum makes all probabilities of a row zero.
    lse = hopper_ranges.padded(lse * hopper_scores.LOG2E, plan.block_q, 2, constant_values=jnp.inf)
    delta = hopper_ranges.padded(delta, plan.block_q, 2)
    tiles = kp.shape[1] // BLOCK_KV
    operands = (qp, kp, vp, doutp, lse, delta, *(jnp.asarray(x) for x in (ranges, *limits.arrays())))
    sums = [qp] if splits == 1 else [qp, kp, vp]  # what several blocks add to
    totals = [jax.new_ref(jnp.zeros(x.shape, jnp.float32), memory_space=plgpu.GMEM) for x in sums]
    direct = device.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=[out_struct(x.shape, x.dtype, x) for x in ([kp, vp] if splits == 1 else [])],
        scratch_types=_scratch(plan, q.dtype),
        blocks=tiles * batch * groups * splits,
        warpgroups=WARPGROUPS + 1,
        name="attention_backward",
    )(*operands, *totals)
    dq, *summed = (total[...] for total in totals)
    dq = (dq[:, :queries] * spec.scale).astype(q.dtype)
    dk, dv = (x[:, :keys].astype(k.dtype) for x in (summed or direct))
    return dq, dk, dv


def _scratch(plan: _Plan, dtype):
    kv = device.tiled((WARPGROUPS, ROWS, plan.head_dim), dtype)  # dk and dv leave through here
    per_query = device.tiled((plan.stages, plan.block_q, plan.head_dim), dtype)
    vector = plgpu.SMEM((plan.stages, plan.block_q), jnp.float32)
    return {
        "smem": {
            "k": kv,
            "v": kv,
            "q": per_query,
            "dout": per_query,
            "lse": vector,
            "delta": vector,
            "ds": device.tiled((SCORE_STAGES, WARPGROUPS, plan.strips, ROWS, ROWS), dtype),
            "dq": device.tiled((WARPGROUPS, ROWS, ROWS), jnp.float32),
        },
        "barriers": {
            "kv": plgpu.Barrier(num_arrivals=2 * WARPGROUPS),
            "q": plgpu.Barrier(num_arrivals=3, num_barriers=plan.stages),  # with lse and delta
            "dout": plgpu.Barrier(num_barriers=plan.stages),
            "q_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=plan.stages),
            "dout_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=plan.stages),
            "ds": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
        "imitations": device.imitated([*[(ROWS, plan.head_dim)] * 2, *[(ROWS, ROWS)] * 3], WARPGROUPS),
    }


def _kernel(q, k, v, dout, lse, delta, ranges, first, last, *refs, plan: _Plan, smem, barriers, imitations):
    *positions, dq, dk, dv = refs
    warpgroup = lax.axis_index("wg")
    block = _Block.current(plan, ranges, k.shape[0])

    @pl.when(warpgroup == LOADER)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _load_keys(block, k, v, smem, barriers)
        _load_queries(block, q, dout, lse, delta, smem, barriers)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        worker = _Worker(block, (first, last, *positions), smem, barriers, imitations, warpgroup)
        worker.write(worker.gradients(dq), (dk, dv))
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Block:
    """What one block works on: a tile of keys of one key head, and the queries that see any of them.

    Attributes:
      batch, group: row of the batch, and key head.
      keys: the first key of the tile.
      first_head: the first of the `plan.heads` query heads.
      start, end: tiles of queries that see some of the keys.
      full_start, full_end: those among them that see all of the keys.
    """

    plan: _Plan
    batch: jax.Array
    group: jax.Array
    keys: jax.Array
    first_head: jax.Array
    start: jax.Array
    full_start: jax.Array
    full_end: jax.Array
    end: jax.Array

    @classmethod
    def current(cls, plan: _Plan, ranges, batch_size: int) -> Self:
        """The block that this program runs for; `ranges` as `hopper_ranges.tile_ranges` gives them."""
        # The first keys are seen by most queries when causal: they go first, so that short blocks fill the gaps at
        # the end.
        rest, split = _divmod(lax.axis_index("block"), plan.splits)
        rest, group = _divmod(rest, plan.groups)
        tile, batch = _divmod(rest, batch_size)
        start, full_start, full_end, end = (ranges[hopper_scores.shared(ranges, batch), tile, i] for i in range(4))
        first_head = group * plan.heads_per_group + split * plan.heads
        return cls(plan, batch, group, tile * BLOCK_KV, first_head, start, full_start, full_end, end)

    def for_each_step(self, body: Callable[[jax.Array, jax.Array, jax.Array], None]) -> None:
        """`body` of a running number, the query head and the tile of queries."""

        def over_heads(i, _):
            def over_queries(j, _):
                body(i * (self.end - self.start) + j - self.start, self.first_head + i, j)

            lax.fori_loop(self.start, self.end, over_queries, None)

        lax.fori_loop(0, self.plan.heads, over_heads, None)


def _load_keys(block: _Block, k, v, smem, barriers) -> None:
    """Starts the copies of the block's keys and values, which stay in shared memory."""
    for name, source in (("k", k), ("v", v)):
        for i in range(WARPGROUPS):
            window = (block.batch, pl.ds(block.keys + i * ROWS, ROWS), block.group)
            plgpu.copy_gmem_to_smem(source.at[window], smem[name].at[i], barriers["kv"])


def _load_queries(block: _Block, q, dout, lse, delta, smem, barriers) -> None:
    """Copies what each step needs of its queries, ahead of the warpgroups that compute."""
    plan = block.plan

    def load(step, head, index):
        slot, window = lax.rem(step, plan.stages), pl.ds(index * plan.block_q, plan.block_q)
        for name, source in (("q", q), ("dout", dout)):
            device.wait_if(step >= plan.stages, barriers[name + "_free"].at[slot])
            part = source.at[block.batch, window, head]
            plgpu.copy_gmem_to_smem(part, smem[name].at[slot], barriers[name].at[slot])
            if name == "q":
                for along, vector in (("lse", lse), ("delta", delta)):
                    part = vector.at[block.batch, head, window]
                    plgpu.copy_gmem_to_smem(part, smem[along].at[slot], barriers["q"].at[slot])

    block.for_each_step(load)

    # Every arrival is observed, also those that nothing waits for any more.
    def drain(step, _):
        for name in ("q_free", "dout_free"):
            plgpu.barrier_wait(barriers[name].at[lax.rem(step, plan.stages)])

    total = (block.end - block.start) * plan.heads
    lax.fori_loop(jnp.maximum(total - plan.stages, 0), total, drain, None)


def _divmod(x: jax.Array, y: int) -> tuple[jax.Array, jax.Array]:
    return lax.div(x, y), lax.rem(x, y)


def _replace(place, value: jax.Array) -> None:
    """Writes to shared memory once the copy engine has read what it holds, and makes it visible to that engine."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    place[...] = value
    plgpu.commit_smem()


def _store(values: Sequence[jax.Array], places: Sequence[Any], destinations: Sequence[Any]) -> None:
    for value, place, destination in zip(values, places, destinations, strict=True):
        place[...] = value.astype(place.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(place, destination)


def _add(values: Sequence[jax.Array], place, destinations: Sequence[Any]) -> None:
    for value, destination in zip(values, destinations, strict=True):
        for column in range(0, value.shape[1], ROWS):
            _replace(place, value[:, column : column + ROWS])
            device.add_to_gmem(place, destination.at[:, pl.ds(column, ROWS)])


@dataclasses.dataclass(frozen=True)
class _Worker:
    """One of the two warpgroups that compute: for its half of the block's keys, and for its share of dQ.

    `limits` are references to the arrays of `hopper_ranges.Bounds`.
    """

    block: _Block
    limits: Sequence[Any]
    smem: dict[str, Any]
    barriers: dict[str, Any]
    imitations: Sequence[Any]
    warpgroup: jax.Array

    @property
    def plan(self) -> _Plan:
        return self.block.plan

    def gradients(self, dq) -> tuple[jax.Array, jax.Array]:
        """dK and dV of this warpgroup's keys; dQ is added to `dq` on the way."""

        def run(dk, dv):
            plgpu.barrier_wait(self.barriers["kv"])
            self.block.for_each_step(lambda *step: self._step(*step, dk, dv, dq))
            self._rendezvous()  # nobody reads keys any more: their place is free for results
            return dk.read() * self.plan.spec.scale, dv.read()

        shape = (ROWS, self.plan.head_dim)
        return device.accumulators(run, [shape, shape], self.imitations[:2], self.warpgroup)

    def write(self, gradients: Sequence[jax.Array], results: Sequence[Any]) -> None:
        """Starts the copies of dK and dV to global memory, or their addition where several blocks share them."""
        window = (self.block.batch, pl.ds(self.block.keys + self.warpgroup * ROWS, ROWS), self.block.group)
        if self.plan.splits == 1:
            places = [self.smem[name].at[self.warpgroup] for name in ("k", "v")]
            _store(gradients, places, [x.at[window] for x in results])
        else:
            _add(gradients, self.smem["dq"].at[self.warpgroup], [x.at[window] for x in results])

    def _step(self, number: jax.Array, head: jax.Array, index: jax.Array, dk, dv, dq) -> None:
        """Adds all that one tile of queries of one head gives."""
        plan, smem = self.plan, self.smem
        slot, stage = lax.rem(number, plan.stages), lax.rem(number, SCORE_STAGES)
        plgpu.barrier_wait(self.barriers["q"].at[slot])
        ds = [self._score_gradients(slot, index, strip, dv) for strip in range(plan.strips)]
        for strip in range(plan.strips):
            smem["ds"].at[stage, self.warpgroup, strip][...] = ds[strip]
        plgpu.commit_smem()
        self._rendezvous()

        def dq_share(products):
            strip, columns = plan.share(self.warpgroup)
            for i in range(WARPGROUPS):
                products.add(smem["ds"].at[stage, i, strip], smem["k"].at[i, :, columns], transposed="a")
            for i in range(plan.strips):
                dk.add(ds[i], smem["q"].at[slot, pl.ds(i * ROWS, ROWS)])
            return products.read(in_flight=plan.strips)  # dV is done too then

        share = device.accumulators(dq_share, [(ROWS, ROWS)], self.imitations[4:], self.warpgroup)
        plgpu.barrier_arrive(self.barriers["dout_free"].at[slot])
        self._add_dq(share, dq, head, index)
        device.wait_for_products()
        plgpu.barrier_arrive(self.barriers["q_free"].at[slot])

    def _score_gradients(self, slot: jax.Array, index: jax.Array, strip: int, dv) -> jax.Array:
        """dS of one strip of queries, transposed, without the scale; starts what the strip adds to `dv`."""
        spec, shape, smem = self.plan.spec, (ROWS, ROWS), self.smem
        rows = (slot, pl.ds(strip * ROWS, ROWS))
        factor = hopper_scores.exponent(spec)

        def run(scores, dp):
            # Sums that start from what would be subtracted afterwards keep registers free.
            def log_sum():
                return device.columns(device.load_vector(smem["lse"].at[rows], reduced=0), shape)

            if hopper_scores.linear(spec):
                scores.set(log_sum() * (-1 / factor))
            dp.set(-device.columns(device.load_vector(smem["delta"].at[rows], reduced=0), shape))
            scores.add(smem["k"].at[self.warpgroup], smem["q"].at[rows], transposed="b")
            if strip == 0:
                plgpu.barrier_wait(self.barriers["dout"].at[slot])
            dp.add(smem["v"].at[self.warpgroup], smem["dout"].at[rows], transposed="b")
            s = hopper_scores.capped(scores.read(in_flight=1), spec)
            exponents = self._visible(s, index, strip) * factor
            p = jnp.exp2(exponents if hopper_scores.linear(spec) else exponents - log_sum())
            slope = hopper_scores.uncapped(p, s, spec)  # now, so that `s` need not be kept while products run
            dv.add(p.astype(smem["dout"].dtype), smem["dout"].at[rows])
            return (slope * dp.read(in_flight=1)).astype(smem["q"].dtype)

        return device.accumulators(run, [shape, shape], self.imitations[2:4], self.warpgroup)

    def _visible(self, scores: jax.Array, index: jax.Array, strip: int) -> jax.Array:
        """Scores of one strip of queries, -inf where a query does not see a key."""
        block = self.block

        def masked(x):
            window = pl.ds(index * self.plan.block_q + strip * ROWS, ROWS)
            mask = hopper_scores.Mask(self.limits, block.batch, window, (ROWS, ROWS), queries_along=1)
            return mask(x, block.keys + self.warpgroup * ROWS, -jnp.inf)

        return lax.cond((index >= block.full_start) & (index < block.full_end), lambda x: x, masked, scores)

    def _add_dq(self, value: jax.Array, dq, head: jax.Array, index: jax.Array) -> None:
        """Starts the addition of this warpgroup's share of dQ for one tile of queries."""
        strip, columns = self.plan.share(self.warpgroup)
        place = self.smem["dq"].at[self.warpgroup]
        _replace(place, value)
        rows = pl.ds(index * self.plan.block_q + strip * ROWS, ROWS)
        device.add_to_gmem(place, dq.at[self.block.batch, rows, head, columns])

    def _rendezvous(self) -> None:
        """Waits for the other warpgroup to come here too."""
        plgpu.barrier_arrive(self.barriers["ds"])
        plgpu.barrier_wait(self.barriers["ds"])
