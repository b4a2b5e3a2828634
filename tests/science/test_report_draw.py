"""A drawing: text stays text, and ids and references belong to the drawing."""

import re
import xml.etree.ElementTree

import pytest
import report_run

from davinci_jax.science.report.draw import chart, count_tick
from davinci_jax.science.report.record import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(report_run.write(tmp_path_factory.mktemp("draw") / "run"))


def test_text_is_neither_markup_nor_mathematics(run):
    svg = chart(run, "x", 'a "<b>" & c', lambda axes: axes.annotate("$x_1$ <b> & \\frac", (0.0, 0.5)), str)
    root = xml.etree.ElementTree.fromstring(svg)  # well-formed XML without entities of its own
    assert root.attrib["aria-label"] == 'a "<b>" & c'
    assert "$x_1$ <b> & \\frac" in [element.text for element in root.iter("text")]


def test_ids_are_prefixed_and_every_reference_resolves(run):
    svg = chart(run, "some-name", "", lambda axes: axes.plot([0, 1e4], [1, 2], marker="o"), str)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    used = re.findall(r"url\(#([^)]*)\)", svg) + re.findall(r'href="#([^"]*)"', svg)
    assert ids
    assert used
    assert all(one.startswith("some-name-") for one in ids)
    assert set(used) <= set(ids)
    assert "xmlns" not in svg
    assert "xlink" not in svg


def test_points_lie_where_the_axes_put_them(run):
    """A line from the first to the last token spans the axes: 46 to 420 of 430 units across, 20 to 210 down."""
    end = run.tokens.max()

    def plot(axes):
        axes.plot([0, end], [0, 1], color="#123456")
        axes.set_ylim(0, 1)

    svg = chart(run, "x", "", plot, str)
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: #123456', svg)
    numbers = [float(number) for number in re.findall(r"[\d.]+", path)]
    assert numbers == pytest.approx([46, 210, 420, 20], abs=0.02)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2e6, "2M"), (2.5e6, "2.5M"), (1.25e9, "1.25B"), (10e3, "10k"), (150e9, "150B"), (20, "20")],
)
def test_ticks_of_counts_have_no_idle_zeros(value, text):
    assert count_tick(value) == text
