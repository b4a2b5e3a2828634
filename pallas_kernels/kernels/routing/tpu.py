"""Routing on TPU: the choice of experts, and the place of each choice in the order by expert.

Tokens lie along lanes and experts along sublanes, so that a maximum over experts is one of whole registers with three
steps within a register at its end, and the k largest of a token take k such passes over numbers that never leave the
core. XLA sorts the scores of a token instead. Places come from running counts: those of earlier tokens in a group of
128 are a product of the choices, as zeros and ones, with a triangular matrix.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import partition
from pallas_kernels.kernels.routing import xla
from pallas_kernels.kernels.routing.spec import RoutingSpec

_TOKENS = 1024  # of a block
_LANES = 128
_LOWEST = float(jnp.finfo(jnp.float32).min)  # of what may still be chosen, unlike -inf
_MOST_EXPERTS = 1024
_MOST_TOKENS = 2**24  # counts are float32


def unsupported(tokens: int, experts: int, spec: RoutingSpec) -> str | None:
    """Why the kernels do not take a case; None if they do."""
    if experts % 8 or experts > _MOST_EXPERTS:
        return f"{experts} experts are no multiple of 8 up to {_MOST_EXPERTS}"
    if spec.groups is not None and (experts // spec.groups[0]) % 8:
        return f"groups of {experts // spec.groups[0]} experts are no multiple of 8"
    if not 0 < tokens < _MOST_TOKENS:
        return f"{tokens} tokens are not between 1 and {_MOST_TOKENS}"
    return None


def select(logits: jax.Array, bias: jax.Array | None = None, *, spec: RoutingSpec) -> tuple[jax.Array, jax.Array]:
    """[N, E], [E] -> (chosen, scores), [N, k] int32 and float32: E and 0 where the threshold leaves fewer than k."""
    tokens, experts = logits.shape
    block = _block(tokens)
    biases = [] if bias is None else [bias.astype(jnp.float32)[:, None]]
    columns = pl.BlockSpec((spec.top_k, block), lambda i: (0, i))
    arrays = [_padded(logits.astype(jnp.float32).T, block, 0.0), *biases]
    shape = spec.top_k, arrays[0].shape[1]
    chosen, scores = pl.pallas_call(
        functools.partial(_select_kernel, spec=spec),
        grid=(shape[1] // block,),
        in_specs=[
            pl.BlockSpec((experts, block), lambda i: (0, i)),
            *[pl.BlockSpec((experts, 1), lambda i: (0, 0)) for _ in biases],
        ],
        out_specs=[columns, columns],
        out_shape=[partition.out_struct(shape, dtype, *arrays) for dtype in (jnp.int32, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="routing_select",
    )(*arrays)
    return chosen[:, :tokens].T, scores[:, :tokens].T


def _select_kernel(logits, *rest, spec):
    *bias, chosen, scores_out = rest

    def run(part):
        scores = _scores(logits[:, part], spec)
        biased = scores + bias[0][...] if bias else scores
        # A NaN is chosen before all numbers, as XLA does, for the weights to show it.
        left = jnp.where(biased != biased, jnp.inf, jnp.maximum(biased, _LOWEST))
        if spec.groups is not None:
            left = _keep_groups(left, *spec.groups)
        expert = _experts(left.shape)
        for j in range(spec.top_k):
            best, hit, index = _first_largest(left, expert)
            score = jnp.sum(jnp.where(hit, scores, 0.0), axis=0, keepdims=True)
            left = jnp.where(hit, -jnp.inf, left)
            if spec.threshold is not None:
                index = jnp.where(best >= spec.threshold, index, float(len(expert)))
                score = jnp.where(best >= spec.threshold, score, 0.0)
            chosen[j : j + 1, part] = index.astype(jnp.int32)
            scores_out[j : j + 1, part] = score

    _over_lanes(run, logits.shape[1])


def _scores(logits, spec):
    if spec.score == "sigmoid":
        return jax.nn.sigmoid(logits)
    weights = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    return weights / jnp.sum(weights, axis=0, keepdims=True)


def _first_largest(values, expert):
    """(the largest over experts, where it is, its expert), the first of equal ones."""
    best = jnp.max(values, axis=0, keepdims=True)
    index = jnp.min(jnp.where(values == best, expert, float(len(expert))), axis=0, keepdims=True)
    return best, expert == index, index


def _keep_groups(values, number, kept):
    """The lowest number in all groups but the best by the sum of their two largest, the first of equal ones."""
    groups = jnp.split(values, number)
    expert = _experts(groups[0].shape)
    totals = []
    for group in groups:
        best, hit, _ = _first_largest(group, expert)
        totals.append(best + jnp.max(jnp.where(hit, -jnp.inf, group), axis=0, keepdims=True))
    parts = []
    for g, group in enumerate(groups):
        better = [(other >= totals[g] if h < g else other > totals[g]) for h, other in enumerate(totals) if h != g]
        ahead = sum((x.astype(jnp.float32) for x in better), jnp.zeros_like(totals[g]))
        parts.append(jnp.where(ahead < kept, group, _LOWEST))
    return jnp.concatenate(parts)


def order(chosen: jax.Array, *, experts: int, spec: RoutingSpec) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What `xla.sort` returns."""
    (tokens, top_k), capacity = chosen.shape, spec.capacity
    block = _block(tokens)
    columns = pl.BlockSpec((top_k, block), lambda i: (0, i))
    column = pl.BlockSpec((experts, 1), lambda i: (0, 0))
    padded = _padded(chosen.T, block, experts)
    options = {
        "grid": (padded.shape[1] // block,),
        "scratch_shapes": [pltpu.VMEM((experts, _LANES), jnp.float32)],
        "compiler_params": pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    }
    counts = pl.pallas_call(
        _counts_kernel,
        in_specs=[columns],
        out_specs=column,
        out_shape=partition.out_struct((experts, 1), jnp.float32, padded),
        name="routing_counts",
        **options,
    )(padded)
    sizes = counts[:, 0].astype(jnp.int32)
    if capacity is not None:
        sizes = jnp.minimum(sizes, capacity)
    starts = jnp.cumsum(sizes) - sizes
    places, *kept = pl.pallas_call(
        functools.partial(_places_kernel, capacity=capacity),
        in_specs=[columns, column],
        out_specs=[columns] * (1 if capacity is None else 2),
        out_shape=[partition.out_struct(padded.shape, jnp.int32, padded)] * (1 if capacity is None else 2),
        name="routing_places",
        **options,
    )(padded, starts.astype(jnp.float32)[:, None])
    chosen = kept[0][:, :tokens].T if kept else chosen
    inverse = places[:, :tokens].T.reshape(-1)
    if capacity is not None or spec.threshold is not None:
        inverse = xla.with_absent(inverse, chosen, sizes)
    return chosen, sizes, xla.permutation(chosen, inverse, experts), inverse


def _counts_kernel(chosen, counts, total):
    @pl.when(pl.program_id(0) == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def run(part):
        total[...] += _choices(chosen, part, total.shape)

    _over_lanes(run, chosen.shape[1])

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _():
        counts[...] = jnp.sum(total[...], axis=1, keepdims=True)


def _places_kernel(chosen, starts, places, *rest, capacity):
    *kept, earlier = rest

    @pl.when(pl.program_id(0) == 0)
    def _():
        earlier[...] = jnp.zeros_like(earlier)

    row, column = (lax.broadcasted_iota(jnp.int32, (_LANES, 2 * _LANES), axis) for axis in (0, 1))
    sums = jnp.where((row < column) | (column >= _LANES), 1.0, 0.0).astype(jnp.bfloat16)  # of earlier ones; of all

    def run(part):
        choices = _choices(chosen, part, earlier.shape).astype(jnp.bfloat16)
        added = jnp.dot(choices, sums, preferred_element_type=jnp.float32)
        rank = earlier[...] + added[:, :_LANES]
        earlier[...] += added[:, _LANES:]
        place, expert = rank + starts[...], lax.broadcasted_iota(jnp.int32, rank.shape, 0)
        for j in range(chosen.shape[0]):
            mine = chosen[j : j + 1, part]
            hit = expert == mine
            places[j : j + 1, part] = jnp.sum(jnp.where(hit, place, 0.0), axis=0, keepdims=True).astype(jnp.int32)
            if kept:
                full = jnp.sum(jnp.where(hit, rank, 0.0), axis=0, keepdims=True) >= capacity
                kept[0][j : j + 1, part] = jnp.where(full, len(expert), mine)

    _over_lanes(run, chosen.shape[1])


def _choices(chosen, part, shape):
    """[E, 128] float32: 1 where the token goes to the expert."""
    expert = lax.broadcasted_iota(jnp.int32, shape, 0)
    hits = [expert == chosen[j : j + 1, part] for j in range(chosen.shape[0])]
    return jnp.where(functools.reduce(jnp.logical_or, hits), 1.0, 0.0)


def _experts(shape):
    """As float32, over which the minimum is a single operation."""
    return lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)


def _over_lanes(run, tokens):
    def step(i, _):
        run(pl.ds(pl.multiple_of(i * _LANES, _LANES), _LANES))

    lax.fori_loop(0, tokens // _LANES, step, None)


def _block(tokens):
    return min(_TOKENS, -(-tokens // _LANES) * _LANES)


def _padded(array, block, value):
    missing = -array.shape[1] % block
    return jnp.pad(array, ((0, 0), (0, missing)), constant_values=value) if missing else array
