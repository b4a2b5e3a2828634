"""Strategies that evolve against a scripted model whose best strategy is known; labels that a model gives."""

import json
import re

import pytest
import scripted_server
from scripted_server import Reply

from davinci_jax.curation import classifier, evolve, registry
from davinci_jax.curation.documents import Document
from davinci_jax.curation.evolve import Evolution
from davinci_jax.curation.generation.annotate import Annotate
from davinci_jax.curation.generation.refine import ApplyStrategy
from davinci_jax.curation.labels import LabelledText, read_labels
from davinci_jax.curation.ngrams import NGrams
from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment.curation import Step

DOCUMENTS = [
    Document(
        id=f"d{n}", text=f"Copper is drawn into wire, sample {n}. CLICK HERE NOW. It carries current well. BUY TODAY."
    )
    for n in range(6)
]
STRATEGIES = ("Make it lively.", "Drop sentences in capitals that say CLICK.", "Drop all sentences in capitals.")


def judge(texts):
    """Fewer words in capitals are better."""
    return [-len(re.findall(r"\b[A-Z]{3,}\b", text)) for text in texts]


def script(payload, times):
    """A model that finds one issue, proposes better strategies the more it was told of, and follows them."""
    words = scripted_server.prefix(payload)
    if "look for what is wrong" in words:
        return "<ISSUE>Advertisements in capitals.</ISSUE>"
    if "write instructions by which" in words:
        (tried,) = scripted_server.material(payload, "TRIED")
        return f"<STRATEGY>{STRATEGIES[min(tried.count('Score:'), 2)]}</STRATEGY>"
    (strategy,), (text,) = scripted_server.material(payload, "STRATEGY"), scripted_server.material(payload)
    drop = {STRATEGIES[1]: r" CLICK[A-Z ]*\.", STRATEGIES[2]: r" [A-Z ]{6,}\."}.get(strategy)
    return f"<REWRITTEN_TEXT>{re.sub(drop, '', text) if drop else 'Wow! ' * 50}</REWRITTEN_TEXT>"


def run(server, folder, strategy="", **settings):
    url = server if isinstance(server, str) else server.url
    rewriter = ApplyStrategy(endpoint=url, model="m", strategy=strategy, attempts=1)
    settings = {"generations": 3, "proposals": 2, "sample": 3, **settings}
    lines = []
    return evolve.evolve(DOCUMENTS, rewriter, judge, folder, Evolution(**settings), lines.append)


@pytest.mark.slow
def test_the_best_strategy_wins_and_failures_are_told(tmp_path):
    with scripted_server.serve(script) as server:
        report = run(server, tmp_path)
        asked = len(server.payloads)
        again = run(server, tmp_path)
        assert len(server.payloads) == asked
    assert again == report == json.loads((tmp_path / "report.json").read_text())
    assert run("replay", tmp_path) == report
    outcomes = [(entry["strategy"], entry["outcome"], entry["gain"]) for entry in report["experience"]]
    assert outcomes[0] == (STRATEGIES[0], "failed on every piece", 0.0)
    assert outcomes[1] == (STRATEGIES[1], "better", 3.0)
    assert outcomes[2] == (STRATEGIES[2], "better", 5.0)
    assert {outcome for _, outcome, _ in outcomes[3:]} == {"was tried before"}
    assert [entry["strategy"] for entry in report["strategies"]] == [STRATEGIES[2], STRATEGIES[1]]
    assert report["issues"] == ["Advertisements in capitals."]
    told = (tmp_path / "report.md").read_text()
    assert "| 0 | failed on every piece | +0.0000 | 3 of 3 | Make it lively. |" in told
    assert report["generations_asked"] == 3 + 6 + 3 * 3  # issues, proposals, three strategies on three documents


def test_a_budget_ends_it_with_a_report(tmp_path):
    with scripted_server.serve(script) as server:
        report = run(server, tmp_path, budget=7)
        assert len(server.payloads) <= 7 + 4
    assert report["stopped"] == "the budget of 7 generations was spent"
    assert len(report["experience"]) == 2
    assert (tmp_path / "report.md").exists()


def test_a_model_that_says_nothing_of_use(tmp_path):
    with scripted_server.serve(lambda payload, times: "") as server:
        report = run(server, tmp_path, generations=1)
    assert [entry["outcome"] for entry in report["experience"]] == ["no strategy was proposed"] * 2
    assert "No strategy helped." in (tmp_path / "report.md").read_text()
    with pytest.raises(DataError, match="are none"):
        evolve.evolve([], ApplyStrategy(endpoint="replay", model="m", strategy=""), judge, tmp_path)


@pytest.mark.slow
def test_a_classifier_is_a_judge(tmp_path):
    words = {"0": "click buy now cart", "1": "proof lemma energy cell"}
    texts = [LabelledText(f"{words[str(n % 2)]} w{n}", str(n % 2)) for n in range(200)]
    classifier.train(texts, tmp_path / "value", name="value", ngrams=NGrams(bits=10))
    low, high = evolve.judge_by(str(tmp_path / "value"))(["click buy now", "proof of the lemma"])
    assert low < 0.3 < 0.7 < high
    classifier.train(
        [LabelledText(t.text, "ab"[int(t.label)]) for t in texts],
        tmp_path / "kind",
        name="kind",
        ngrams=NGrams(bits=10),
    )
    with pytest.raises(ConfigError, match="are no grades"):
        evolve.judge_by(str(tmp_path / "kind"))


def test_labels_that_a_model_gives_are_read_again(tmp_path):
    said = {
        "d0": "<LABEL>4</LABEL>",
        "d1": "<LABEL>7</LABEL>",
        "d2": "It is a 3.",
        "d3": Reply("<LABEL>4", finish="length"),
    }

    def grade(payload, times):
        (text,) = scripted_server.material(payload)
        return said.get(f"d{re.search('sample (.)', text)[1]}", "<LABEL>1</LABEL>")

    rejects = {}
    with scripted_server.serve(grade) as server:
        operation = Annotate(endpoint=server.url, model="m", store=str(tmp_path / "kept"), field="value")
        made = list(operation.apply(iter(DOCUMENTS), lambda document, why: rejects.setdefault(document.id, why)))
    assert [document.text for document in made] == [DOCUMENTS[n].text for n in (0, 4, 5)]
    assert rejects == {"d1": "no label (unknown label)", "d2": "no label (malformed)", "d3": "no label (truncated)"}
    (tmp_path / "documents.jsonl").write_text("".join(document.to_json() + "\n" for document in made))
    assert [label.label for label in read_labels(tmp_path / "documents.jsonl", "value")] == ["4", "1", "1"]


def test_the_strategy_is_part_of_the_recipe():
    step = Step("apply-strategy", endpoint="replay", model="m", strategy="Drop advertisements.")
    assert registry.build(step).parameters()["strategy"] == "Drop advertisements."
    with pytest.raises(ConfigError, match="strategy"):
        registry.build(Step("apply-strategy", endpoint="replay", model="m"))
