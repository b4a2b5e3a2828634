"""The page: parses, needs nothing from outside, runs nothing, and shows what is there."""

import html.parser
import json
import re

import pytest
import report_run

from davinci_jax.errors import ConfigError, DataError
from davinci_jax.science.report import tables, write_report
from davinci_jax.science.report.page import render
from davinci_jax.science.report.record import read_run

_VOID = {"meta", "br", "hr", "img", "link", "input"}
_CHARTS = {
    "training-loss", "domain-loss", "heldout-loss", "heldout-bits-per-byte", "learning-rate", "batch-size", "mixture",
    "domain-tokens", "throughput", "data-wait", "grad-norm", "param-norm", "mfu", "memory",
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """Checks nesting while it collects tags with attributes, text and ids."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.ids, self._open = [], "", [], []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        self.text += " " if tag in ("td", "th", "dd", "dt", "li", "span", "small") else ""
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    @property
    def words(self):
        return " ".join(self.text.split())


def _page(run_dir):
    file = write_report(run_dir)
    assert file == run_dir / "report.html"
    return Page(file.read_text(encoding="utf-8"))


def _assert_self_contained(page):
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "image"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "xlink:href", "action")
            assert name != "href" or value.startswith("#")
            assert "//" not in (value or "")
            assert "url(" not in (value or "") or "url(#" in value
    policy = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = report_run.write(tmp_path_factory.mktemp("report") / "tiny")
    report_run.write_samples(folder)
    return folder


@pytest.fixture(scope="module")
def page(finished):
    return _page(finished)


@pytest.mark.slow
def test_the_page_needs_nothing_from_outside_and_runs_nothing(page, finished):
    _assert_self_contained(page)
    source = (finished / "report.html").read_text()
    assert source.lstrip().startswith("<!doctype html>")
    assert "http:" not in source
    assert "https:" not in source
    assert "@import" not in source


def test_every_chart_is_there_with_a_description_and_ids_of_its_own(page):
    figures = {name.removeprefix("chart-") for name in page.ids if name.startswith("chart-")}
    assert figures == _CHARTS
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == len(_CHARTS)
    assert all(one["role"] == "img" and one["aria-label"] and one["viewbox"] for one in drawings)
    assert all("width" not in one for one in drawings)
    assert len(page.ids) == len(set(page.ids))
    used = {value[1:] for _, attributes in page.tags for name, value in attributes.items() if name == "href"}
    used |= {
        one
        for _, attributes in page.tags
        for value in attributes.values()
        for one in re.findall(r"url\(#(.*?)\)", value or "")
    }
    assert used <= set(page.ids)


def test_stage_borders_are_labelled_in_every_chart(finished):
    source = (finished / "report.html").read_text()
    for drawing in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawing)
        assert {"one", "two"} <= set(texts)
        assert drawing.count("stroke-dasharray: 1.6") == 1  # one border between two stages


def test_the_head_tells_status_and_final_figures(page):
    for part in (
        "tiny finished", "Tokens 41.0k of 41.0k, 100.0%", "Steps 60 of 60, 64 tokens a sequence", "Throughput 1.00k/s",
        "MFU 40.0%", "Training loss 2.0000 step 60", "Held-out loss 4.2500 1.2500 bits per byte, step 60",
        "Wall time 1 min 05 s 2 starts", "8 x cpu, fsdp 8",
    ):  # fmt: skip
        assert part in page.words, part


def test_tables_tell_stages_sources_evaluations_and_events(page):
    assert "5 steps up to 3e-4, constant" in page.words
    assert "3e-4, cosine to 3e-5" in page.words
    # Stage two draws 0.75 x 20,480 tokens of 7,680: two epochs; the first source 0.25 x 20,480 + 20,480 of 100,000.
    assert re.search(r"answers QA L5 two 7\.68k declared 15\.4k 2\.00", page.words)
    assert re.search(r"web General L3 all 100k declared 25\.6k 0\.26", page.words)
    assert re.search(r"two 60 41\.0k 4\.125 1\.500 4\.125 1\.500 4\.250 1\.250", page.words)
    assert "3 checkpoints" in page.words
    assert '"sequence_length": 64' in page.text


def test_undone_steps_are_not_drawn(finished):
    assert 9.0 not in [one["loss"] for one in read_run(finished).metrics.train]


@pytest.mark.slow
def test_what_a_run_says_is_escaped_everywhere(tmp_path):
    domains = (report_run.MARKUP, 'Q"A')
    folder = report_run.write(tmp_path / "run", domains=domains, name=report_run.HOSTILE)
    report_run.write_samples(folder)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "event", "event": "<b>", "step": 1, "why": "<svg onload=x>"}) + "\n")
    page = _page(folder)
    _assert_self_contained(page)
    assert not {"b", "u", "s", "a", "i"} & {tag for tag, attributes in page.tags if attributes}
    assert "u" not in {tag for tag, _ in page.tags}
    for text in (report_run.HOSTILE, report_run.MARKUP, 'Q"A', "<svg onload=x>", "<img src=x>"):
        assert text in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(_CHARTS)


@pytest.mark.parametrize("content", [None, "", '{"kind": "event", "event": "start", "step": 0, "time": 1e9}\n{"ki'])
def test_a_run_without_metrics_still_has_a_report(tmp_path, content):
    folder = report_run.write(tmp_path / "run", steps=0)
    (folder / "metrics.jsonl").unlink()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    page = _page(folder)
    assert "There are no training metrics yet" in page.words
    assert "5 steps up to 3e-4, constant" in page.words
    assert not [tag for tag, _ in page.tags if tag == "svg"]


def test_one_interval_is_enough_for_charts(tmp_path):
    page = _page(report_run.write(tmp_path / "run", steps=1))
    assert "There is no held-out evaluation yet." in page.words
    assert {name for name in page.ids if name.startswith("chart-")} >= {"chart-training-loss", "chart-mixture"}


@pytest.mark.slow
def test_lines_with_gaps_and_non_finite_values_are_drawn_without_them(tmp_path):
    folder = report_run.write(tmp_path / "run", steps=30)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(
            '{"kind": "train", "step": 31, "loss": "NaN", "grad_norm": "Infinity", "mfu": null, "stage": "odd"}\n'
        )
        file.write('{"kind": "train", "step": 32, "tokens": "many", "loss": [1], "time": "late"}\n')
    page = _page(folder)
    assert "chart-training-loss" in page.ids
    assert not re.search(r'd="[^"]*(nan|inf)', (folder / "report.html").read_text())


@pytest.mark.slow
def test_unreadable_side_files_are_named(tmp_path):
    folder = report_run.write(tmp_path / "run")
    (folder / "samples.json").write_text("{")
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "55.json").write_text("[")
    words = _page(folder).words
    for name in ("samples.json", "55.json"):
        assert f"{name} could not be read" in words


def test_evaluations_made_after_the_run_are_shown(tmp_path):
    folder = report_run.write(tmp_path / "run", steps=30)
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "20.json").write_text(json.dumps({"loss": 3.875, "loss/General": 3.75}))
    words = _page(folder).words
    assert re.search(r"one \(before its end\) 20 10\.2k 3\.750 - - - 3\.875", words)


def test_shard_sets_replace_the_declared_size(tmp_path, monkeypatch):
    """60 rows of 64 tokens in the shards of the second source; those of the first are damaged."""

    def counted(data, number):
        if number == 0:
            raise DataError("manifest.json", None, "is damaged", "restore it")
        return 60

    monkeypatch.setattr(tables, "counted_rows", counted)
    folder = report_run.write(tmp_path / "run")
    words = _page(folder).words
    assert re.search(r"answers QA L5 two 3\.84k 15\.4k 4\.00", words)
    assert re.search(r"100k( \w+)* 25\.6k 0\.26", words)


@pytest.mark.parametrize("event", ["sigterm", "sigint", "non_finite"])
def test_status_follows_the_last_process_and_its_silence(tmp_path, event):
    folder = report_run.write(tmp_path / "run", steps=30)
    assert read_run(folder).status == "stopped"  # its lines are of the year 2001
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", **report_run.line(31, time=read_run(folder).now)}) + "\n")
    assert read_run(folder).status == "running"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "event", "event": event, "step": 32, "time": 1e9}) + "\n")
    assert read_run(folder).status == "stopped"
    assert read_run(folder).step == 32
    assert tables.events(read_run(folder))[-1]["warning"]


@pytest.mark.slow
def test_the_page_of_a_run_is_always_the_same(finished):
    run = read_run(finished)
    assert render(run) == render(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"RUN = .*holds no experiment\.json"):
        write_report(tmp_path)


@pytest.mark.exhaustive
def test_a_run_of_a_hundred_thousand_lines_stays_below_three_megabytes(tmp_path):
    folder = report_run.write(tmp_path / "run", steps=0)
    with open(folder / "metrics.jsonl", "w") as file:
        for n in range(100_000):
            step = 1 + n % 60
            one = {
                **report_run.line(step),
                "step": n + 1,
                "tokens": 40960 * n / 100_000,
                "loss": 3 + (n * 7919 % 1000) / 1000,
            }
            one["stage"] = "one" if n < 50_000 else "two"
            file.write(json.dumps({"kind": "train", **one}) + "\n")
    assert write_report(folder).stat().st_size < 3_000_000


def test_an_experiment_that_is_no_text_is_told_in_one_line(tmp_path):
    folder = report_run.write(tmp_path / "run")
    (folder / "experiment.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"experiment\.json': cannot be read"):
        write_report(folder)
