"""Attention backward on Hopper in one pass of five matrix products, in Mosaic GPU (arXiv 2407.08608, section B.1).

A block owns a tile of keys and values, and goes over the queries that see it. Scores are held transposed, keys along
the rows, so that P and dS are left operands in registers for dV += P^T dO and dK += dS^T Q. Only dQ = dS K needs dS of
both computing warpgroups: it passes through shared memory, and each warpgroup multiplies one half of dQ, which the
copy engine adds to a float32 array in global memory. The order of those additions is not fixed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kernels.attention import hopper_device as device
from pallas_kernels.kernels.attention import hopper_ranges
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
    def block_q(self) -> int:
        """So many that dQ of a step is one part of 64 x 64 for each warpgroup."""
        return ROWS * ROWS * WARPGROUPS // self.head_dim

    @property
    def heads(self) -> int:
        """Query heads that one block goes over."""
        return self.heads_per_group // self.splits

    def part(self, warpgroup: jax.Array) -> tuple[Any, Any]:
        """Rows and columns of dQ that are a warpgroup's own."""
        own, everything = pl.ds(warpgroup * ROWS, ROWS), pl.ds(0, ROWS)
        return (own, everything) if self.head_dim == ROWS else (everything, own)


def backward(
    q, k, v, lse, delta, dout, limits: hopper_ranges.Bounds, *, spec: AttentionSpec, stages: int, splits: int
):
    """q, dout [B,T,H,K], k, v [B,S,G,K], lse, delta [B,H,T] -> dq, dk, dv. `splits` blocks share a group's heads."""
    (batch, queries, heads, head_dim), (keys, groups) = q.shape, k.shape[1:3]
    plan = _Plan(spec, head_dim, stages, groups, heads // groups, splits)
    ranges = hopper_ranges.tile_ranges(limits, plan.block_q, BLOCK_KV, keys, of="kv")
    limits = limits.padded(plan.block_q, BLOCK_KV)
    qp, doutp = (hopper_ranges.padded(x, plan.block_q, 1) for x in (q, dout))
    kp, vp = (hopper_ranges.padded(x, BLOCK_KV, 1) for x in (k, v))
    # An infinite sum makes all probabilities of a row zero.
    lse = hopper_ranges.padded(lse * device.LOG2E, plan.block_q, 2, constant_values=jnp.inf)
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
    return dict(
        smem=dict(
            k=kv,
            v=kv,
            q=per_query,
            dout=per_query,
            lse=vector,
            delta=vector,
            ds=device.tiled((SCORE_STAGES, WARPGROUPS, ROWS, plan.block_q), dtype),
            dq=device.tiled((WARPGROUPS, ROWS, ROWS), jnp.float32),
        ),
        barriers=dict(
            kv=plgpu.Barrier(num_arrivals=2 * WARPGROUPS),
            q=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            dout=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            q_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=plan.stages),
            dout_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=plan.stages),
            ds=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        imitations=device.imitated([*[(ROWS, plan.head_dim)] * 2, *[(ROWS, plan.block_q)] * 2, (ROWS, ROWS)], WARPGROUPS),
    )


def _kernel(q, k, v, dout, lse, delta, ranges, first, last, *refs, plan: _Plan, smem, barriers, imitations):
    refs, results = refs[:-3], refs[-3:]
    limits = (first, last, *refs)
    warpgroup = lax.axis_index("wg")
    # The first keys are seen by most queries when causal: they go first, so that short blocks fill the gaps at the end.
    rest, split = _divmod(lax.axis_index("block"), plan.splits)
    rest, group = _divmod(rest, plan.groups)
    tile, batch = _divmod(rest, k.shape[0])
    start, full_start, full_end, end = (ranges[device.shared(ranges, batch), tile, i] for i in range(4))
    first_head = group * plan.heads_per_group + split * plan.heads
    keys = tile * BLOCK_KV

    def steps(body: Callable[[jax.Array, jax.Array, jax.Array], None]) -> None:
        """`body` of a running number, the query head and the tile of queries."""

        def over_heads(i, _):
            def over_queries(j, _):
                body(i * (end - start) + j - start, first_head + i, j)

            lax.fori_loop(start, end, over_queries, None)

        lax.fori_loop(0, plan.heads, over_heads, None)

    @pl.when(warpgroup == LOADER)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        for name, source in (("k", k), ("v", v)):
            for i in range(WARPGROUPS):
                window = (batch, pl.ds(keys + i * ROWS, ROWS), group)
                plgpu.copy_gmem_to_smem(source.at[window], smem[name].at[i], barriers["kv"])

        def load(step, head, index):
            slot, window = lax.rem(step, plan.stages), pl.ds(index * plan.block_q, plan.block_q)
            for name, source, vector in (("q", q, lse), ("dout", dout, delta)):

                @pl.when(step >= plan.stages)
                def _():
                    plgpu.barrier_wait(barriers[name + "_free"].at[slot])

                plgpu.copy_gmem_to_smem(source.at[batch, window, head], smem[name].at[slot], barriers[name].at[slot])
                along = "lse" if name == "q" else "delta"
                plgpu.copy_gmem_to_smem(vector.at[batch, head, window], smem[along].at[slot], barriers[name].at[slot])

        steps(load)

        # Every arrival is observed, also those that nothing waits for any more.
        def drain(step, _):
            for name in ("q_free", "dout_free"):
                plgpu.barrier_wait(barriers[name].at[lax.rem(step, plan.stages)])

        total = (end - start) * plan.heads
        lax.fori_loop(jnp.maximum(total - plan.stages, 0), total, drain, None)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")

        def visible(scores, index):
            def masked(x):
                window = pl.ds(index * plan.block_q, plan.block_q)
                mask = device.Mask(limits, batch, window, (ROWS, plan.block_q), queries_along=1)
                return mask(x, keys + warpgroup * ROWS, -jnp.inf)

            return lax.cond((index >= full_start) & (index < full_end), lambda x: x, masked, scores)

        worker = _Worker(plan, smem, barriers, imitations[2:], warpgroup, visible)
        add_dq = functools.partial(_add_dq, plan, smem["dq"].at[warpgroup], results[0], batch, warpgroup)

        def run(dk, dv):
            plgpu.barrier_wait(barriers["kv"])
            steps(lambda *step: worker.step(*step, dk, dv, add_dq))
            worker.rendezvous()  # nobody reads keys any more: their place is free for results
            return dk.read() * plan.spec.scale, dv.read()

        shape = (ROWS, plan.head_dim)
        gradients = device.accumulators(run, [shape, shape], imitations[:2], warpgroup)
        places = [smem[name].at[warpgroup] for name in ("k", "v")]
        window = (batch, pl.ds(keys + warpgroup * ROWS, ROWS), group)
        if plan.splits == 1:
            _store(gradients, places, [x.at[window] for x in results[1:]])
        else:
            _add(gradients, smem["dq"].at[warpgroup], [x.at[window] for x in results[1:]])
        plgpu.wait_smem_to_gmem(0)


def _divmod(x: jax.Array, y: int) -> tuple[jax.Array, jax.Array]:
    return lax.div(x, y), lax.rem(x, y)


def _add_dq(plan: _Plan, place, dq, batch, warpgroup, value: jax.Array, head: jax.Array, index: jax.Array) -> None:
    """Starts the addition of this warpgroup's part of dQ for one tile of queries."""
    rows, columns = plan.part(warpgroup)
    rows = pl.ds(index * plan.block_q + rows.start, ROWS)
    _replace(place, value)
    device.add_to_gmem(place, dq.at[batch, rows, head, columns])


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
    """One of the two warpgroups that compute."""

    plan: _Plan
    smem: dict[str, Any]
    barriers: dict[str, Any]
    imitations: Sequence[Any]
    warpgroup: jax.Array
    visible: Callable[[jax.Array, jax.Array], jax.Array]

    def step(self, number: jax.Array, head: jax.Array, index: jax.Array, dk, dv, add_dq: Callable) -> None:
        """All that one tile of queries of one head gives: to `dk` and `dv`, and to dQ through `add_dq`."""
        plan, smem = self.plan, self.smem
        slot, stage = lax.rem(number, plan.stages), lax.rem(number, SCORE_STAGES)
        q, dout = smem["q"].at[slot], smem["dout"].at[slot]
        own_k, own_v = smem["k"].at[self.warpgroup], smem["v"].at[self.warpgroup]

        def scores(products, dp_products):
            plgpu.barrier_wait(self.barriers["q"].at[slot])
            products.add(own_k, q, transposed="b")
            plgpu.barrier_wait(self.barriers["dout"].at[slot])
            dp_products.add(own_v, dout, transposed="b")
            s = device.capped(products.read(in_flight=1), plan.spec)
            lse = device.load_vector(smem["lse"].at[slot], reduced=0)
            s_seen = self.visible(s, index)
            p = jnp.exp2(s_seen * device.exponent(plan.spec) - self._columns(lse))
            dv.add(p.astype(q.dtype), dout)
            delta = device.load_vector(smem["delta"].at[slot], reduced=0)
            ds = p * (dp_products.read(in_flight=1) - self._columns(delta))
            return device.uncapped(ds, s, plan.spec).astype(q.dtype)

        shape = (ROWS, plan.block_q)
        ds = device.accumulators(scores, [shape, shape], self.imitations[:2], self.warpgroup)
        smem["ds"].at[stage, self.warpgroup][...] = ds
        plgpu.commit_smem()
        self.rendezvous()

        def dq_part(products):
            rows, columns = plan.part(self.warpgroup)
            for i in range(WARPGROUPS):
                products.add(smem["ds"].at[stage, i, :, rows], smem["k"].at[i, :, columns], transposed="a")
            dk.add(ds, q)
            return products.read(in_flight=1)  # dV is done too then

        part = device.accumulators(dq_part, [(ROWS, ROWS)], self.imitations[2:], self.warpgroup)
        plgpu.barrier_arrive(self.barriers["dout_free"].at[slot])
        add_dq(part, head, index)
        device.wait_for_products()
        plgpu.barrier_arrive(self.barriers["q_free"].at[slot])

    def rendezvous(self) -> None:
        """Waits for the other warpgroup to come here too."""
        plgpu.barrier_arrive(self.barriers["ds"])
        plgpu.barrier_wait(self.barriers["ds"])

    def _columns(self, x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, (ROWS, self.plan.block_q), (1,))
