"""Source cards: the pool as the report's table 2, from what curation has made and from what a config declares."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from davinci_jax.curation.documents import CURATED, documents_path
from davinci_jax.curation.figures import show_tokens
from davinci_jax.curation.funnel import read_card
from davinci_jax.experiment import CuratedSource, CurationConfig, Experiment, Source

ROW = (
    "name",
    "domain",
    "tokens",
    "tokens_by",
    "level",
    "level_reached",
    "stages",
    "documents",
    "licences",
    "note",
    "recipe",
)


def read_cards(config: CurationConfig | Experiment) -> list[dict[str, Any]]:
    """Returns a card for each source, with the fields of `ROW`; what is not known is `None`.

    Tokens are those that curation counted or, for the sources of an experiment, what the config declares until then.
    """
    if isinstance(config, CurationConfig):
        return [_curated(pathlib.Path(config.root) / CURATED / item.name / "current", item) for item in config.sources]
    return [_declared(config, source) for source in config.data.sources]


def print_cards(config: CurationConfig | Experiment, as_json: bool = False, console: Console | None = None) -> None:
    """Prints the cards as a table or as one JSON list."""
    cards = read_cards(config)
    if as_json:
        print(json.dumps(cards, indent=1, ensure_ascii=False))
        return
    console = console or Console()
    columns = {
        "source": [card["name"] for card in cards],
        "domain": [card["domain"] for card in cards],
        "tokens": [show_tokens(card["tokens"]) for card in cards],
        "level": [card["level"] for card in cards],
        "reached": ["" if card["documents"] is None else card["level_reached"] or "none" for card in cards],
        "stages": [show_stages(card["stages"]) for card in cards],
        "documents": ["" if card["documents"] is None else f"{card['documents']:,}" for card in cards],
        "licences": [", ".join(card["licences"] or ()) for card in cards],
    }
    table = Table(box=None)
    for name, cells in columns.items():
        if any(cells):  # before curation nothing is known of documents and licences
            table.add_column(
                name, justify="right" if name in ("tokens", "documents") else "left", no_wrap=name == "source"
            )
    for row in zip(*(cells for cells in columns.values() if any(cells)), strict=True):
        table.add_row(*(Text(cell or "") for cell in row))  # names may look like markup
    console.print(table, soft_wrap=False)
    counted = sorted({card["tokens_by"] for card in cards})
    console.print(f"tokens: {', '.join(counted)}", highlight=False, markup=False, soft_wrap=True)


def show_stages(stages: list[str] | tuple[str, ...] | None) -> str:
    """Returns the stages that draw from a source; none at all means that it only lies in the pool."""
    return "all" if stages is None else ", ".join(stages) or "pool only"


def _curated(folder: pathlib.Path, source: CuratedSource) -> dict[str, Any]:
    card = read_card(folder) or {"tokens_by": "not made yet"}
    declared = {name: getattr(source, name) for name in ("name", "domain", "level", "stages", "note")}
    return {name: {**card, **declared}.get(name) for name in ROW}


def _declared(experiment: Experiment, source: Source) -> dict[str, Any]:
    """Returns the card beside the documents of a source, or what the experiment says of it."""
    card = read_card(documents_path(experiment.data, source).parent) or {
        "tokens": source.tokens,
        "tokens_by": "as declared",
    }
    declared = {name: getattr(source, name) for name in ("name", "domain", "level", "stages")}
    return {name: {**card, **declared}.get(name) for name in ROW}
