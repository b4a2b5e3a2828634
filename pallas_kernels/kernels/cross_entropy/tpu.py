"""Cross-entropy of a linear head on TPU: log-sum-exp in the epilogue of the logits, their gradient in a prologue.

Two kernels, each a matrix product that XLA would follow or precede by passes over the logits in memory. The first
makes the logits block by block with a running log-sum-exp, and stores them only if asked to. The second reads the
stored logits of a chunk of tokens, makes their gradient in VMEM, and multiplies it twice: with the head for dx, with
the hidden states for dw. Storing the logits of a chunk in float32 takes less time than making them again.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import partition, target
from pallas_kernels.kernels.cross_entropy.chunks import Steps
from pallas_kernels.kernels.cross_entropy.config import TpuCrossEntropyConfig

DEFAULT = TpuCrossEntropyConfig(2048, 1024, 512, 512, 512)

_LANES = 128
_PRODUCT_ROWS = 256
_SUM_ROWS = 64
_MASKED = -1e30  # below any logit, and finite: the difference of two is no NaN


def steps(*, soft_cap: float | None, cores: int, config: TpuCrossEntropyConfig) -> Steps:
    """As `chunks` wants them."""

    def sums(x, w, labels, keep):
        return logits_and_sums(x, w, labels, soft_cap=soft_cap, keep=keep, config=config)

    return Steps(
        sums,
        functools.partial(gradients, soft_cap=soft_cap, cores=cores, config=config),
        chunk=config.chunk,
        streams=True,
    )


def fit(config: TpuCrossEntropyConfig, hidden: int, itemsize: int) -> TpuCrossEntropyConfig | None:
    """`config` with smaller blocks, as few steps down as fit into VMEM; None if even the smallest do not."""
    while _backward_bytes(config, hidden, itemsize) > _vmem():
        if config.backward_vocabulary > 128 and config.backward_vocabulary * 4 >= config.chunk:
            config = dataclasses.replace(config, backward_vocabulary=config.backward_vocabulary // 2)
        elif config.chunk > 128:
            chunk = config.chunk // 2
            tokens = min(config.forward_tokens, chunk), min(config.backward_tokens, chunk)
            config = dataclasses.replace(config, chunk=chunk, forward_tokens=tokens[0], backward_tokens=tokens[1])
        else:
            return None
    return config


def _backward_bytes(config, hidden, itemsize):
    """Of the blocks of `gradients`; those that change from step to step are there twice, for the next one's copy."""
    chunk, columns = config.chunk, config.backward_vocabulary
    return chunk * hidden * (itemsize + 4) + 2 * columns * (4 * chunk + hidden * (itemsize + 8))


def _vmem():
    """Bytes that a kernel may use; the blocks that are counted are nearly all that it holds."""
    return target.VMEM[target.current().family] * 15 // 16


def logits_and_sums(
    x: jax.Array, w: jax.Array, labels: jax.Array, *, soft_cap: float | None, keep: bool, config: TpuCrossEntropyConfig
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Logits x w^T after the soft cap, and what the loss needs of them.

    Args:
      x: [N, D]; w: [V, D] in the same dtype.
      labels: [N] int32.
      keep: whether to return the logits.

    Returns:
      (picked, lse, logits): the logit of the label (0 if it is negative) and the log-sum-exp, [N] float32;
      logits [N, V] float32 or None.
    """
    tokens, vocabulary = len(x), w.shape[0]
    rows = min(config.forward_tokens, -(-tokens // 8) * 8)
    columns = config.forward_vocabulary
    x, labels = _padded(x, rows), _padded(labels.astype(jnp.int32), rows)
    kernel = functools.partial(_logits_kernel, soft_cap=soft_cap, vocabulary=vocabulary)
    shapes = [partition.out_struct((len(x), 2), jnp.float32, x, w, labels)]
    specs = [pl.BlockSpec((rows, 2), lambda i, j: (i, 0))]
    if keep:
        shapes.append(partition.out_struct((len(x), vocabulary), jnp.float32, x, w, labels))
        specs.append(pl.BlockSpec((rows, columns), lambda i, j: (i, j)))
    sums, *logits = pl.pallas_call(
        kernel,
        grid=(len(x) // rows, pl.cdiv(vocabulary, columns)),
        in_specs=[
            pl.BlockSpec((rows, x.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((columns, x.shape[1]), lambda i, j: (j, 0)),
            pl.BlockSpec((rows, 1), lambda i, j: (i, 0)),
        ],
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((rows, _LANES), jnp.float32)] * 3,
        compiler_params=_parameters("parallel", "arbitrary"),
        name="cross_entropy_logits",
    )(x, w, labels[:, None])
    picked, lse = sums[:tokens, 0], sums[:tokens, 1]
    return picked, lse, logits[0][:tokens] if keep else None


def _logits_kernel(x, w, labels, sums, *rest, soft_cap, vocabulary):
    *logits_out, top, total, picked = rest
    running = top, total, picked  # by lane: the reduction over lanes waits until the end
    columns, block = w.shape[0], pl.program_id(1)

    @pl.when(block == 0)
    def _():
        top[...] = jnp.full_like(top, _MASKED)
        total[...] = jnp.zeros_like(total)
        picked[...] = jnp.zeros_like(picked)

    def run(end):
        for start in range(0, x.shape[0], _PRODUCT_ROWS):
            part = pl.ds(start, min(_PRODUCT_ROWS, x.shape[0] - start))
            logits = _product(x[part, :], w[...], 1, 1)
            if soft_cap is not None:
                logits = soft_cap * jnp.tanh(logits / soft_cap)
            for out in logits_out:
                out[part, :] = logits
            for first in range(0, len(logits), _SUM_ROWS):
                values = logits[first : first + _SUM_ROWS]
                rows = pl.ds(start + first, len(values))
                label = labels[rows, :] - block * columns
                _add_to_sums(values, label, end, *(sums.at[rows, :] for sums in running))

    tail = vocabulary % columns
    if tail:  # a mask for every block would take the matrix units 8 % of their time
        pl.when(block < pl.num_programs(1) - 1)(lambda: run(columns))
        pl.when(block == pl.num_programs(1) - 1)(lambda: run(tail))
    else:
        run(columns)

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
        highest = jnp.max(top[...], axis=1, keepdims=True)
        weighted = total[...] * jnp.exp(top[...] - highest)
        sums[:, 0:1] = jnp.sum(picked[...], axis=1, keepdims=True)
        sums[:, 1:2] = highest + jnp.log(jnp.sum(weighted, axis=1, keepdims=True))


def _add_to_sums(logits, label, end, top, total, picked):
    """Adds the first `end` columns of a block to the running sums of its tokens; `label` counts from the first."""
    lane = jax.lax.broadcasted_iota(jnp.int32, top.shape, 1)
    groups = [logits[:, start : start + _LANES] for start in range(0, end, _LANES)]
    hits = [jnp.where(lane == label - n * _LANES, group, 0.0) for n, group in enumerate(groups)]
    picked[...] = functools.reduce(jnp.add, hits, picked[...])
    if end % _LANES:
        groups[-1] = jnp.where(lane < end % _LANES, groups[-1], _MASKED)
    before = top[...]
    highest = functools.reduce(jnp.maximum, groups, before)
    parts = [jnp.exp(group - highest) for group in groups]
    total[...] = functools.reduce(jnp.add, parts, total[...] * jnp.exp(before - highest))
    top[...] = highest


def gradients(
    logits: jax.Array,
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    lse: jax.Array,
    dlog_probs: jax.Array,
    dlse: jax.Array,
    dw: jax.Array | None,
    *,
    soft_cap: float | None,
    cores: int,
    config: TpuCrossEntropyConfig,
) -> tuple[jax.Array, jax.Array]:
    """dx and dw of one chunk of tokens, for the cotangents of log-probabilities and log-sum-exp.

    Args:
      logits: [N, V] float32, after the soft cap.
      x: [N, D]; w: [V, D] in the same dtype.
      labels: [N] int32; tokens with a negative one add nothing.
      lse, dlog_probs, dlse: [N] float32.
      dw: [V, D] float32 to add to, in place; None starts from zero.
      cores: that share the grid.

    Returns:
      (dx, dw): [N, D] in the dtype of `x` and [V, D] float32.
    """
    tokens, vocabulary, hidden, columns = len(x), w.shape[0], x.shape[1], config.backward_vocabulary
    rows = min(config.backward_tokens, -(-tokens // 8) * 8)
    counted = labels >= 0
    factors = jnp.where(counted, dlse - dlog_probs, 0.0), jnp.where(counted, dlog_probs, 0.0)
    stats = jnp.stack((jnp.where(counted, lse, jnp.inf), *factors, labels.astype(jnp.float32)), axis=1)
    logits, x, stats = (_padded(array, rows) for array in (logits, x, stats))
    blocks = pl.cdiv(vocabulary, columns)
    cores = min(cores, blocks)  # a core without a block of its own would write over that of another
    per_core = pl.cdiv(blocks, cores)

    def block(core, step):
        return jnp.minimum(core * per_core + step, blocks - 1)

    head = pl.BlockSpec((columns, hidden), lambda core, step: (block(core, step), 0))
    like = (logits, x, w, stats)
    sums, dw = pl.pallas_call(
        functools.partial(_gradients_kernel, soft_cap=soft_cap, vocabulary=vocabulary, rows=rows),
        grid=(cores, per_core),
        in_specs=[
            pl.BlockSpec((len(x), columns), lambda core, step: (0, block(core, step))),
            pl.BlockSpec((len(x), hidden), lambda core, step: (0, 0)),
            pl.BlockSpec((len(x), 4), lambda core, step: (0, 0)),
            head,
            *([] if dw is None else [head]),
        ],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), head],
        out_shape=[
            partition.out_struct((cores, len(x), hidden), jnp.float32, *like),
            partition.out_struct((vocabulary, hidden), jnp.float32, *like),
        ],
        scratch_shapes=[pltpu.VMEM((len(x), hidden), jnp.float32)],
        # The interpreter of jax 0.10 pads an aliased array to whole blocks and does not crop it.
        input_output_aliases={} if dw is None or target.current().interpret else {4: 1},
        compiler_params=_parameters("parallel", "arbitrary"),
        name="cross_entropy_gradients",
    )(logits, x, stats, w, *([] if dw is None else [dw]))
    return sums.sum(axis=0)[:tokens].astype(x.dtype), dw


def _gradients_kernel(logits, x, stats, w, *rest, soft_cap, vocabulary, rows):
    *dw_before, dx_out, dw, dx = rest
    core, step, columns = pl.program_id(0), pl.program_id(1), w.shape[0]
    block = core * pl.num_programs(1) + step
    last = pl.cdiv(vocabulary, columns) - 1

    @pl.when(step == 0)
    def _():
        dx[...] = jnp.zeros_like(dx)

    tail = vocabulary % columns
    if tail:

        @pl.when(block == last)
        def _():  # what lies beyond the head would be multiplied by zero, which does not help if it is a NaN
            w[tail:, :] = jnp.zeros((columns - tail, w.shape[1]), w.dtype)

    @pl.when(block <= last)  # the grid divides evenly over the cores, the blocks need not
    def _():
        dw[...] = dw_before[0][...] if dw_before else jnp.zeros_like(dw)

        for start in range(0, x.shape[0], rows):
            part = pl.ds(start, rows)
            lse, of_all, of_label, label = (stats[part, n : n + 1] for n in range(4))
            values = logits[part, :]
            column = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
            dlogits = jnp.exp(values - lse) * of_all
            dlogits += jnp.where(column == label.astype(jnp.int32) - block * columns, of_label, 0.0)
            if soft_cap is not None:
                dlogits *= 1 - jnp.square(values / soft_cap)
            if tail:
                dlogits = jnp.where(column < vocabulary - block * columns, dlogits, 0.0)
            dlogits = dlogits.astype(x.dtype)
            dx[part, :] += _product(dlogits, w[...], 1, 0)
            dw[...] += _product(dlogits, x[part, :], 0, 0)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        pltpu.sync_copy(dx, dx_out.at[core])


def _product(a, b, a_axis, b_axis):
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _padded(array, rows):
    """With whole blocks of tokens: zeros take part in no sum that is kept."""
    missing = -len(array) % rows
    return jnp.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1))) if missing else array


def _parameters(*semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_vmem())
