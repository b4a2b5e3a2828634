"""Text made to keep a pattern busy: no operation may take more than a moment for it, or raise."""

import time

import pytest

from davinci_jax.curation.c4 import C4Quality
from davinci_jax.curation.code_rules import CodeQuality
from davinci_jax.curation.documents import Document
from davinci_jax.curation.fineweb import FineWebQuality
from davinci_jax.curation.garbled import DropGarbledText
from davinci_jax.curation.gopher import GopherQuality, GopherRepetition
from davinci_jax.curation.html import HtmlCareful, HtmlText, decode
from davinci_jax.curation.language import KeepLanguages
from davinci_jax.curation.licences import FindLicence
from davinci_jax.curation.minhash import NearDuplicates
from davinci_jax.curation.notebooks import _IMAGE
from davinci_jax.curation.personal_data import ReplacePersonalData
from davinci_jax.curation.sizes import KeepSizes

pytestmark = pytest.mark.slow
OPERATIONS = [
    C4Quality(), CodeQuality(), DropGarbledText(), FindLicence(), FineWebQuality(), GopherQuality(), GopherRepetition(),
    KeepLanguages(), KeepSizes(), ReplacePersonalData(),
]  # fmt: skip
COUNT = 40_000
HOSTILE = [
    "-" * COUNT,
    "-=" * COUNT,
    "(" * COUNT,
    ")." * COUNT,
    "." * COUNT,
    ":)" * COUNT,
    "a.b" * COUNT,
    "a-" * COUNT,
    "'s" * COUNT,
    "1,1." * COUNT,
    "+1 2" * COUNT,
    "a@" * COUNT,
    "a@b." * COUNT,
    "::" * COUNT,
    "0x" * COUNT,
    "password='" * (COUNT // 4),
    "-----BEGIN PRIVATE KEY-----" * (COUNT // 20),
    "redistributions in binary form " * (COUNT // 10),
    "gnu general public license " * (COUNT // 10),
    "[" * COUNT,
    "![" * COUNT,
    "Ã©" * COUNT,
    " " * COUNT,
    "\n" * COUNT,
    "\ud800" * COUNT,
    "\x00" * COUNT,
    "e\u0301" * COUNT,
    "x" * (4 * COUNT),
    "{" * COUNT + "\n" + "x. " * COUNT,
    "a b " * COUNT,
]


def seconds(work):
    started = time.process_time()
    work()
    return time.process_time() - started


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:8]))
def test_rules_take_a_moment(text):
    for operation in OPERATIONS:

        def work(operation=operation):
            list(
                operation.apply(iter([Document(id="d", text=text, metadata={"language": "python"})]), lambda d, r: None)
            )

        assert seconds(work) < 4, operation.name
    assert seconds(lambda: NearDuplicates().keys(Document(id="d", text=text))) < 4
    assert seconds(lambda: _IMAGE.sub("", text)) < 4


@pytest.mark.parametrize(
    "raw", [b"<a", b"<a<", b"<!--", b"<p>a", b"</", b"<a href='", b"<pre>", b"&amp", b"<math>", b"<ul><li>", b"<li>"]
)
def test_pages_take_a_moment(raw):
    document = Document(id="d", raw=raw * 20_000)
    left = []
    assert seconds(lambda: left.extend(HtmlText(keep_raw=True).apply(iter([document]), lambda d, r: None))) < 6
    assert seconds(lambda: list(HtmlCareful().apply(iter(left), lambda d, r: None))) < 20


@pytest.mark.parametrize("name", ["punycode", "idna", "unicode_escape", "utf-7"])
def test_encodings_that_no_page_is_in_take_a_moment(name):
    raw = f"<meta charset='{name}'>-".encode() + b"a" * 600_000
    assert seconds(lambda: decode(raw)) < 1
