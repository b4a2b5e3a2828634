"""L2: licences: found in the text where a document carries none, and kept or dropped by an SPDX expression."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.rules import Rule
from davinci_jax.curation.versions import installed
from davinci_jax.errors import ConfigError

PERMISSIVE = (
    "0BSD", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC-BY-3.0", "CC-BY-4.0",
    "CC0-1.0", "ISC", "MIT", "MIT-0", "NCSA", "PostgreSQL", "PSF-2.0", "Python-2.0", "Unicode-3.0", "Unlicense",
    "WTFPL", "X11", "Zlib",
)  # fmt: skip
_HEAD = 4096  # characters in which a file states its licence
# A longer expression is none: its beginning alone could mean something else.
_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+\-() ]{2,100})(?![A-Za-z0-9.+\-() ])")
# Sentences that stand in the licence itself or in its notice; blanks are single, letters small.
_PHRASES = (
    (re.compile(r"apache license,? version 2\.0"), "Apache-2.0"),
    (re.compile(r"permission is hereby granted, free of charge, to any person obtaining a copy"), "MIT"),
    (re.compile(r"permission to use, copy, modify, and/?(?:or)? distribute this software for any purpose"), "ISC"),
    (re.compile(r"redistributions? in binary form.{0,2000}?neither the name"), "BSD-3-Clause"),
    (re.compile(r"redistribution and use in source and binary forms"), "BSD-2-Clause"),
    (re.compile(r"gnu affero general public license"), "AGPL-3.0-or-later"),
    (re.compile(r"gnu (?:lesser|library) general public license"), "LGPL-2.1-or-later"),
    (re.compile(r"gnu general public license.{0,200}?version 3"), "GPL-3.0-or-later"),
    (re.compile(r"gnu general public license"), "GPL-2.0-or-later"),
    (re.compile(r"mozilla public license,? v(?:ersion|\.) ?2\.0"), "MPL-2.0"),
    (re.compile(r"this is free and unencumbered software released into the public domain"), "Unlicense"),
    (re.compile(r"creativecommons\.org/publicdomain/zero/1\.0"), "CC0-1.0"),
    (re.compile(r"creativecommons\.org/licenses/by/(\d\.\d)"), "CC-BY-{}"),
    (re.compile(r"creativecommons\.org/licenses/by-sa/(\d\.\d)"), "CC-BY-SA-{}"),
    (re.compile(r"all rights reserved"), "LicenseRef-all-rights-reserved"),
)
_COMMENT = re.compile(r"^\s*(?://|#|\*|/\*+|--|;+|%|<!--|dnl)+|\*/|-->", re.MULTILINE)
_TOKENS = re.compile(r"\(|\)|[^\s()]+")


@dataclasses.dataclass(frozen=True)
class FindLicence:
    """Gives a document without a licence the one that its first 4,096 characters state, else that of its repository.

    The reader of git repositories leaves that in `metadata["repository_licence"]`.
    """

    name = "find-licence"
    level = "L2"

    def parameters(self) -> dict[str, Any]:
        return {"characters": _HEAD, "identifiers": installed(self.name, "packaging")}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            found = None
            if not document.licence:
                found = stated_licence(document.text) or document.metadata.get("repository_licence")
            yield dataclasses.replace(document, licence=found) if found else document


@dataclasses.dataclass(frozen=True)
class KeepLicences(Rule):
    """Keeps documents whose licence allows it: of "A OR B" one must be among them, of "A AND B" both.

    Attributes:
      licences: SPDX identifiers.
      unknown: whether documents without a licence are kept.
    """

    licences: tuple[str, ...] = PERMISSIVE
    unknown: bool = False
    name = "keep-licences"
    reads_text = False

    def __post_init__(self):
        if not self.licences and not self.unknown:
            raise ConfigError("keep-licences.licences", (), "is empty, which drops everything", "name SPDX identifiers")

    def reason(self, document: Document) -> str | None:
        if not document.licence:
            return None if self.unknown else "no known licence"
        if is_allowed(document.licence, self.licences):
            return None
        return f"licence {document.licence}"


def stated_licence(text: str) -> str | None:
    """Returns the SPDX expression that the beginning of a text states, `None` if it states none that is known.

    A tag counts if all its identifiers are on SPDX's list or begin with "LicenseRef-".
    """
    head = text[:_HEAD]
    for tag in _TAG.findall(head):
        try:
            return canonicalize_license_expression(tag.strip(" *-"))
        except InvalidLicenseExpression:
            continue
    plain = " ".join(_COMMENT.sub(" ", head).lower().split())
    for phrase, licence in _PHRASES:
        found = phrase.search(plain)
        if found:
            return licence.format(*found.groups())
    return None


def is_allowed(expression: str, licences: tuple[str, ...]) -> bool:
    """Whether an SPDX expression is met by some licences; one that cannot be read is not.

    AND binds closer than OR. An exception after WITH only grants more, so it is passed over.
    """
    known = {licence.lower() for licence in licences}
    tokens = _TOKENS.findall(expression)[::-1]

    def alternatives() -> bool:
        allowed = conjunction()
        while tokens and tokens[-1].upper() == "OR":
            tokens.pop()
            allowed = conjunction() or allowed
        return allowed

    def conjunction() -> bool:
        allowed = single()
        while tokens and tokens[-1].upper() == "AND":
            tokens.pop()
            allowed = single() and allowed
        return allowed

    def single() -> bool:
        token = tokens.pop()
        if token == "(":
            allowed = alternatives()
            if tokens.pop() != ")":
                raise IndexError
            return allowed
        if tokens and tokens[-1].upper() == "WITH":
            del tokens[-2:]
        return token.lower() in known

    try:
        allowed = alternatives()
    except (IndexError, RecursionError):
        return False
    return allowed and not tokens
