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
            for name, source in (("q", q), ("dout", dout)):
                device.wait_if(step >= plan.stages, barriers[name + "_free"].at[slot])
                plgpu.copy_gmem_to_smem(source.at[batch, window, head], smem[name].at[slot], barriers[name].at[slot])
                if name == "q":
                    for along, vector in (("lse", lse), ("delta", delta)):
                        part = vector.at[batch, head, window]
                        plgpu.copy_gmem_to_smem(part, smem[along].at[slot], barriers["q"].at[slot])

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

        def visible(scores, index, strip):
            def masked(x):
                window = pl.ds(index * plan.block_q + strip * ROWS, ROWS)
                mask = device.Mask(limits, batch, window, (ROWS, ROWS), queries_along=1)
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
    """Starts the addition of this warpgroup's share of dQ for one tile of queries."""
    strip, columns = plan.share(warpgroup)
    _replace(place, value)
    device.add_to_gmem(place, dq.at[batch, pl.ds(index * plan.block_q + strip * ROWS, ROWS), head, columns])


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
    visible: Callable[[jax.Array, jax.Array, int], jax.Array]

    def step(self, number: jax.Array, head: jax.Array, index: jax.Array, dk, dv, add_dq: Callable) -> None:
        """All that one tile of queries of one head gives: to `dk` and `dv`, and to dQ through `add_dq`."""
        plan, smem = self.plan, self.smem
        slot, stage = lax.rem(number, plan.stages), lax.rem(number, SCORE_STAGES)
        plgpu.barrier_wait(self.barriers["q"].at[slot])
        ds = [self._score_gradients(slot, index, strip, dv) for strip in range(plan.strips)]
        for strip in range(plan.strips):
            smem["ds"].at[stage, self.warpgroup, strip][...] = ds[strip]
        plgpu.commit_smem()
        self.rendezvous()

        def dq_share(products):
            strip, columns = plan.share(self.warpgroup)
            for i in range(WARPGROUPS):
                products.add(smem["ds"].at[stage, i, strip], smem["k"].at[i, :, columns], transposed="a")
            for i in range(plan.strips):
                dk.add(ds[i], smem["q"].at[slot, pl.ds(i * ROWS, ROWS)])
            return products.read(in_flight=plan.strips)  # dV is done too then

        share = device.accumulators(dq_share, [(ROWS, ROWS)], self.imitations[2:], self.warpgroup)
        plgpu.barrier_arrive(self.barriers["dout_free"].at[slot])
        add_dq(share, head, index)
        device.wait_for_products()
        plgpu.barrier_arrive(self.barriers["q_free"].at[slot])

    def _score_gradients(self, slot: jax.Array, index: jax.Array, strip: int, dv) -> jax.Array:
        """dS of one strip of queries, transposed, without the scale; starts what the strip adds to `dv`."""
        spec, shape, smem = self.plan.spec, (ROWS, ROWS), self.smem
        rows = (slot, pl.ds(strip * ROWS, ROWS))
        factor = device.exponent(spec)

        def run(scores, dp):
            # Sums that start from what would be subtracted afterwards keep registers free.
            def log_sum():
                return device.columns(device.load_vector(smem["lse"].at[rows], reduced=0), shape)

            if device.linear(spec):
                scores.set(log_sum() * (-1 / factor))
            dp.set(-device.columns(device.load_vector(smem["delta"].at[rows], reduced=0), shape))
            scores.add(smem["k"].at[self.warpgroup], smem["q"].at[rows], transposed="b")
            if strip == 0:
                plgpu.barrier_wait(self.barriers["dout"].at[slot])
            dp.add(smem["v"].at[self.warpgroup], smem["dout"].at[rows], transposed="b")
            s = device.capped(scores.read(in_flight=1), spec)
            exponents = self.visible(s, index, strip) * factor
            p = jnp.exp2(exponents if device.linear(spec) else exponents - log_sum())
            slope = device.uncapped(p, s, spec)  # now, so that `s` need not be kept while products run
            dv.add(p.astype(smem["dout"].dtype), smem["dout"].at[rows])
            return (slope * dp.read(in_flight=1)).astype(smem["q"].dtype)

        return device.accumulators(run, [shape, shape], self.imitations[:2], self.warpgroup)

    def rendezvous(self) -> None:
        """Waits for the other warpgroup to come here too."""
        plgpu.barrier_arrive(self.barriers["ds"])
        plgpu.barrier_wait(self.barriers["ds"])
