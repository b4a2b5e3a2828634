"""L1: text out of pictures of pages, by a model that sees."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation import quality
from davinci_jax.curation.generation.client import Generation, RequestFailed
from davinci_jax.curation.generation.operation import Ask, Generative
from davinci_jax.curation.pages import BLANK, UNREAD
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks

_BLANK_PAGE = re.compile(r"<PAGE>\s*</PAGE>")
_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcribe(Generative):
    """Transcribes a document whose raw bytes are the picture of one page: PNG, JPEG or WebP.

    Attributes:
      max_bytes: pictures above this are not asked for.
      unread: "reject" drops a page that cannot be read, or is blank; "keep" lets it go on without text, so that
        `join-pages` can say that it is missing. `metadata["unread"]` tells why.
    """

    prompt: str = "transcribe_v1"
    max_tokens: int = 4096
    max_bytes: int = 20 << 20
    unread: str = "reject"
    name, level = "transcribe", "L1"

    def __post_init__(self):
        super().__post_init__()
        checks.one_of(self.name, ("reject", "keep"), unread=self.unread)
        if not self.chat:
            raise ConfigError("transcribe.chat", False, "cannot carry a picture", "use a chat model that sees")

    async def rollout(self, document: Document, ask: Ask) -> tuple[str | None, str]:
        kind = next((kind for signature, kind in _SIGNATURES if document.raw.startswith(signature)), None)
        if kind is None:
            return None, str(document.metadata.get(UNREAD, "is no picture in PNG, JPEG or WebP"))
        if len(document.raw) > self.max_bytes:
            return None, f"is a picture of {len(document.raw)} bytes, above {self.max_bytes}"
        trouble = ""
        picture = f"data:{kind};base64,{base64.b64encode(document.raw).decode()}"
        for attempt in range(self.attempts):
            try:
                said, trouble = self._read(await ask(self._payload(picture, attempt), f"{document.id}@{attempt}"))
            except RequestFailed as error:
                said, trouble = "", f"no answer: {error}"
            if trouble is None:
                return (said, "") if said else (None, BLANK)
        return None, trouble

    def _payload(self, picture: str, attempt: int) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": picture}}]
        messages = [{"role": "system", "content": self.words().text}, {"role": "user", "content": content}]
        settings = {"temperature": self.temperature_of(attempt), "top_p": self.top_p, "max_tokens": self.max_tokens}
        return {"messages": messages, **settings, "seed": self.seed + attempt}

    def _read(self, generation: Generation) -> tuple[str, str | None]:
        if _BLANK_PAGE.fullmatch(generation.text.strip()):
            return "", None
        said, trouble = quality.extract(generation, "PAGE")
        if trouble is None and quality.is_endless(said):
            trouble = "endless"
        if trouble is None and quality.copies(said, self.words().text, "", 10):
            trouble = "copies the prompt"
        return said, trouble

    def finish(self, document: Document, result: tuple[str | None, str]) -> Sequence[Document] | str:
        said, trouble = result
        if said is not None:
            return [document.with_text(f"{said}\n")]
        if self.unread == "reject":
            return trouble
        return [document.with_text("", metadata={**document.metadata, UNREAD: trouble})]
