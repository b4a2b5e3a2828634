"""`report.html` of a curation: the level map, the cards, the funnel of each source and samples to read."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jinja2

from davinci_jax.curation.cards import read_cards, show_stages
from davinci_jax.curation.documents import CURATED
from davinci_jax.curation.figures import show_bytes, show_tokens
from davinci_jax.curation.funnel import read_card, read_funnel, read_samples
from davinci_jax.experiment import CuratedSource, CurationConfig
from davinci_jax.experiment.data import LEVELS
from davinci_jax.files import write_atomically

FILE = "report.html"
# What each level does, as the map's columns say it.
LEVEL_NAMES = (
    "acquired",
    "normalised",
    "filtered by rules",
    "filtered by models",
    "refined",
    "completed",
    "with context",
    "environments",
    "ecosystems",
    "worlds",
)


def write_report(config: CurationConfig) -> pathlib.Path:
    """Writes `<root>/curated/report.html` from the results that are there; returns its path.

    One file without outside resources. Text of documents is escaped: it is shown, never run.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("davinci_jax.curation", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": show_bytes, "tokens": show_tokens}
    cards = read_cards(config)
    stages = stage_names(config)
    page = environment.get_template("report.html").render(
        root=str(config.root),
        levels=list(zip(LEVELS, LEVEL_NAMES, strict=True)),
        stages=stages,
        domains=_level_map(cards, config.sources, stages),
        cards=[
            {**card, "tokens": show_tokens(card["tokens"]), "stages": show_stages(card["stages"])} for card in cards
        ],
        sources=[_source(config, source) for source in config.sources],
        facts=_facts(cards),
    )
    file = pathlib.Path(config.root) / CURATED / FILE
    write_atomically(file, page)
    return file


def stage_names(config: CurationConfig) -> list[str]:
    """Returns the training stages that sources name, in order; "all" where every source feeds all of them."""
    named = sorted({name for source in config.sources for name in source.stages or ()})
    return named or ["all"]


def _level_map(
    cards: list[dict[str, Any]], sources: tuple[CuratedSource, ...], stages: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Returns domain -> rows; a row has the operations of each level and which stages it feeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for card, source in zip(cards, sources, strict=True):
        names = dict.fromkeys(LEVELS, ())
        for step in card["recipe"] or ():
            names[step["level"]] += (step["operation"],)
        row = {
            "name": card["name"],
            "declared": card["level"],
            "reached": card["level_reached"],
            "operations": list(names.values()),
            "feeds": [source.stages is None or stage in source.stages for stage in stages],
            "tokens": show_tokens(card["tokens"]),
        }
        found.setdefault(card["domain"], []).append(row)
    return found


def _source(config: CurationConfig, source: CuratedSource) -> dict[str, Any]:
    folder = pathlib.Path(config.root) / CURATED / source.name / "current"
    shown = {"name": source.name, "note": source.note, "folder": str(folder), "made": folder.exists(), "funnel": None}
    card, funnel = read_card(folder), read_funnel(folder)
    if card is None or funnel is None:
        return shown
    largest = max([1, *(step[name] for step in funnel["steps"] for name in ("bytes_in", "bytes_out"))])
    found = read_samples(folder, "found")
    return shown | {
        "card": card,
        "funnel": funnel,
        "steps": [_step(n, step, largest, found) for n, step in enumerate(funnel["steps"])],
        "samples": {name: read_samples(folder, name) for name in ("kept", "removed", "changed")},
    }


def _step(n: int, step: dict[str, Any], largest: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a row of the funnel as the page shows it, with what its operation found."""
    counts = step.get("counts", {})
    return {
        **step,
        "share": step["bytes_out"] / largest,
        "parameters": _short(step["parameters"]),
        "counts": counts,
        "columns": list(dict.fromkeys(column for row in counts.values() for column in row)),
        # A result of an earlier version names only the operation.
        "found": [item for item in found if item["operation"] == step["operation"] and item.get("step", n) == n],
    }


def _facts(cards: list[dict[str, Any]]) -> list[tuple[str, str]]:
    made = [card for card in cards if card["documents"] is not None]
    return [
        ("sources", f"{len(made)} of {len(cards)} made"),
        ("documents", f"{sum(card['documents'] for card in made):,}"),
        ("tokens", show_tokens(sum(card["tokens"] for card in made))),
        ("highest level", max((card["level_reached"] for card in made if card["level_reached"]), default="none")),
    ]


def _short(parameters: dict[str, Any]) -> str:
    text = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in parameters.items())
    return text if len(text) <= 200 else f"{text[:199]}…"
