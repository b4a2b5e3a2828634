"""Prompts: versioned text files whose words come first in every request, byte for byte the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from davinci_jax.errors import ConfigError, nearest

FOLDER = pathlib.Path(__file__).with_name("prompts")
_FENCED = re.compile(r"\[\[(?P<title>[^\n]*?) (?P<code>[0-9a-f]{16})\]\]\n.*?\n\[\[END (?P=code)\]\]", re.DOTALL)
_WORD = "Water."
_PICTURE = (  # white, 64 by 64: some models take none below 28
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAAAAACPAi4CAAAAKUlEQVR42u3MQREAAAwCIPuX1hD77SAA6VEEAoFA"
    "IBAIBAKBQCAQfA8Gpwvw4qrwDDIAAAAASUVORK5CYII="
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Fixed words that say what to do with a text.

    Attributes:
      name: its file without ".txt"; a changed prompt gets another name, so that a name always means the same words.
      text: the words.
    """

    name: str
    text: str

    @property
    def record(self) -> dict[str, str]:
        """What lineage and recipe hash know of it."""
        return {"name": self.name, "sha256": hashlib.sha256(self.text.encode()).hexdigest()}

    def payload(self, sections: Sequence[tuple[str, str]], chat: bool) -> dict[str, Any]:
        """Returns the part of a request that carries the prompt and, after it, fenced sections of material.

        The prompt is the same prefix in all requests, so a server that caches prefixes computes it once.

        Args:
          sections: (title, text), in order.
          chat: as messages, the prompt as the system's; otherwise as one text.
        """
        material = "\n\n".join(fence(title, text) for title, text in sections)
        if chat:
            return {
                "messages": [{"role": "system", "content": self.text}, {"role": "user", "content": material}],
            }
        return {"prompt": f"{self.text}\n\n{material}\n\n"}


def fence(title: str, text: str) -> str:
    """Returns a text between two lines that it cannot forge: their code is a digest of the text itself."""
    code = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"[[{title} {code}]]\n{text}\n[[END {code}]]"


def shortened(value: Any) -> Any:
    """Returns a request about next to nothing: its fenced texts are one word, its pictures white, the rest the same."""
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    if isinstance(value, str):
        return _PICTURE if value.startswith("data:") else _FENCED.sub(lambda found: fence(found["title"], _WORD), value)
    return value


@functools.cache
def load(name: str) -> Prompt:
    """Returns a prompt that comes with the project, or one from a file of the user's.

    Args:
      name: such as "refine_v1", or a path that ends in ".txt".

    Raises:
      ConfigError: there is no such prompt, or its file is no text.
    """
    file = pathlib.Path(name) if name.endswith(".txt") else FOLDER / f"{name}.txt"
    known = sorted(item.stem for item in FOLDER.glob("*.txt"))
    if not name.endswith(".txt") and name not in known:
        raise ConfigError("prompt", name, "is no prompt of the project", nearest(name, known))
    try:
        return Prompt(file.stem, file.read_text(encoding="utf-8").strip() + "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prompt", name, f"cannot be read ({error})", "name a UTF-8 text file") from error
