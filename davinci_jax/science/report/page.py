"""report.html: one file that needs nothing else, neither network nor JavaScript."""

from __future__ import annotations

import pathlib

import jinja2

from davinci_jax.experiment import to_json
from davinci_jax.files import write_atomically
from davinci_jax.science.report import charts, tables
from davinci_jax.science.report.record import Record, read_run

FILE = "report.html"


def write_report(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Writes `run_dir/report.html` from what the run directory holds so far, and returns its path.

    Names, events and samples of the run are data: they are escaped, and the page's policy loads and runs nothing.

    Raises:
      ConfigError: `run_dir` is no run directory.
    """
    run = read_run(run_dir)
    file = run.directory / FILE
    write_atomically(file, render(run))
    return file


def render(run: Record) -> str:
    """Returns the page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("davinci_jax.science.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        run=run,
        name=run.experiment.run.name,
        status=run.status,
        notes=_notes(run),
        facts=tables.facts(run),
        identity=tables.identity(run),
        groups=charts.groups(run),
        colours=charts.colours(run),
        stages=tables.stages(run),
        sources=tables.sources(run),
        evaluations=tables.evaluations(run),
        events=tables.events(run),
        configuration=to_json(run.experiment),
    )


def _notes(run: Record) -> list[str]:
    """Returns what a reader must know before the charts."""
    notes = []
    if not run.metrics.train:
        notes.append("There are no training metrics yet: charts appear with the first log interval.")
    elif not run.metrics.evaluations:
        off = run.experiment.evaluation.every_steps is None
        notes.append("The run does not evaluate." if off else "There is no held-out evaluation yet.")
    if run.status == "stopped":
        notes.append(f"The run stopped after step {run.step:,}; the command that started it continues it.")
    damaged = sum(event.get("event") == "damaged_checkpoint" for event in run.metrics.events)
    if damaged:
        notes.append(f"Damaged checkpoints were set aside: {damaged}; see the events.")
    return notes + run.problems
