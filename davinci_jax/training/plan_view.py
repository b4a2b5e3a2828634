"""A plan as a tree and tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from davinci_jax.training.units import count, duration, flops, memory


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """Prints a plan of `training.plan.make_plan`."""
    for part in (_curriculum(plan), _sources(plan), _sizes(plan)):
        console.print(part)
        console.print()
    if plan["notes"]:
        console.print("[bold]Notes[/]")
        for note in plan["notes"]:
            console.print(f"  - {escape(note)}", highlight=False)


def _curriculum(plan: dict[str, Any]) -> Tree:
    tree = Tree(
        f"[bold]{escape(plan['name'])}[/]  {count(plan['tokens'])} tokens, {plan['steps']:,} steps, "
        f"{count(plan['sequences'])} sequences of {plan['sequence_length']:,}",
        highlight=False,
    )
    for stage in plan["stages"]:
        last = stage["first_step"] + stage["steps"] - 1
        branch = tree.add(
            f"[bold]stage {escape(stage['name'])}[/]  {count(stage['tokens'])} tokens, {stage['steps']:,} steps "
            f"({stage['first_step']:,} to {last:,})"
        )
        branch.add(f"learning rate  {_learning_rate(stage['learning_rate'])}")
        batch = branch.add("batch" if len(stage["batch"]) > 1 else f"batch  {_batch(stage['batch'][0])}")
        if len(stage["batch"]) > 1:
            for piece in stage["batch"]:
                batch.add(_batch(piece))
        mixture = branch.add("mixture")
        for domain, share in stage["mixture"].items():
            if share:
                tokens, epochs = count(stage["domain_tokens"][domain]), _epochs(stage["domain_epochs"][domain])
                mixture.add(f"{share:7.2%}  {escape(domain)}  {tokens} tokens, {epochs} epochs")
    return tree


def _learning_rate(rate: dict[str, Any]) -> str:
    """Returns the rates of the stage's first and last step, which show how stages meet, and the way between them."""
    warmup = f"{rate['warmup_steps']:,} steps of warm-up to {rate['peak']:g}, then " if rate["warmup_steps"] else ""
    return f"{rate['first']:.4g} -> {rate['last']:.4g}  ({warmup}{rate['shape']})"


def _batch(piece: dict[str, Any]) -> str:
    return f"{piece['size']:,} sequences, {piece['steps']:,} steps, {count(piece['tokens'])} tokens"


def _sources(plan: dict[str, Any]) -> Table:
    stages = [stage["name"] for stage in plan["stages"]]
    table = Table(
        title="Epochs per source",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("source", overflow="fold")
    # On a narrow terminal names may break, numbers never.
    for name, width in {"level": 5, "pool": 5, **dict.fromkeys(stages, 4), "run": 4, "max": 3, "drawn": 5}.items():
        table.add_column(name, justify="right", min_width=max(width, len(name)), no_wrap=True)
    domain = None
    for source in plan["sources"]:
        if source["domain"] != domain:
            domain = source["domain"]
            table.add_row(f"[italic]{escape(domain)}[/]")
        table.add_row(
            f"  {escape(source['name'])}",
            source["level"],
            count(source["pool_tokens"]),
            *(_epochs(source["epochs"][stage]) for stage in stages),
            _epochs(source["total_epochs"]),
            f"{source['max_epochs']:g}",
            count(source["total_tokens"]) if source["total_tokens"] else "-",
        )
    return table


def _epochs(value: float) -> str:
    """Returns epochs with two decimals, marked where they repeat."""
    if value > 1:
        return f"[bold yellow]{value:.2f}[/]"
    return "-" if not value else f"{value:.2f}" if value >= 0.005 else "<0.01"


def _counts(plan: dict[str, Any]) -> str:
    counted = sum(source["counted"] == "shards" for source in plan["sources"])
    if counted == len(plan["sources"]):
        return "of the shards"
    return (
        "as declared; no shards yet" if not counted else f"{counted} sources from their shards, the others as declared"
    )


def _per_token(value: float) -> str:
    """Returns FLOPs with the digits that the report's figure has where it is of that size: 20.33 GFLOP."""
    return f"{value / 1e9:.2f} GFLOP" if value >= 1e9 else flops(value)


def _params(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _time(plan: dict[str, Any], devices: int) -> str:
    if plan["seconds"] is None:
        return f"unknown: give run.peak_flops, of one device; {plan['assumed_mfu']:.0%} of it is assumed to be reached"
    rate = f"{plan['assumed_mfu']:.0%} (assumed) of {flops(plan['peak_flops'])}/s"
    hours = count(plan["seconds"] * devices / 3600)
    return f"{duration(plan['seconds'])} at {rate} a device; {hours} device hours"


def _evaluations(plan: dict[str, Any]) -> str:
    every = plan["every_steps"]
    if every is None:
        return "none (evaluation.every_steps is unset)"
    also = f" and every {every:,} steps" if every else ""
    return f"{plan['count']:,}, at stage ends{also}, of {count(plan['tokens_per_domain'])} held-out tokens a domain"


def _sizes(plan: dict[str, Any]) -> Table:
    model, devices, checkpoints, evaluations = (
        plan[part] for part in ("model", "devices", "checkpoints", "evaluations")
    )
    mesh = " x ".join(f"{name} {size}" for name, size in devices["mesh"].items()) or "one device"
    table = Table(title="Sizes", title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    tied = "tied" if model["tied_embeddings"] else "untied"
    active = ""
    if model["active_params"] != model["params"]:
        active = f"; {_params(model['active_params'])} ({model['active_params']:,}) work on a token, embedding included"
    rows = {
        "parameters": f"{_params(model['params'])} ({model['params']:,}), {tied} embeddings{active}",
        "FLOPs per token": f"{_per_token(model['flops_per_token'])} ({model['flops_convention']}); "
        f"{_per_token(model['flops_per_token_full_attention'])} with all of attention",
        "FLOPs of the run": flops(model["total_flops"]),
        "expected time": _time(plan["time"], devices["count"]),
        "mesh": f"{mesh}; {devices['rows_per_micro_batch']} sequences a device in a micro-batch, "
        f"up to {devices['most_micro_batches']} micro-batches a step",
        "memory per device": f"{memory(devices['total_bytes'])} = parameters {memory(devices['parameter_bytes'])} + "
        f"optimizer {memory(devices['optimizer_bytes'])} + gradients {memory(devices['gradient_bytes'])}; "
        "activations come on top",
        "checkpoints": f"{checkpoints['written']:,} written, one every {checkpoints['every_steps']:,} steps; "
        f"{checkpoints['kept']:,} kept x {memory(checkpoints['bytes_each'])} = {memory(checkpoints['bytes_kept'])} "
        "uncompressed",
        "evaluations": _evaluations(evaluations),
        "token counts": _counts(plan),
        "run directory": escape(plan["directory"]),
        "fingerprint": plan["fingerprint"],
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
