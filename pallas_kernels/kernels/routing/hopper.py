"""Routing on Hopper (H100, H200): the choice of experts, and the rank of each choice among those of one expert.

A warpgroup holds the scores of 64 tokens in registers, as tensor cores lay out a sum: four threads share a token, so
that a maximum over experts is one over registers and two shuffles, and the k largest take k such passes, where XLA
sorts the scores of a token. The rank of a choice among earlier tokens of its 64 is a product of the choices, as zeros
and ones, with a triangular matrix; what earlier warpgroups chose is added by XLA, from counts of each.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kernels import hopper_device as device
from pallas_kernels.kernels.routing import xla
from pallas_kernels.kernels.routing.spec import RoutingSpec
from pallas_kernels.partition import out_struct

_TOKENS = 64  # of a warpgroup: the height of one tensor-core instruction
_LOWEST = float(jnp.finfo(jnp.float32).min)  # of what may still be chosen, unlike -inf
_MOST_EXPERTS = 256  # whose scores registers hold; with a bias, which asks for a second copy, some of them spill
_MOST_CHOICES = 16  # of a token: the kernel of ranks is unrolled over them
_UNDEFINED = float("inf")  # a NaN is chosen before all numbers, as XLA does, for the weights to show it
_EXPERTS = 64  # whose ranks registers hold at once; a row of the tiles that tensor cores read


def unsupported(tokens: int, experts: int, spec: RoutingSpec) -> str | None:
    """Why the kernels do not take a case; None if they do."""
    if experts % 8 or experts > _MOST_EXPERTS:
        return f"{experts} experts are no multiple of 8 up to {_MOST_EXPERTS}"
    if spec.groups is not None and (experts // spec.groups[0]) % 8:
        return f"groups of {experts // spec.groups[0]} experts are no multiple of 8"
    if spec.top_k > _MOST_CHOICES:
        return f"{spec.top_k} experts of a token are more than {_MOST_CHOICES}"
    return None if tokens else "there are no tokens"


def select(logits: jax.Array, bias: jax.Array | None = None, *, spec: RoutingSpec) -> tuple[jax.Array, jax.Array]:
    """[N, E], [E] -> (chosen, scores), [N, k] int32 and float32: E and 0 where the threshold leaves fewer than k."""
    tokens = logits.shape[0]
    logits = _padded(logits.astype(jnp.float32), 0.0)
    biases = [] if bias is None else [bias.astype(jnp.float32)]
    shape = spec.top_k, logits.shape[0]
    run = device.kernel(
        functools.partial(_select_kernel, spec=spec),
        out_type=tuple(out_struct(shape, dtype, logits, *biases) for dtype in (jnp.int32, jnp.float32)),
        scratch_types={},
        blocks=logits.shape[0] // _TOKENS,
        warpgroups=1,
        name="routing_select",
    )
    chosen, scores = run(logits, *biases)
    return chosen[:, :tokens].T, scores[:, :tokens].T


def _select_kernel(logits, *refs, spec):
    *bias, chosen, scores_out = refs
    rows = pl.ds(lax.axis_index("block") * _TOKENS, _TOKENS)
    scores = _scores(device.load(logits.at[rows]), spec)
    shape, experts = scores.shape, float(scores.shape[1])
    biased = scores + device.columns(device.load_vector(bias[0], reduced=0), shape) if bias else scores
    left = jnp.where(biased != biased, _UNDEFINED, jnp.maximum(biased, _LOWEST))
    if spec.groups is not None:
        left = _keep_groups(left, *spec.groups)

    def step(j, left):
        best, hit, expert = _first_largest(left)
        # Without a bias the best is the score itself, and `scores` need not stay in registers.
        score = jnp.sum(jnp.where(hit, scores, 0.0), axis=1) if bias else jnp.where(best == _UNDEFINED, jnp.nan, best)
        if spec.threshold is not None:
            expert = jnp.where(best >= spec.threshold, expert, experts)
            score = jnp.where(best >= spec.threshold, score, 0.0)
        chosen[j, rows] = expert.astype(jnp.int32)
        scores_out[j, rows] = score
        return jnp.where(hit, -jnp.inf, left)

    lax.fori_loop(0, spec.top_k, step, left)


def _scores(logits, spec):
    if spec.score == "sigmoid":
        return 1.0 / (1.0 + jnp.exp(-logits))
    weights = jnp.exp(logits - device.rows(jnp.max(logits, axis=1), logits.shape))
    return weights / device.rows(jnp.sum(weights, axis=1), logits.shape)


def _first_largest(values):
    """(the largest over experts, where it is, its expert as float32), the first of equal ones."""
    expert = _experts(values.shape)
    best = jnp.max(values, axis=1)
    index = jnp.min(jnp.where(values == device.rows(best, values.shape), expert, float(values.shape[1])), axis=1)
    return best, expert == device.rows(index, values.shape), index


def _keep_groups(values, number, kept):
    """The lowest number in all groups but the best by the sum of their two largest, the first of equal ones."""
    size = values.shape[1] // number
    totals = []
    for g in range(number):
        group = values[:, g * size : (g + 1) * size]
        best, hit, _ = _first_largest(group)
        totals.append(best + jnp.max(jnp.where(hit, -jnp.inf, group), axis=1))
    expert = _experts(values.shape)
    for g, total in enumerate(totals):
        better = [other >= total if h < g else other > total for h, other in enumerate(totals) if h != g]
        ahead = sum((jnp.where(x, 1.0, 0.0) for x in better), jnp.zeros_like(total))
        lost = (expert >= g * size) & (expert < (g + 1) * size) & device.rows(ahead >= kept, values.shape)
        values = jnp.where(lost, _LOWEST, values)
    return values


def order(chosen: jax.Array, *, experts: int, spec: RoutingSpec) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What `xla.sort` returns."""
    tokens, top_k = chosen.shape
    ranks, counts = _ranks(_padded(chosen, experts).T, tiles=-(experts // -_EXPERTS))
    counts = counts[:, :experts]
    earlier = jnp.cumsum(counts, axis=0) - counts
    block = lax.broadcasted_iota(jnp.int32, (tokens, top_k), 0) // _TOKENS
    rank = ranks[:, :tokens].T + earlier.at[block, chosen].get(mode="clip")
    sizes = jnp.sum(counts, axis=0)
    if spec.capacity is not None:
        chosen = jnp.where(rank < spec.capacity, chosen, experts)
        sizes = jnp.minimum(sizes, spec.capacity)
    starts = jnp.cumsum(sizes) - sizes
    inverse = (rank + starts.at[chosen].get(mode="clip")).reshape(-1)
    if spec.capacity is not None or spec.threshold is not None:
        inverse = xla.with_absent(inverse, chosen, sizes)
    return chosen, sizes, xla.permutation(chosen, inverse, experts), inverse


def _ranks(chosen, tiles):
    """[k, N] -> the earlier ones of 64 tokens with the same expert, [k, N]; counts by expert, [N / 64, 64 tiles]."""
    blocks, tile = chosen.shape[1] // _TOKENS, (_TOKENS, _EXPERTS)
    return device.kernel(
        _ranks_kernel,
        out_type=tuple(out_struct(x, jnp.int32, chosen) for x in (chosen.shape, (blocks, tiles * _EXPERTS))),
        scratch_types={
            "choices": device.tiled((tiles, *tile), jnp.bfloat16),
            "imitations": device.imitated([tile], 1),
        },
        blocks=blocks,
        warpgroups=1,
        name="routing_ranks",
    )(chosen)


def _ranks_kernel(chosen, ranks, counts, choices, imitations):
    block, top_k = lax.axis_index("block"), chosen.shape[0]
    rows, (tiles, *tile) = pl.ds(block * _TOKENS, _TOKENS), choices.shape

    def hit(i, j):  # loaded anew for each use: registers have no room for all choices over all experts
        mine = device.load_vector(chosen.at[j, rows], reduced=1)
        return device.iota(tile, 1) + i * tile[1] == device.rows(mine, tile)

    square = (_TOKENS, _TOKENS)
    earlier = jnp.where(device.iota(square, 1) < device.iota(square, 0), 1.0, 0.0).astype(choices.dtype)
    found = [device.full((_TOKENS,), 0.0, reduced=1)] * top_k
    for i in range(tiles):
        taken = sum(jnp.where(hit(i, j), 1.0, 0.0) for j in range(top_k))  # a token has an expert once at most
        counts[block, pl.ds(i * tile[1], tile[1])] = jnp.sum(taken, axis=0).astype(jnp.int32)
        choices[i] = taken.astype(choices.dtype)
        plgpu.commit_smem()

        def multiply(products, i=i):
            products.add(earlier, choices.at[i])
            return products.read()

        rank = device.accumulators(multiply, [tile], imitations, 0)
        found = [x + jnp.sum(jnp.where(hit(i, j), rank, 0.0), axis=1) for j, x in enumerate(found)]
    for j, rank in enumerate(found):
        ranks[j, rows] = rank.astype(jnp.int32)


def _experts(shape):
    """As float32, over which the minimum is a single instruction."""
    return device.iota(shape, 1).astype(jnp.float32)


def _padded(array, value):
    missing = -array.shape[0] % _TOKENS
    return jnp.pad(array, ((0, missing), (0, 0)), constant_values=value) if missing else array
