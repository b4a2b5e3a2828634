"""Pages with a known text: what both passes must keep, what they leave out, and pages made to break a parser."""

import importlib.metadata
import re

import pytest

from davinci_jax.curation.documents import Document
from davinci_jax.curation.html import HtmlCareful, HtmlText, decode, unreadable
from davinci_jax.curation.pdf import PdfText
from davinci_jax.curation.threads import ThreadText
from davinci_jax.errors import ConfigError

FILLER = "This paragraph is long enough to be taken for the text of the page, since it has commas, and full stops. " * 2
PAGE = f"""<!doctype html><html><head><title>On  sums</title></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li></ul></nav>
<main><article><h1>On sums</h1><p>{FILLER}</p>
<h2>A program</h2>
<pre><code class="language-python">def total(values):
    s = 0

    for v in values:  # a &lt; b
        s += v
    return s
</code></pre>
<p>Call <code>total([1, 2])</code>. {FILLER}</p>
<p>Then <math alttext="x_1"><semantics><mi>x</mi>
<annotation encoding="application/x-tex">x_1^2</annotation></semantics></math>
is inline and <script type="math/tex; mode=display">\\int_0^1 f_n\\,dx</script> stands alone. {FILLER}</p>
<p><span class="katex"><span class="katex-mathml"><math><semantics><mi>a</mi>
<annotation encoding="application/x-tex">a_i</annotation>
</semantics></math></span><span class="katex-html" aria-hidden="true">aiai</span></span> once. {FILLER}</p>
<ul><li>first point of the list, long enough to stay</li><li>second point of the list, long enough too</li></ul>
<table><tr><th>name</th><th>value</th></tr><tr><td>alpha</td><td>17</td></tr></table>
</article></main>
<footer>Copyright 2020, all rights reserved</footer><script>var hidden = 1;</script></body></html>"""
CODE = "```python\ndef total(values):\n    s = 0\n\n    for v in values:  # a < b\n        s += v\n    return s\n```"


def run(operation, raw, **fields):
    rejects = []
    given = Document(id="d", raw=raw if isinstance(raw, bytes) else raw.encode(), **fields)
    kept = list(operation.apply(iter([given]), lambda document, reason: rejects.append(reason)))
    return (kept[0] if kept else None), (rejects[0] if rejects else None)


@pytest.fixture(scope="module")
def fast():
    return run(HtmlText(keep_raw=True), PAGE)[0]


@pytest.fixture(scope="module")
def careful(fast):
    return next(HtmlCareful().apply(iter([fast]), None))


@pytest.mark.parametrize("which", ["fast", "careful"])
def test_structure_code_and_mathematics_are_kept(which, request):
    text = request.getfixturevalue(which).text
    assert text.startswith("# On sums\n")
    assert "\n## A program\n" in text
    assert CODE in text
    assert "`total([1, 2])`" in text
    assert "Then $x_1^2$" in text
    assert "$$\\int_0^1 f_n\\,dx$$" in text
    assert "$a_i$ once" in text
    assert "aiai" not in text
    assert "second point of the list" in text
    assert "alpha" in text


@pytest.mark.parametrize("which", ["fast", "careful"])
def test_what_surrounds_the_text_is_left_out(which, request):
    text = request.getfixturevalue(which).text
    for part in ("About us", "Copyright", "hidden", "<p>", "class="):
        assert part not in text


def test_bytes_stay_for_the_careful_pass_and_go_after_it(fast, careful):
    assert fast.raw == PAGE.encode()
    assert fast.metadata["title"] == "On sums"
    assert careful.raw == b""
    assert careful.metadata == {"title": "On sums", "extraction": "careful"}
    assert run(HtmlText(), PAGE)[0].raw == b""


def test_surroundings_are_kept_where_they_are_wanted():
    assert "About us" in run(HtmlText(main_content=False), PAGE)[0].text


def test_the_careful_pass_falls_back_on_the_fast_text(fast):
    (kept,) = HtmlCareful(max_bytes=10).apply(iter([fast]), None)
    assert (kept.text, kept.metadata["extraction"]) == (fast.text, "fast")
    kept, why = run(HtmlCareful(), b"", text="")
    assert kept is None
    assert "keep_raw" in why


@pytest.mark.parametrize(
    ("raw", "charset", "expected"),
    [
        ("café".encode(), None, "café"),
        ("café".encode("latin-1"), "iso-8859-1", "café"),
        (b"<meta charset='windows-1251'>" + "привет".encode("cp1251"), None, "привет"),
        (
            b'<meta http-equiv="Content-Type" content="text/html; charset=shift_jis">' + "日本".encode("shift_jis"),
            None,
            "日本",
        ),
        ("“dash – yes”".encode("cp1252"), "latin-1", "“dash – yes”"),  # the web's Latin-1 is Windows-1252
        (b"\xef\xbb\xbf" + "ü".encode(), "latin-1", "ü"),  # a byte order mark wins
        ("\ufeffü".encode("utf-16-le"), None, "ü"),
        ("ü".encode(), "no-such-encoding", "ü"),
        ("ü".encode(), "latin-9x", "ü"),
        ("ü".encode(), "no\x00name", "ü"),
        # Codecs of Python that no page is in, some of which raise an error of their own.
        *(("ü".encode(), name, "ü") for name in ("punycode", "idna", "hex", "undefined", "mbcs", "rot13", "cp037")),
        ("привет".encode("koi8-r"), "koi8-r", "привет"),
        ("안녕".encode("euc-kr"), "ks_c_5601-1987", "안녕"),
    ],
)
def test_encodings(raw, charset, expected):
    assert expected in decode(raw, charset)


def test_bytes_in_no_encoding_still_give_text():
    text = run(HtmlText(main_content=False), b"<p>before \xff\xfe\x81 after</p>" + b"\x00" * 3)[0].text
    assert text.startswith("before")
    assert text.endswith("after")


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "empty"),
        (b"   \n", "empty"),
        (b"<html><body></body></html>", "no text"),
        (b"<script>x</script>", "no text"),
        (b"a" * (8 * 2**20 + 1), "8388609 bytes of HTML, above 8388608"),
        (b"<div>" * 100_000 + b"x", "nested 100000 deep"),
        (b"<span><b>" * 20_000, "nested 40000 deep"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_pages_without_text_and_pages_made_to_break_a_parser(raw, told):
    for operation in (HtmlText(), HtmlCareful(max_bytes=8 * 2**20)):
        kept, why = run(operation, raw)
        assert kept is None
        assert told in why or (isinstance(operation, HtmlCareful) and "no" in why)


def test_many_elements_side_by_side_and_unclosed_are_no_depth():
    assert unreadable(b"<p>a<br><img src=x>" * 5000, 10**9) is None
    assert unreadable(b"<ul>" + b"<li>a" * 5000, 10**9) is None
    assert unreadable(b"<div>a</div>" * 5000, 10**9) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"<<<>>>&&&;;;<p", b"</p></div></html>text<table><tr><p>x", b"\x00\x01<p>a", b"<pre><pre><code>a</pre>b</code>",
        b"<math><math><annotation encoding='application/x-tex'>x</annotation></math></math> y",
        b"<h1><h2><h3>a", b"<code>`a`</code> b",
        b"<p>" + b"a" * 1_000_000, b"<a " + b"x=1 " * 50_000 + b">t</a>", b"plain text, no tags", b"<title>t</title>",
    ],
)  # fmt: skip
def test_broken_pages_raise_nothing(raw):
    first, _ = run(HtmlText(main_content=False, keep_raw=True), raw)
    if first is not None:
        assert list(HtmlCareful().apply(iter([first]), lambda document, reason: None))


def test_lists_keep_their_items_order_and_depth():
    lists = "<ul><li>a<ul><li>in1</li><li><b>in2</b></li></ul></li><li><p>b <i>c</i></p><p>d</p></li></ul>"
    lists += "<ol><li><p>k</p></li><li>l</li></ol>"
    for main_content in (False, True):
        text = run(HtmlText(main_content=main_content), f"<article><p>{FILLER}</p>{lists}<p>{FILLER}</p></article>")[
            0
        ].text
        assert "\n  - a\n    - in1\n    - in2\n  - b c\n" in text
        assert text.index("- b c") < text.index("\n  d\n") < text.index("\n  1. k\n  2. l\n")


def test_a_list_of_links_is_a_menu():
    menu = "<ul><li><a href=1>One page</a></li><li><a href=2>Other page</a></li></ul>"
    page = f"<body><div><p>{FILLER}</p>{menu}<p>{FILLER}</p></div></body>"
    assert "Other page" not in run(HtmlText(), page)[0].text
    assert "  - One page\n  - Other page\n" in run(HtmlText(main_content=False), page)[0].text


def test_mathml_without_tex_keeps_its_characters():
    text = run(HtmlText(main_content=False), "<p>so <math><mi>n</mi><mo>=</mo><mn>3</mn></math> here</p>")[0].text
    assert text.replace(" ", "") == "son=3here"


def test_a_formula_in_a_block_of_code_is_not_lost():
    page = (
        f"<article><p>{FILLER}</p><pre>cost <math alttext='n^2'><mi>n</mi></math> steps</pre><p>{FILLER}</p></article>"
    )
    first, _ = run(HtmlText(keep_raw=True), page)
    (second,) = HtmlCareful().apply(iter([first]), None)
    for text in (first.text, second.text):
        assert "```\ncost $n^2$ steps\n```" in text


@pytest.mark.parametrize("operation", [HtmlText(), HtmlCareful(), PdfText(), ThreadText()], ids=lambda o: o.name)
def test_a_result_of_another_version_of_a_library_is_another_result(operation, monkeypatch):
    before = operation.parameters()
    for library in re.findall(r"[a-z]+(?= [\d.]+)", before["extractor"]):
        real = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata,
            "version",
            lambda name, changed=library, real=real: "99" if name == changed else real(name),
        )
        assert operation.parameters() != before
        assert f"{library} 99" in operation.parameters()["extractor"]
        monkeypatch.undo()
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    with pytest.raises(ConfigError, match=r"needs the package \S+; in the clone: pip install -e '\.\[curation\]'"):
        operation.parameters()


def not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)
