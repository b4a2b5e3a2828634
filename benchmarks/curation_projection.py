"""What the report's pool would take to curate, from the rates that the other benchmarks of curation have measured.

  python benchmarks/curation_projection.py benchmarks/results/curation_{corpora,filters}.json

Sums, no measurement: documents of the pool are taken to be as long, as dense and as clean as those of the two corpora,
and a crawl is not. Speeds are those of the sample, which ran in one process: its core-seconds, divided among the steps
as their clocks ran. Careful HTML and decontamination ran alone, on other texts. A second table estimates what a model
writes; what has no figure is named below the tables.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from davinci_jax.curriculum.recipe import POOL

CLASSIFIER_MB_PER_SECOND = 4.0  # docs/curation.md, L3
RULES = ("keep-languages", "drop-garbled-text", "gopher-repetition", "gopher-quality", "c4-quality", "fineweb-quality")
DUPLICATES = ("exact-duplicates", "near-duplicates")
PAPER = ("darwin-science-book", "darwin-science-paper")  # of the pool: what was set in pages
LEFT_OUT = (
    "Left out, for nothing was measured: fetching, pictures of scanned pages (`pdf-pages`), threads and notebooks, "
    "`drop-urls`; GPU-hours of dialogues and background."
)
# Output of an H100: reported for a model of 1.7 B parameters; an assumption for a large sparse model.
TOKENS_PER_SECOND = (9_200, 3_000)
PIECES_PER_SECOND = 152  # of a core of the client, docs/curation.md, L4 and L5
PIECE, WINDOW, PAGE = 256, 1024, 700  # tokens of a piece of `refine`, of a window of L5; of a page, an assumption
NEAR_DUPLICATES = 0.22  # of the documents, which fell before L4 in the companion report
SHRINK = 0.2  # of the text in `refine`, there too
# Of configs/curate_qa.py and curate_rejection.py. How many questions stay is an assumption, and so is that evidence and
# second answer are as long as question and answer.
QUESTIONS, STAY, WRITTEN = 3, 0.5, 2
SAMPLES, KEPT, ANSWER = 4, 1, 1000  # tokens of an answer: an assumption, which moves no GPU-hours
KEY_BYTES = 8 * (1 + 14) + 8 * (1 + 2)  # of a document while its duplicates are looked for: MinHash and exact


def steps(run: dict[str, Any], sources: tuple[str, ...], names: tuple[str, ...]) -> dict[str, float]:
    """Returns MB into the first of some steps, MB out of the last, and the seconds of all, over some sources."""
    rows = [[s for s in run["funnels"][source]["steps"] if s["operation"] in names] for source in sources]
    return {
        "in": sum(source[0]["bytes_in"] for source in rows) / 1e6,
        "out": sum(source[-1]["bytes_out"] for source in rows) / 1e6,
        "documents": sum(source[0]["documents_in"] for source in rows),
        "seconds": sum(step["seconds"] for source in rows for step in source),
    }


def _core_share(run: dict[str, Any]) -> float:
    """Returns core-seconds of the whole command for each second of its steps' clocks, which others' work slows down."""
    clocks = sum(step["seconds"] for funnel in run["funnels"].values() for step in funnel["steps"])
    return run["curate"]["core_seconds"] / clocks


def _alone(filters: dict[str, Any], step: str) -> float:
    """Returns core-seconds of a megabyte of a step that ran alone."""
    return 1 / next(row["rate"]["ours"] for row in filters["rows"] if row["step"] == step)


def project(sample: dict[str, Any], run: dict[str, Any], filters: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns rows of work, what goes through it, core-hours, and disk: speeds of the sample, yields of all."""
    tokens = {level: sum(s.tokens for s in POOL if s.level == level) for level in ("L2", "L3", "L4", "L5")}
    split = [split for shards in run["shards"].values() for split in shards["splits"].values()]
    shard_bytes = sum(entry["bytes"] for part in split for entry in part["shards"])
    sharded = sum(part["tokens"] for part in split)
    text = sum(funnel["bytes"] for funnel in run["funnels"].values())
    per_token = text / sharded
    read = tokens["L2"] + tokens["L3"] + tokens["L4"]  # what L5 makes was never a page
    pages, rules = steps(run, ("manuals",), ("html-text",)), steps(run, ("manuals", "guides"), RULES)
    alike = steps(run, ("manuals", "guides"), DUPLICATES)
    into = {"duplicates": read * per_token / 1e6 * alike["in"] / alike["out"]}
    into["rules"] = into["duplicates"] * rules["in"] / rules["out"]
    into["pages"] = into["rules"] * pages["in"] / pages["out"]
    pdf, code = steps(run, ("books",), ("pdf-text",)), steps(run, ("code",), ("code-quality",))
    paper = sum(s.tokens for s in POOL if s.name in PAPER) * per_token / 1e6
    into["PDF"] = paper * pdf["in"] / pdf["out"]
    programs = sum(s.tokens for s in POOL if s.domain == "Code" and s.level in ("L2", "L3")) * per_token / 1e6
    into["code"] = programs * code["in"] / code["out"]
    text_read = read * per_token / 1e6

    def hours(megabytes: float, seconds_each: float) -> str:
        return f"{megabytes * seconds_each / 3600:,.0f} core-hours"

    def each(sources: tuple[str, ...], names: tuple[str, ...]) -> float:
        """Core-seconds of a megabyte in the sample."""
        measured = steps(sample, sources, names)
        return measured["seconds"] * _core_share(sample) / measured["in"]

    def terabytes(megabytes: float) -> str:
        return f"{megabytes / 1e6:,.1f} TB"

    web = ("manuals", "guides")
    documents = into["duplicates"] / alike["in"] * alike["documents"]
    total = sum(tokens.values())
    return [
        (
            "L1, HTML to text",
            terabytes(into["pages"]),
            hours(into["pages"], each(("manuals",), ("html-text",))),
            terabytes(into["rules"]),
        ),
        (
            "L1, careful HTML instead",
            terabytes(into["pages"]),
            hours(into["pages"], _alone(filters, "html-careful (trafilatura)")),
            "",
        ),
        (
            "L1, text layers of books and papers",
            terabytes(into["PDF"]),
            hours(into["PDF"], each(("books",), ("pdf-text",))),
            terabytes(paper),
        ),
        (
            "L2, code-quality",
            terabytes(into["code"]),
            hours(into["code"], each(("code",), ("code-quality",))),
            terabytes(programs),
        ),
        ("L2, rules", terabytes(into["rules"]), hours(into["rules"], each(web, RULES)), terabytes(into["duplicates"])),
        (
            "L2, duplicates",
            terabytes(into["duplicates"]),
            hours(into["duplicates"], each(web, DUPLICATES)),
            f"{terabytes(documents * KEY_BYTES / 1e6)} of keys",
        ),
        (
            "L2, personal data",
            terabytes(text_read),
            hours(text_read, each(("manuals", "code"), ("replace-personal-data",))),
            "",
        ),
        (
            "L2, decontamination, one length",
            terabytes(text_read),
            hours(text_read, _alone(filters, "decontamination, 20-grams")),
            "",
        ),
        (
            "L3, a classifier",
            terabytes(text_read),
            hours(text_read, 1 / CLASSIFIER_MB_PER_SECOND),
            "",
        ),
        (
            "token shards",
            f"{total / 1e12:,.1f} T tokens",
            hours(total * per_token / 1e6, run["shard"]["core_seconds"] / (text / 1e6)),
            terabytes(total * shard_bytes / sharded / 1e6),
        ),
    ]


def generated() -> list[tuple[str, str, str, str, str, str]]:
    """Returns rows of a step, requests, output tokens, core-hours of the client, and GPU-hours at two rates."""
    of = {source.name: source.tokens for source in POOL}
    paper, both = of["darwin-science-paper"], sum(of[name] for name in PAPER)
    completed = [of["darwin-science-paper-gpt"], of["darwin-science-paper-qwen"]]
    passages = of["darwin-science-book"] / WINDOW
    asked = of["darwin-science-book-qa"] * WRITTEN / STAY
    right = sum(tokens for name, tokens in of.items() if name.endswith("-rs"))
    sampled = right * SAMPLES / KEPT
    scanned = both / (1 - NEAR_DUPLICATES)
    return [
        _generation("`transcribe`, books and papers, as if all were scans", scanned / PAGE, [scanned]),
        _generation("`refine`, books and papers, 466 B tokens", both / PIECE, [both * (1 - SHRINK)]),
        _generation("`complete`, papers, 215 B tokens", paper / WINDOW, completed),
        _generation("`ask-questions`, books, 46 B tokens that stay", passages * (1 + QUESTIONS), [asked]),
        _generation(f"`rejection-sampling`, {right / 1e9:.0f} B tokens that stay", sampled / ANSWER, [sampled]),
    ]


def _generation(step: str, requests: float, tokens: list[float]) -> tuple[str, str, str, str, str, str]:
    """Returns a row; more than one number of tokens is a range."""

    def shown(values: list[float], unit: str = "") -> str:
        return " to ".join(f"{value:,.0f}" for value in values) + unit

    hours = [[each / rate / 3600 for each in tokens] for rate in TOKENS_PER_SECOND]
    client = requests / PIECES_PER_SECOND / 3600
    billions = [each / 1e9 for each in tokens]
    return step, f"{requests / 1e9:.2f} G", shown(billions, " B"), f"{client:,.0f}", *map(shown, hours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("measured", type=pathlib.Path, help="what benchmarks/curation_corpora.py has written")
    parser.add_argument("filters", type=pathlib.Path, help="what benchmarks/curation_filters.py has written")
    options = parser.parse_args()
    runs = json.loads(options.measured.read_text())["runs"]
    rows = project(runs["sample"], runs["all"], json.loads(options.filters.read_text()))
    print("| work | goes in | takes | leaves |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    rates = " | ".join(f"GPU-hours at {rate:,}/s" for rate in TOKENS_PER_SECOND)
    print(f"\n| step | requests | output tokens | client core-hours | {rates} |\n|---|---|---|---|---|---|")
    for row in generated():
        print(f"| {' | '.join(row)} |")
    print(f"\n{LEFT_OUT}")


if __name__ == "__main__":
    main()
