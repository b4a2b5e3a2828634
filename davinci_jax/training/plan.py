"""What a run would do, worked out without doing any of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from davinci_jax import optimizers
from davinci_jax.curriculum.budget import Budget, make_budget
from davinci_jax.curriculum.shares import domain_shares
from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.data.rows import counted_rows
from davinci_jax.experiment import Experiment, Stage, fingerprint
from davinci_jax.models import decoder
from davinci_jax.models.flops import flops_per_token, num_active_params, num_params, peak_flops
from davinci_jax.sharding import MESH_AXES, mesh_sizes
from davinci_jax.training.layout import batch_layout

ASSUMED_MFU = 0.4  # what dense models of a few billion parameters reach on a well-fed cluster

FLOPS_CONVENTION = (
    "forward and backward: 6 per active matrix entry, the output head included, and the causal half of attention; "
    "recomputation not counted"
)


def make_plan(experiment: Experiment, num_devices: int | None = None) -> dict[str, Any]:
    """Returns the plan of a run, ready for JSON; sizes are in tokens, sequences, FLOPs and bytes.

    Sources whose shards are there are counted; the others are taken as declared.

    Args:
      experiment: the run.
      num_devices: devices to lay the model out on; `None` takes those that the mesh names, -1 counting as one.

    Raises:
      DataError: a shard set that is there and damaged.
      ConfigError: the stages draw more from a source than its `max_epochs` allows, or the model or a batch does not
        divide over the mesh.
    """
    timeline = Timeline.compile(experiment.curriculum, experiment.data.sequence_length)
    counted = [counted_rows(experiment.data, number) for number in range(len(experiment.data.sources))]
    budget = make_budget(experiment, timeline, counted)
    budget.check()
    sizes = _state_sizes(experiment, timeline, _abstract_mesh(experiment, num_devices))
    plan = {
        "name": experiment.run.name,
        "directory": experiment.run.path,
        "fingerprint": fingerprint(experiment),
        "steps": timeline.num_steps,
        "tokens": timeline.num_tokens,
        "sequences": timeline.num_sequences,
        "sequence_length": timeline.sequence_length,
        "stages": [_stage(experiment, timeline, budget, number) for number in range(timeline.num_stages)],
        "sources": _sources(experiment, budget, counted),
        "model": _model(experiment, timeline),
        "devices": sizes["devices"],
        "time": _time(experiment, timeline, sizes["devices"]["count"]),
        "checkpoints": _checkpoints(experiment, timeline, sizes["state_bytes"]),
        "evaluations": _evaluations(experiment, timeline),
    }
    return {**plan, "notes": _notes(experiment, plan)}


def _stage(experiment: Experiment, timeline: Timeline, budget: Budget, number: int) -> dict[str, Any]:
    stage, steps, sequences = experiment.curriculum[number], timeline.steps_of(number), timeline.sequences_of(number)
    rates = {step: timeline.at(step).learning_rate for step in (steps.start, steps.stop - 1)}
    domains = dict.fromkeys(stage.mixture, 0)
    for source, tokens in zip(experiment.data.sources, budget.tokens[number].tolist(), strict=True):
        domains[source.domain] = domains.get(source.domain, 0) + tokens
    return {
        "name": stage.name,
        "tokens": len(sequences) * timeline.sequence_length,
        "sequences": len(sequences),
        "first_step": steps.start,
        "steps": len(steps),
        "batch": [
            {
                "size": piece.batch_size,
                "steps": piece.num_steps,
                "tokens": piece.num_steps * piece.batch_size * timeline.sequence_length,
            }
            for piece in timeline.pieces
            if piece.stage == number
        ],
        "learning_rate": {
            "shape": stage.learning_rate.shape,
            "warmup_steps": stage.learning_rate.warmup_steps,
            "first": rates[steps.start],
            "peak": stage.learning_rate.peak,
            "last": rates[steps.stop - 1],
        },
        "mixture": domain_shares(stage),
        "domain_tokens": domains,
        "domain_epochs": _domain_epochs(budget, stage, domains),
    }


def _domain_epochs(budget: Budget, stage: Stage, drawn: dict[str, int]) -> dict[str, float]:
    """Returns how often the stage goes through what it may draw from, by domain."""
    pool = dict.fromkeys(drawn, 0.0)
    for source, tokens in zip(budget.experiment.data.sources, budget.pool.tolist(), strict=True):
        if source.stages is None or stage.name in source.stages:
            pool[source.domain] = pool.get(source.domain, 0) + tokens
    return {domain: tokens / pool[domain] if tokens else 0.0 for domain, tokens in drawn.items()}


def _sources(experiment: Experiment, budget: Budget, counted: Sequence[int | None]) -> list[dict[str, Any]]:
    names = [stage.name for stage in experiment.curriculum]
    return [
        {
            "name": source.name,
            "domain": source.domain,
            "level": source.level,
            "pool_tokens": int(budget.pool[number]),
            "counted": "declared" if counted[number] is None else "shards",
            "tokens": dict(zip(names, budget.tokens[:, number].tolist(), strict=True)),
            "epochs": dict(zip(names, budget.epochs[:, number].tolist(), strict=True)),
            "total_tokens": int(budget.tokens[:, number].sum()),
            "total_epochs": float(budget.epochs[:, number].sum()),
            "max_epochs": source.max_epochs,
        }
        for number, source in enumerate(experiment.data.sources)
    ]


def _model(experiment: Experiment, timeline: Timeline) -> dict[str, Any]:
    config, length = experiment.model, experiment.data.sequence_length
    per_token = flops_per_token(config, length)
    return {
        "params": num_params(config),
        "active_params": num_active_params(config),
        "embedding_params": config.vocab_size * config.hidden_size,
        "tied_embeddings": config.tied_embeddings,
        "flops_per_token": per_token,
        "flops_per_token_full_attention": flops_per_token(config, length, causal=False),
        "flops_convention": FLOPS_CONVENTION,
        "total_flops": per_token * timeline.num_tokens,
    }


def _time(experiment: Experiment, timeline: Timeline, devices: int) -> dict[str, Any]:
    """Returns how long the run takes at an assumed utilisation; `None` seconds where the peak is not known."""
    peak = experiment.run.peak_flops or peak_flops(jax.devices()[0].device_kind, experiment.model.compute_dtype)
    total = flops_per_token(experiment.model, experiment.data.sequence_length) * timeline.num_tokens
    seconds = total / (peak * devices * ASSUMED_MFU) if peak else None
    return {"assumed_mfu": ASSUMED_MFU, "peak_flops": peak, "seconds": seconds}


def _abstract_mesh(experiment: Experiment, num_devices: int | None) -> AbstractMesh:
    named = max(1, experiment.mesh.replica) * max(1, experiment.mesh.fsdp)
    sizes = mesh_sizes(experiment.mesh, num_devices or named)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def _state_sizes(experiment: Experiment, timeline: Timeline, mesh: AbstractMesh) -> dict[str, Any]:
    """Returns the sizes of the train state from its shapes and shardings; nothing is allocated."""
    layout = batch_layout(experiment, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        model = jax.eval_shape(lambda: decoder.build(experiment.model, jax.random.key(0)))
        optimizer = optimizers.build(experiment.optimizer, timeline.learning_rates())
        opt_state = jax.eval_shape(optimizer.init, model)
    parameters, moments = _device_bytes(model), _device_bytes(opt_state)
    batch_shards = mesh.shape["replica"] * mesh.shape["fsdp"]
    devices = {
        "count": mesh.size,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "parameter_bytes": parameters,
        "optimizer_bytes": moments,
        "gradient_bytes": parameters,
        "total_bytes": 2 * parameters + moments,
        "rows_per_micro_batch": layout.micro_rows // batch_shards,
        "most_micro_batches": layout.max_micro,
    }
    return {"devices": devices, "state_bytes": _whole_bytes(model) + _whole_bytes(opt_state)}


def _device_bytes(tree: Any) -> int:
    """Returns the bytes of one device's part of a tree of abstract arrays."""
    return sum(
        math.prod(leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _whole_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _checkpoints(experiment: Experiment, timeline: Timeline, state_bytes: int) -> dict[str, Any]:
    config, last = experiment.checkpoint, timeline.num_steps
    written = sorted({*range(config.every_steps, last + 1, config.every_steps), last})
    kept = {*written[-config.keep_last :]}
    if config.keep_every is not None:
        kept.update(range(config.keep_every, last + 1, config.keep_every))
    return {
        "every_steps": config.every_steps,
        "written": len(written),
        "kept": len(kept),
        "bytes_each": state_bytes,
        "bytes_kept": state_bytes * len(kept),
    }


def _evaluations(experiment: Experiment, timeline: Timeline) -> dict[str, Any]:
    config, last = experiment.evaluation, timeline.num_steps
    steps = {timeline.steps_of(number).stop for number in range(timeline.num_stages)}
    if config.every_steps is None:
        steps.clear()
    elif config.every_steps:
        steps.update(range(config.every_steps, last + 1, config.every_steps))
    return {"every_steps": config.every_steps, "count": len(steps), "tokens_per_domain": config.tokens}


def _notes(experiment: Experiment, plan: dict[str, Any]) -> list[str]:
    """Returns what a reader of the plan should not overlook, one sentence each."""
    notes = [
        f"stage {stage['name']} repeats {domain}: {epochs:.1f} epochs of it in this stage"
        for stage in plan["stages"]
        for domain, epochs in stage["domain_epochs"].items()
        if epochs > 1
    ]
    for domain in experiment.data.domains:
        epochs = [source["total_epochs"] for source in plan["sources"] if source["domain"] == domain]
        if max(epochs) > 1:
            many = f"{sum(value > 1 for value in epochs)} of {len(epochs)} {domain} sources repeat"
            repeating = many if len(epochs) > 1 else f"the only {domain} source repeats"
            notes.append(f"{repeating} over the run, up to {max(epochs):.2f} epochs")
    for stage in experiment.curriculum:
        total = sum(stage.mixture.values())
        if not np.isclose(total, [1, 100], rtol=1e-9).any():
            notes.append(f"the mixture of stage {stage.name} adds up to {total:g} and is normalised")
    unweighted = [s.domain for s in experiment.data.sources if s.weight is None]
    split = [domain for domain in experiment.data.domains if unweighted.count(domain) > 1]
    if split:
        notes.append(f"no weights are given inside {', '.join(split)}: sources are drawn in proportion to their tokens")
    unused = [source for source in plan["sources"] if not source["total_tokens"]]
    notes += [
        f"{s['name']} ({s['domain']}, {s['pool_tokens'] / 1e9:.3g} B tokens) is drawn by no stage" for s in unused
    ]
    return notes
