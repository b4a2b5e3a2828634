"""Strategies for a category of documents, found by trying: issues, proposals, runs on a sample, scores, pools.

After DataEvolve (arXiv 2603.14420): in each generation a model names issues of a sample and proposes strategies in
the light of what was tried before; each is run on the sample and scored by a judge. The experience pool keeps all of
them, failures above all; the strategy pool keeps the best.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation.client import Generation, RequestFailed
from davinci_jax.curation.generation.operation import Ask, Generative
from davinci_jax.curation.generation.refine import ApplyStrategy
from davinci_jax.curation.judges import load_model
from davinci_jax.curation.metrics import numeric
from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment import checks
from davinci_jax.files import write_atomically

Judge = Callable[[Sequence[str]], Sequence[float]]
_DIGITS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
    """How long strategies evolve.

    Attributes:
      generations: rounds of proposals; 30 in the report.
      proposals: strategies proposed in each.
      sample: documents that a strategy is run on; a new sample for each generation.
      characters: the issues are looked for in so much of the beginning of each.
      survivors: size of the strategy pool.
      remembered: strategies that a proposal is told of, the best and the worst so far.
      budget: generations of the model that may be used, those that are kept already included, so that a run that is
        repeated takes the same decisions.
      temperature: of proposals; rewriting uses that of its own operation.
      seed: of the samples.
    """

    generations: int = 5
    proposals: int = 3
    sample: int = 8
    characters: int = 1500
    survivors: int = 3
    remembered: int = 6
    budget: int = 2000
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self):
        checks.positive("evolution", **{k: v for k, v in dataclasses.asdict(self).items() if k != "seed"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Question(Generative):
    """One request about many texts, whose answer is what stands between marks."""

    tag: str
    sections: tuple[tuple[str, str], ...]
    first_seed: int
    name, level = "evolve", "L4"

    async def rollout(self, document: Document, ask: Ask) -> list[str]:
        try:
            said: Generation = await self.put(ask, self.sections, document.id, self.first_seed)
        except RequestFailed:
            return []
        found = re.findall(f"<{self.tag}>(.*?)</{self.tag}>", said.text, re.DOTALL)
        return [text.strip() for text in found if text.strip()]

    def finish(self, document: Document, result: Any) -> str:
        raise NotImplementedError("its result is read as it is")


def judge_by(model: str) -> Judge:
    """Returns the judge that a classifier with grades for classes is: the expected grade of each text.

    Raises:
      ConfigError: its classes are no numbers.
    """
    classifier = load_model(model)
    values = numeric(classifier.classes)
    if values is None:
        raise ConfigError("judge", model, f"tells {classifier.classes}, which are no grades", "name another model")
    return lambda texts: (classifier.probabilities(texts) @ values).tolist()


def evolve(
    documents: Sequence[Document],
    rewriter: ApplyStrategy,
    judge: Judge,
    folder: str | os.PathLike,
    evolution: Evolution = Evolution(),
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evolves strategies for documents of one category; returns the report that it writes.

    Killed anywhere and started again, it goes through the generations that are kept without buying them again.

    Args:
      documents: of one category.
      rewriter: how a strategy is run; its own strategy is where evolution starts, empty for none.
      judge: texts -> scores, higher is better: `judge_by`, or a proxy run of the caller's.
      folder: gets report.json and report.md; raw generations go to the store of `rewriter`, or below it.
      evolution: how long.
      log: is given a line for each strategy.

    Raises:
      DataError: there are no documents, or the server is down.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not documents:
        raise DataError("documents", None, "are none", "give documents of one category")
    rewriter = dataclasses.replace(rewriter, required=0.0, rounds=1, store=rewriter.store or str(folder / "kept"))
    experience: list[dict[str, Any]] = []
    issues: list[str] = []
    spent, stopped = 0, "all generations were run"
    for generation in range(evolution.generations):
        sample = _sample(documents, evolution, generation)
        found, asked = _issues(rewriter, sample, issues, evolution, generation)
        issues, spent = list(dict.fromkeys([*issues, *found])), spent + asked
        for n in range(evolution.proposals):
            if spent >= evolution.budget:
                break
            proposed, asked = _propose(rewriter, issues, experience, evolution, generation * evolution.proposals + n)
            spent += asked
            tried = [entry["strategy"] for entry in experience]
            entry, asked = _try(rewriter, sample, proposed, tried, judge)
            spent += asked
            experience.append({"generation": generation, **entry})
            log(f"generation {generation}, strategy {n}: {entry['outcome']}, gain {entry['gain']:+.4f}, {spent} asked")
        if spent >= evolution.budget:
            stopped = f"the budget of {evolution.budget} generations was spent"
        report = _report(rewriter, evolution, issues, experience, spent, stopped)
        write_atomically(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        write_atomically(folder / "report.md", _in_words(report))
        if spent >= evolution.budget:
            break
    return report


def _sample(documents: Sequence[Document], evolution: Evolution, generation: int) -> list[Document]:
    chosen = np.random.default_rng((evolution.seed, generation)).permutation(len(documents))[: evolution.sample]
    # A rewrite takes no documents with marked questions; the strategy is tried on the words alone.
    return [documents[n].with_text(documents[n].text) for n in sorted(chosen)]


def _ask(rewriter: ApplyStrategy, prompt: str, tag: str, sections: list, seed: int, temperature: float) -> tuple:
    """Returns (texts between the marks of one answer, generations used)."""
    shared = {f.name: getattr(rewriter, f.name) for f in dataclasses.fields(Generative)}
    shared |= {"prompt": prompt, "temperature": temperature}
    question = _Question(**shared, tag=tag, sections=tuple(sections), first_seed=seed)
    (result,), asked = question.results([Document(id=f"{prompt}-{seed}")])
    return (result if isinstance(result, list) else []), asked


def _issues(
    rewriter: ApplyStrategy, sample: Sequence[Document], known: Sequence[str], evolution: Evolution, generation: int
) -> tuple[list[str], int]:
    sections = [("DOCUMENT", document.text[: evolution.characters].strip()) for document in sample]
    sections += [("KNOWN", "\n".join(known))] if known else []
    return _ask(rewriter, "issues_v1", "ISSUE", sections, generation, evolution.temperature)


def _propose(
    rewriter: ApplyStrategy, issues: Sequence[str], experience: Sequence[dict], evolution: Evolution, number: int
) -> tuple[str, int]:
    """Returns (a strategy, empty if there was none; generations used)."""
    ranked = sorted(experience, key=lambda entry: -entry["gain"])
    half = evolution.remembered // 2
    told = ranked if len(ranked) <= evolution.remembered else [*ranked[: evolution.remembered - half], *ranked[-half:]]
    start = [f"{rewriter.strategy}\nThis is in use now."] if rewriter.strategy else []
    tried = start + [f"{entry['strategy']}\nScore: {entry['gain']:+.4f}, {entry['outcome']}" for entry in told]
    sections = [("ISSUES", "\n".join(issues) or "none was found yet"), ("TRIED", "\n\n".join(tried) or "nothing yet")]
    found, asked = _ask(rewriter, "strategy_v1", "STRATEGY", sections, number, evolution.temperature)
    return (found[0] if found else ""), asked


def _try(
    rewriter: ApplyStrategy, sample: Sequence[Document], strategy: str, tried: Sequence[str], judge: Judge
) -> tuple[dict[str, Any], int]:
    """Returns (strategy, outcome, gain, what became of the pieces; generations used)."""
    nothing = {"strategy": strategy, "gain": 0.0, "pieces": 0, "failed": 0}
    if not strategy:
        return {**nothing, "outcome": "no strategy was proposed"}, 0
    if strategy in tried:
        return {**nothing, "outcome": "was tried before"}, 0
    results, asked = dataclasses.replace(rewriter, strategy=strategy).results(sample)
    before = [document.text for document in sample]
    after = [
        text if isinstance(pieces, Exception) else "".join(piece.text for piece in pieces)
        for text, pieces in zip(before, results, strict=True)
    ]
    pieces = [piece for result in results if not isinstance(result, Exception) for piece in result]
    failed = sum(bool(piece.trouble) for piece in pieces)
    gain = round(float(np.mean(judge(after)) - np.mean(judge(before))), _DIGITS)
    outcome = "failed on every piece" if failed == len(pieces) else ("better" if gain > 0 else "not better")
    return {"strategy": strategy, "outcome": outcome, "gain": gain, "pieces": len(pieces), "failed": failed}, asked


def _report(
    rewriter: ApplyStrategy, evolution: Evolution, issues: Sequence[str], experience: Sequence[dict], spent: int,
    stopped: str,
) -> dict[str, Any]:  # fmt: skip
    pool = sorted((entry for entry in experience if entry["gain"] > 0), key=lambda entry: -entry["gain"])
    return {
        "evolution": dataclasses.asdict(evolution),
        "rewriter": rewriter.parameters(),
        "generations_asked": spent,
        "stopped": stopped,
        "issues": list(issues),
        "strategies": pool[: evolution.survivors],
        "experience": list(experience),
    }


def _in_words(report: dict[str, Any]) -> str:
    """Returns the report as Markdown: what was found, what works, what was tried and failed."""
    lines = [
        "# Strategy evolution",
        "",
        f"{report['stopped']}; {report['generations_asked']} generations were asked for.",
    ]
    lines += ["", "## Issues found", "", *(f"- {issue}" for issue in report["issues"] or ["none"])]
    lines += ["", "## Strategy pool", ""]
    lines += [f"- gain {entry['gain']:+.4f}: {entry['strategy']}" for entry in report["strategies"]] or [
        "No strategy helped."
    ]
    lines += ["", "## All that was tried", "", "| generation | outcome | gain | pieces that failed | strategy |"]
    lines += ["|---|---|---|---|---|"]
    for entry in report["experience"]:
        told = " ".join(entry["strategy"].split()).replace("|", "\\|")
        failed = f"{entry['failed']} of {entry['pieces']}"
        lines.append(f"| {entry['generation']} | {entry['outcome']} | {entry['gain']:+.4f} | {failed} | {told} |")
    return "\n".join(lines) + "\n"
