"""What belongs to somebody, planted among what only looks like it. Keys here are made up and open nothing."""

import collections
import itertools
import random
import re
import string

import hypothesis
import hypothesis.strategies as st
import pytest

from davinci_jax.curation import personal_data
from davinci_jax.curation.documents import Document
from davinci_jax.curation.personal_data import ReplacePersonalData, replace
from davinci_jax.errors import ConfigError

LETTERS = string.ascii_letters + string.digits


def made_up(length, seed=0, alphabet=LETTERS):
    return "".join(random.Random(seed).choice(alphabet) for _ in range(length))


SECRETS = [
    "AKIA" + made_up(16, 1, string.ascii_uppercase + string.digits),
    "ghp_" + made_up(36, 2),
    "github_pat_" + made_up(30, 3),
    "glpat-" + made_up(20, 4),
    "xoxb-" + made_up(24, 5),
    "AIza" + made_up(35, 6),
    "hf_" + made_up(34, 7),
    "sk-" + made_up(48, 8),
    "sk-ant-" + made_up(40, 9),
    "sk_live_" + made_up(24, 10),
    "npm_" + made_up(36, 11),
    f"eyJ{made_up(20, 12)}.eyJ{made_up(30, 13)}.{made_up(40, 14)}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{made_up(64, 15)}\n{made_up(64, 16)}\n-----END RSA PRIVATE KEY-----",
    f"-----BEGIN OPENSSH PRIVATE KEY-----\n{made_up(64, 17)}\n-----END OPENSSH PRIVATE KEY-----",
    f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n{made_up(64, 18)}\n-----END PGP PRIVATE KEY BLOCK-----",
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:14])
def test_keys_of_every_form_are_replaced(secret):
    text, counts, _ = replace(f"before {secret} after")
    assert text == "before <SECRET> after"
    assert counts == {"secret": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("password = 'q8Zr1mT0xLp2'", "password = '<SECRET>'"),
        ('"api_key": "a9f3b7c1d5e2f8a4"', '"api_key": "<SECRET>"'),
        ("SECRET_TOKEN='Zx81-kk20-Qw93'", "SECRET_TOKEN='<SECRET>'"),
        ("Mail ada.lovelace+x@math.ox.ac.uk.", "Mail <EMAIL>."),
        ("<first_last@sub-domain.co>,b@x.io;", "<<EMAIL>>,<EMAIL>;"),
        ("at 8.8.8.8, or [2001:4860:4860::8888]", "at <IP>, or [<IP>]"),
        ("call +49 30 1234567 or (212) 555-0187 now", "call <PHONE> or <PHONE> now"),
        ("1-212-555-0187, 212-555-0187", "<PHONE>, <PHONE>"),
        ("+44 (0)20 7946 0958.", "<PHONE>."),
    ],
)
def test_planted_data_is_replaced(text, expected):
    assert replace(text)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com, me@mail.example.org, a@host.invalid",  # reserved for documentation (RFC 2606)
        "127.0.0.1 10.0.0.7 192.168.1.1 0.0.0.0 255.255.255.0 192.0.2.44",  # nobody's
        "version 8.8.4.4, v1.2.3.4, 1.2.3.4.5, 256.300.1.1, 01:23:45, std::vector::at, a::b",
        "password = 'correcthorsebattery'",  # words
        'password = "${DATABASE_PASSWORD1}"',  # a template
        "token: '<your-token-1-here>'",
        "key = os.environ['API_KEY_2']",
        "@property def f(x): return x @ y",
        "pi is 3.14159265358979, 1234567890 1609459200000, 2021-01-01 12:00, ISBN 978-3-16-148410-0",
        "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
        "10.1145/3292500.3330701 and 555-1234 and 800-53",
        "sk-learn and task-force-one-two",
    ],
)
def test_what_only_looks_like_it_stays(text):
    assert replace(text) == (text, {}, ())


def run(operation, document):
    rejects = []
    return list(operation.apply(iter([document]), lambda document, reason: rejects.append(reason))), rejects


def test_counts_are_noted_and_spans_move():
    document = Document(id="d", text="a@b.io and c@d.io at 8.8.8.8", questions=((0, 3),), metadata={"url": "u"})
    ((out,), rejects) = run(ReplacePersonalData(), document)
    assert out.text == "<EMAIL> and <EMAIL> at <IP>"
    assert out.metadata == {"url": "u", "personal_data": {"email": 2, "ip": 1}}
    assert out.questions == ((0, 7),)
    assert rejects == []


def test_a_document_without_any_passes_as_it_is():
    document = Document(id="d", text="nothing here", questions=((0, 3),))
    assert run(ReplacePersonalData(), document) == ([document], [])


def test_documents_with_keys_may_be_dropped_instead():
    assert run(ReplacePersonalData(drop_secrets=True), Document(id="d", text=SECRETS[0])) == (
        [],
        ["holds 1 keys or passwords"],
    )
    assert len(run(ReplacePersonalData(drop_secrets=True), Document(id="d", text="a@b.io"))[0]) == 1


def test_kinds_are_chosen():
    assert replace("a@b.io 8.8.8.8", ("ip",))[0] == "a@b.io <IP>"
    with pytest.raises(ConfigError, match="did you mean 'email'"):
        ReplacePersonalData(kinds=("emails",))


def test_long_lines_of_marks_take_no_time():
    for text in (
        "a." * 50_000 + "@",
        "+1 " * 50_000,
        "1." * 50_000,
        ":" * 50_000,
        "-----BEGIN PRIVATE KEY-----" * 2000,
    ):
        assert len(replace(text)[0]) > 0


PIECES = ["", "why? ", "ask a@b.io ", "at 8.8.8.8 or x@y.org. ", "é ", "call 212-555-0123 now ", SECRETS[0] + " "]


@hypothesis.given(st.lists(st.tuples(st.sampled_from(PIECES), st.booleans()), max_size=8))
def test_marks_move_with_the_text_that_they_mark(pieces):
    """Each piece is replaced alone as it is among the others, so the marks must lead to it."""
    ends = list(itertools.accumulate(len(piece) for piece, _ in pieces))
    spans = tuple((end - len(piece), end) for (piece, marked), end in zip(pieces, ends, strict=True) if marked)
    text, _, (moved,) = replace("".join(piece for piece, _ in pieces), marks=(spans,))
    assert text == "".join(replace(piece)[0] for piece, _ in pieces)
    assert [text[start:end] for start, end in moved] == [replace(piece)[0] for piece, marked in pieces if marked]


def test_a_mark_that_ends_inside_an_address_reaches_around_the_word():
    text, _, ((first, second),) = replace("to abc@de.io, then", marks=(((0, 6), (5, 18)),))
    assert text == "to <EMAIL>, then"
    assert text[slice(*first)] == "to <EMAIL>"
    assert text[slice(*second)] == "<EMAIL>, then"


def test_questions_stay_marked():
    document = Document(id="d", text="Who is a@b.io?\nNobody.", questions=((0, 14),))
    [after] = ReplacePersonalData().apply(iter([document]), lambda document, reason: None)
    assert [after.text[slice(*span)] for span in after.questions] == ["Who is <EMAIL>?"]


def test_parts_keep_their_names():
    given = Document(id="d", text="to abc@de.io, then", parts=(("first", 0, 12), ("second", 14, 18)))
    (made,) = ReplacePersonalData().apply(iter([given]), None)
    assert made.parts == (("first", 0, 10), ("second", 12, 16))
    assert made.key == "to <EMAIL>\n\nthen"


_PLAIN_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)", re.ASCII)
_PLAIN_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,6}|(?:1[ .-])?\(\d{3}\)[ .-]?\d{3}[ .-]\d{4}"
    r"|(?:1[ .-])?[2-9]\d{2}-[2-9]\d{2}-\d{4})(?![\w-]|\.\d)",
    re.ASCII,
)
_TOKENS = ["+", "1", "1-", "(", "212", ")", "555-0187", "(212)", "-", ".", "8.8.8.8", "::", ":", ":ab", " ", "2001:"]


def test_patterns_that_are_fast_find_what_plain_ones_find():
    generator, found = random.Random(0), collections.Counter()
    for _ in range(12_000):
        text = "".join(generator.choices(_TOKENS, k=generator.randrange(1, 16)))
        for fast, plain in ((personal_data._IPV4, _PLAIN_IPV4), (personal_data._PHONE, _PLAIN_PHONE)):
            spans = [match.span() for match in fast.finditer(text)]
            assert spans == [match.span() for match in plain.finditer(text)], text
            found[fast] += len(spans)
        if any(map(personal_data._is_public, personal_data._IPV6.finditer(text))):
            assert personal_data._IPV6_PART.search(text), text
            found["six"] += 1
    assert len(found) == 3
    assert min(found.values()) > 100


@pytest.mark.parametrize("address", ["2001:4860:4860:0:0:0:0:8888", "2001:4860:4860::8888", "2001:4860::"])
def test_addresses_of_all_forms_are_replaced(address):
    assert replace(f"at {address} now")[0] == "at <IP> now"
