"""The tables and figures of a report, as plain values for the template."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from davinci_jax.curriculum.budget import make_budget
from davinci_jax.curriculum.shares import domain_shares
from davinci_jax.data.rows import counted_rows
from davinci_jax.errors import DataError
from davinci_jax.experiment import DataConfig, LearningRate, Stage, fingerprint
from davinci_jax.models.flops import flops_per_token, num_active_params, num_params
from davinci_jax.science.report.record import Record
from davinci_jax.training import units

_DETAIL_LENGTH = 240


def facts(run: Record) -> list[tuple[str, str, str]]:
    """Returns (label, value, remark) of the head of the page."""
    train, evaluations = run.metrics.train, run.metrics.evaluations
    length, total = run.experiment.data.sequence_length, run.timeline.num_tokens
    flops = flops_per_token(run.experiment.model, length)
    speeds = [line["tokens_per_second"] for line in train if line.get("tokens_per_second")]
    utilisation = [line["mfu"] for line in train if line.get("mfu") is not None]
    starts = sum(event.get("event") in ("start", "resume") for event in run.metrics.events)
    last, heldout = (train or [{}])[-1], (evaluations or [{}])[-1]
    speed = f"median, MFU {units.percent(statistics.median(utilisation))}" if utilisation else "median"
    memory = max((line.get("host_memory_bytes") or 0 for line in train), default=0)
    active = f"{units.count(num_active_params(run.experiment.model))} active, " if run.experiment.model.moe else ""
    return [
        ("Parameters", units.count(num_params(run.experiment.model)), f"{active}{units.flops(flops)} per token"),
        ("Tokens", units.count(run.consumed), f"of {units.count(total)}, {units.percent(run.consumed / total)}"),
        ("Steps", f"{run.step:,}", f"of {run.timeline.num_steps:,}, {length:,} tokens a sequence"),
        ("Wall time", units.duration(run.metrics.wall_seconds), f"{starts} start{'s' * (starts != 1)}"),
        ("Throughput", f"{units.count(statistics.median(speeds))}/s" if speeds else "-", speed if speeds else ""),
        ("Compute", units.flops(flops * run.consumed), f"peak host memory {units.memory(memory)}" if memory else ""),
        ("Training loss", units.number(last.get("loss")), f"step {last['step']:,}" if last else ""),
        (
            "Held-out loss",
            units.number(heldout.get("loss")),
            f"{units.number(heldout.get('bits_per_byte'))} bits per byte, step {heldout['step']:,}" if heldout else "",
        ),
    ]


def stages(run: Record) -> list[dict[str, Any]]:
    """Returns the rows of the table of stages; shares are planned and, where the stage has begun, served."""
    rows = []
    for n, stage in enumerate(run.experiment.curriculum):
        steps = run.timeline.steps_of(n)
        tokens = run.timeline.tokens_before(steps.stop) - run.timeline.tokens_before(steps.start)
        served = _served(run, n)
        rows.append(
            {
                "name": stage.name,
                "tokens": units.count(tokens),
                "done": _share_done(run, n),
                "steps": f"{len(steps):,}",
                "batch": _ramp(stage),
                "learning_rate": _rate(stage.learning_rate),
                "mixture": [
                    {"domain": domain, "planned": share, "served": served.get(domain)}
                    for domain, share in domain_shares(stage).items()
                    if share > 0 or served.get(domain)
                ],
            }
        )
    return rows


def _share_done(run: Record, stage: int) -> float:
    steps = run.timeline.steps_of(stage)
    return min(1.0, max(0.0, (run.step - steps.start) / len(steps)))


def _served(run: Record, stage: int) -> dict[str, float]:
    """Returns domain -> share of the rows that a stage served, from the intervals weighed by their tokens."""
    weights: dict[str, float] = {}
    before = 0
    for line, position in zip(run.metrics.train, run.stages, strict=True):
        width, before = line.get("tokens", before) - before, line.get("tokens", before)
        if position == stage:
            for domain in run.experiment.data.domains:
                weights[domain] = weights.get(domain, 0.0) + width * (line.get(f"share/{domain}") or 0.0)
    total = sum(weights.values())
    return {domain: weight / total for domain, weight in weights.items()} if total else {}


def _ramp(stage: Stage) -> str:
    return ", ".join(
        f"{piece.size:,} for {piece.steps:,} steps" if piece.steps else f"then {piece.size:,}"
        for piece in stage.batch
    ).removeprefix("then ")  # fmt: skip


def _rate(rate: LearningRate) -> str:
    warmup = f"{rate.warmup_steps:,} steps up to " if rate.warmup_steps else ""
    final = f" to {units.power(rate.final)}" if rate.final is not None else ""
    return f"{warmup}{units.power(rate.peak)}, {rate.shape}{final}"


def sources(run: Record) -> list[dict[str, Any]]:
    """Returns the rows of the table of sources; a shard set that can be read replaces the declared size."""
    experiment = run.experiment
    counted = [_counted(experiment.data, number) for number in range(len(experiment.data.sources))]
    drawn = make_budget(experiment, run.timeline, counted, run.consumed // experiment.data.sequence_length)
    return [
        {
            "name": source.name,
            "domain": source.domain,
            "level": source.level,
            "tokens": units.count(drawn.pool[number]),
            "declared": counted[number] is None,
            "drawn": units.count(drawn.tokens[:, number].sum()),
            "epochs": f"{drawn.epochs[:, number].sum():.2f}",
            "full": drawn.epochs[:, number].sum() > 1,
            "stages": ", ".join(source.stages) if source.stages else "all",
        }
        for number, source in enumerate(experiment.data.sources)
    ]


def _counted(data: DataConfig, number: int) -> int | None:
    """Returns the rows that a source's shard set counts, `None` where there is none to read."""
    try:
        return counted_rows(data, number)
    except DataError:
        return None


def evaluations(run: Record) -> list[dict[str, Any]]:
    """Returns the last evaluation of every stage: its step, tokens and (loss, bits per byte) per domain and in all."""
    rows = []
    for n, stage in enumerate(run.experiment.curriculum):
        steps = run.timeline.steps_of(n)
        inside = [line for line in run.metrics.evaluations if steps.start < line["step"] <= steps.stop]
        if not inside:
            continue
        line = inside[-1]
        names = [*(f"/{domain}" for domain in run.experiment.data.domains), ""]
        rows.append(
            {
                "stage": stage.name,
                "step": f"{line['step']:,}",
                "tokens": units.count(run.timeline.tokens_before(line["step"])),
                "end": line["step"] == steps.stop,
                "values": [
                    (
                        units.number(line.get(f"loss{name}"), 3),
                        units.number(line.get(f"bits_per_byte{name}"), 3),
                    )
                    for name in names
                ],
            }
        )
    return rows


def events(run: Record) -> list[dict[str, str]]:
    """Returns the rows of the table of events; checkpoints in a row are told as one."""
    rows: list[dict[str, Any]] = []
    for event in run.metrics.events:
        name, step = str(event.get("event", "")), event.get("step")
        if name == "checkpoint" and rows and rows[-1]["name"] == "checkpoint":
            rows[-1]["steps"].append(step)
            continue
        rows.append({"name": name, "steps": [step], "time": _clock(event.get("time")), "details": _details(event)})
    return [
        {
            "name": row["name"].replace("_", " "),
            "step": _step_range(row["steps"]),
            "time": row["time"],
            "details": f"{len(row['steps'])} checkpoints" if len(row["steps"]) > 1 else row["details"],
            "warning": row["name"]
            in ("damaged_checkpoint", "unfinished_checkpoint", "sigterm", "sigint", "non_finite", "tracker_dropped"),
        }
        for row in rows
    ]


def _step_range(steps: list[Any]) -> str:
    known = [step for step in steps if isinstance(step, int)]
    if not known:
        return ""
    return f"{known[0]:,}" if len(known) == 1 else f"{min(known):,} to {max(known):,}"


def _clock(value: Any) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(value))


def _details(event: dict[str, Any]) -> str:
    parts = [f"{key}: {_plain(value)}" for key, value in event.items() if key not in ("kind", "event", "step", "time")]
    text = ", ".join(parts)
    return text if len(text) <= _DETAIL_LENGTH else text[: _DETAIL_LENGTH - 1] + "…"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " x ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def identity(run: Record) -> list[tuple[str, str]]:
    """Returns (label, value) of what the run is and where it ran."""
    started = next((event for event in reversed(run.metrics.events) if event.get("event") in ("start", "resume")), {})
    mesh = _plain(started["mesh"]) if started.get("mesh") else ""
    first = next((_clock(event.get("time")) for event in run.metrics.events if event.get("time")), "")
    model = run.experiment.model
    heads = f"{model.num_heads} heads ({model.num_kv_heads} key-value)"
    shape = f"{model.num_layers} layers, width {model.hidden_size:,}, {heads}"
    found = [
        ("Model", shape),
        ("Optimizer", run.experiment.optimizer.name),
        ("Devices", ", ".join(str(part) for part in (started.get("devices"), mesh) if part)),
        ("Begun", f"{first} UTC" if first else ""),
        ("Fingerprint", fingerprint(run.experiment)),
    ]
    return [(label, value) for label, value in found if value]
