"""L2: addresses, numbers and keys that belong to somebody, replaced by what they are.

Patterns find what has a form. Names, and numbers without one, they cannot find: this lowers the risk, it does not
make a text anonymous.
"""

from __future__ import annotations

import collections
import dataclasses
import ipaddress
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.spans import Spans, put
from davinci_jax.errors import ConfigError, nearest

KINDS = ("email", "ip", "phone", "secret")
_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9_][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])",
    re.ASCII,
)
# A pattern that begins with a set of characters, before what it asks of those around, skips to the next of them: it is
# five times as fast as one that looks around every place.
_IPV4 = re.compile(r"\d(?<![\w.]\d)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?!\w|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:.])", re.ASCII)
_IPV6_PART = re.compile(r"::|:(?:[0-9A-Fa-f]{1,4}:){6}")  # every address has one of them, and few texts do
# With a country's prefix, or an area code of three digits in the North American form.
_PHONE = re.compile(
    r"[+(1-9](?<![\w.+-][+(1-9])(?:(?<=\+)[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,6}|(?<=\()\d{3}\)[ .-]?\d{3}[ .-]\d{4}"
    r"|(?<=1)[ .-](?:\(\d{3}\)[ .-]?\d{3}[ .-]\d{4}|[2-9]\d{2}-[2-9]\d{2}-\d{4})|(?<=[2-9])\d{2}-[2-9]\d{2}-\d{4})"
    r"(?![\w-]|\.\d)",
    re.ASCII,
)
_VERSION = re.compile(r"(?:version|release|v|ver\.?)[ :=]*$", re.IGNORECASE)
# Public formats of the issuers, each with the words of which one must be in the text for it to be looked for.
_SECRETS = (
    (("PRIVATE KEY",), r"-----BEGIN ([A-Z ]*PRIVATE KEY[A-Z ]*)-----.{20,8192}?-----END \1-----"),
    (("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{36,}\b"),
    (("github_pat_",), r"\bgithub_pat_\w{22,}\b"),
    (("glpat-",), r"\bglpat-[\w-]{20,}"),
    (("xox",), r"\bxox[abeprs]-[\w-]{10,}"),
    (("AIza",), r"\bAIza[\w-]{35}"),
    (("hf_",), r"\bhf_[A-Za-z0-9]{30,}\b"),
    (("sk-",), r"\bsk-(?:[A-Za-z]+-)?[A-Za-z0-9_-]{20,}"),
    (("k_live_",), r"\b[rs]k_live_[A-Za-z0-9]{20,}\b"),
    (("npm_", "pypi-"), r"\bnpm_[A-Za-z0-9]{36}\b|\bpypi-[\w-]{50,}"),
    (("eyJ",), r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
)
_SECRET_PATTERNS = tuple((words, re.compile(pattern, re.DOTALL)) for words, pattern in _SECRETS)
# A value in quotes that is assigned, and what stands before it where the assignment calls it secret.
_ASSIGNED = re.compile(r"[:=]\s{0,4}[\"']([^\s\"']{12,256})[\"']")
_CALLED_SECRET = re.compile(
    r"(?:password|passwd|secret|token|api_?key|access_?key|private_?key)\w{0,40}[\"']?\s{0,4}$", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class ReplacePersonalData:
    """Replaces what belongs to somebody by "<EMAIL>", "<IP>", "<PHONE>" or "<SECRET>" and counts it in the metadata.

    Addresses of example domains, private and documentation networks stay: they are nobody's. A value counts as a
    secret by the form of its issuer, as a private key, or where an assignment calls it one and it looks random.

    Attributes:
      kinds: what is replaced, of `KINDS`.
      drop_secrets: whether a document with a secret is dropped instead.
    """

    kinds: tuple[str, ...] = KINDS
    drop_secrets: bool = False
    name = "replace-personal-data"
    level = "L2"

    def __post_init__(self):
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError("replace-personal-data.kinds", kind, "is unknown", nearest(kind, KINDS))

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            text, counts, (questions, parts) = replace(document.text, self.kinds, (document.questions, document.parts))
            if not counts:
                yield document
            elif self.drop_secrets and counts["secret"]:
                reject(document, f"holds {counts['secret']} keys or passwords")
            else:
                metadata = {**document.metadata, "personal_data": dict(counts)}
                yield document.with_text(text, questions=questions, parts=parts, metadata=metadata)


def replace(
    text: str, kinds: tuple[str, ...] = KINDS, marks: tuple[Spans, ...] = ()
) -> tuple[str, collections.Counter[str], tuple[Spans, ...]]:
    """Returns a text with what belongs to somebody replaced, how often each kind was, and marks on that text.

    Args:
      text: what is looked through.
      kinds: what is looked for.
      marks: lists of spans of the text, which come back as spans of the new one.
    """
    counts: collections.Counter[str] = collections.Counter()

    def cut(pattern: re.Pattern[str], kind: str, fits: Callable[[re.Match[str]], bool], group: int = 0) -> None:
        nonlocal text, marks
        cuts = [(*found.span(group), f"<{kind.upper()}>") for found in pattern.finditer(text) if fits(found)]
        if cuts:
            counts[kind] += len(cuts)
            text, marks = put(text, cuts, marks)

    if "secret" in kinds:
        for words, pattern in _SECRET_PATTERNS:
            if any(word in text for word in words):
                cut(pattern, "secret", lambda found: True)
        cut(_ASSIGNED, "secret", _is_called_secret, group=1)
    if "email" in kinds and "@" in text:
        cut(_EMAIL, "email", _is_real_address)
    if "ip" in kinds:
        cut(_IPV4, "ip", _is_public)
        if _IPV6_PART.search(text):
            cut(_IPV6, "ip", _is_public)
    if "phone" in kinds:
        cut(_PHONE, "phone", lambda found: 9 <= sum(map(str.isdigit, found.group())) <= 15)
    return text, counts, marks


def _is_real_address(found: re.Match[str]) -> bool:
    domain = found.group().rsplit("@", 1)[1].lower()
    return not re.search(r"(?:^|\.)example\.(?:com|net|org)$|\.(?:example|invalid|localhost|test|local)$", domain)


def _is_public(found: re.Match[str]) -> bool:
    try:
        address = ipaddress.ip_address(found.group())
    except ValueError:
        return False
    if address.version == 6 and found.group().count(":") < 3:  # names of a program: a::b
        return False
    before = found.string[max(found.start() - 12, 0) : found.start()]
    return address.is_global and not address.is_multicast and not _VERSION.search(before)


def _is_called_secret(found: re.Match[str]) -> bool:
    before = found.string[max(found.start() - 64, 0) : found.start()]
    return _CALLED_SECRET.search(before) is not None and _looks_random(found.group(1))


def _looks_random(value: str) -> bool:
    """Whether a value has letters, digits and at least 3 bits of entropy a character; words and templates do not."""
    if not re.search(r"[A-Za-z]", value) or not re.search(r"\d", value) or re.search(r"[${}<>()]|x{4}|\*{3}", value):
        return False
    shares = [count / len(value) for count in collections.Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) >= 3
