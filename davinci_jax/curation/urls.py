"""L2: documents by the address that they come from."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
import urllib.parse
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.rules import Rule
from davinci_jax.errors import ConfigError, DataError

_WORDS = re.compile(r"[a-z]+")


@dataclasses.dataclass(frozen=True)
class DropUrls(Rule):
    """Drops documents by `metadata["url"]`; documents without one stay.

    Attributes:
      domains: hosts that are dropped with all below them: "example.com" takes "www.example.com".
      words: words, letters in a row, of which none may stand in the url.
      domains_file: a file of further domains, one a line; "#" begins a comment.
    """

    domains: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    domains_file: str | None = None
    name = "drop-urls"
    reads_text = False

    def __post_init__(self):
        if not (self.domains or self.words or self.domains_file):
            raise ConfigError("drop-urls", None, "has nothing to look for", "give domains, words or a domains_file")
        if self.domains_file and not pathlib.Path(self.domains_file).is_file():
            raise DataError("drop-urls.domains_file", self.domains_file, "does not exist", "name a file of domains")
        listed = pathlib.Path(self.domains_file).read_text(encoding="utf-8") if self.domains_file else ""
        lines = (line.split("#")[0].strip() for line in listed.splitlines())
        domains = frozenset(domain.lower().strip(".") for domain in (*self.domains, *lines) if domain)
        object.__setattr__(self, "_domains", domains)
        object.__setattr__(self, "_words", frozenset(word.lower() for word in self.words))

    def parameters(self) -> dict[str, Any]:
        digest = hashlib.sha256("\n".join(sorted(self._domains)).encode()).hexdigest()[:16]
        return {"domains": len(self._domains), "domains_sha256": digest, "words": sorted(self._words)}

    def reason(self, document: Document) -> str | None:
        url = document.metadata.get("url")
        if not isinstance(url, str):
            return None
        try:
            host = (urllib.parse.urlsplit(url if "://" in url else f"//{url}").hostname or "").strip(".")
        except ValueError:
            return "url cannot be read"
        parts = host.split(".")
        for first in range(len(parts)):
            if ".".join(parts[first:]) in self._domains:
                return f"domain {'.'.join(parts[first:])}"
        found = self._words.intersection(_WORDS.findall(url.lower())) if self._words else ()
        return f"word {min(found)} in the url" if found else None
