"""L1: files of source code: bytes to text, with path and programming language."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
from davinci_jax.errors import ConfigError, nearest

# Ending -> language; where two share an ending, the more common one.
_ENDINGS = {
    "ada": "adb ads", "assembly": "asm s", "awk": "awk", "batch": "bat cmd", "c": "c h", "c#": "cs",
    "c++": "cc cpp cxx hh hpp hxx", "clojure": "clj cljs", "cmake": "cmake", "common-lisp": "lisp cl", "css": "css",
    "cuda": "cu cuh", "cython": "pyx pxd", "d": "d", "dart": "dart", "elixir": "ex exs", "elm": "elm",
    "emacs-lisp": "el", "erlang": "erl hrl", "f#": "fs fsx", "fortran": "f f90 f95 f03 f08 for",
    "glsl": "glsl vert frag", "go": "go", "graphql": "graphql", "groovy": "groovy gradle", "haskell": "hs lhs",
    "html": "html htm xhtml", "java": "java", "javascript": "js mjs cjs jsx", "json": "json", "julia": "jl",
    "kotlin": "kt kts", "lean": "lean", "lua": "lua", "markdown": "md markdown", "nim": "nim", "nix": "nix",
    "objective-c": "m mm", "ocaml": "ml mli", "pascal": "pas pp", "perl": "pl pm", "php": "php",
    "powershell": "ps1 psm1", "prolog": "pro", "protobuf": "proto", "python": "py pyi", "r": "r", "racket": "rkt",
    "restructuredtext": "rst", "ruby": "rb", "rust": "rs", "scala": "scala sc", "scheme": "scm ss", "scss": "scss",
    "shell": "sh bash zsh", "solidity": "sol", "sql": "sql", "swift": "swift", "systemverilog": "sv svh",
    "tcl": "tcl", "tex": "tex sty cls", "toml": "toml", "typescript": "ts tsx", "verilog": "v vh", "vhdl": "vhd vhdl",
    "vim": "vim", "xml": "xml", "yaml": "yaml yml", "zig": "zig",
}  # fmt: skip
LANGUAGES = {ending: language for language, endings in _ENDINGS.items() for ending in endings.split()}
_NAMES = {
    "makefile": "makefile",
    "gnumakefile": "makefile",
    "dockerfile": "dockerfile",
    "cmakelists.txt": "cmake",
    "rakefile": "ruby",
    "gemfile": "ruby",
}
_SHEBANG = re.compile(rb"#!\s*\S*?(?:env\s+(?:-\S+\s+)*)?([A-Za-z]+)[\d.]*(?:\s|$)")
_INTERPRETERS = {"python": "python", "sh": "shell", "bash": "shell", "zsh": "shell", "perl": "perl", "ruby": "ruby"}
_INTERPRETERS |= {"node": "javascript", "awk": "awk", "gawk": "awk", "lua": "lua", "php": "php", "Rscript": "r"}
_LANGUAGES = {*LANGUAGES.values(), *_NAMES.values(), *_INTERPRETERS.values()}


@dataclasses.dataclass(frozen=True)
class CodeFiles:
    """Reads bytes of source as UTF-8 and notes the language by name, ending or first line.

    What holds a zero byte or is no UTF-8 is rejected: a binary, or a text whose encoding nobody states.

    Attributes:
      languages: that are kept; none: all that are known.
      unknown: whether files in no known language are kept.
    """

    languages: tuple[str, ...] = ()
    unknown: bool = False
    name = "code-files"
    level = "L1"

    def __post_init__(self):
        for language in self.languages:
            if language not in _LANGUAGES:
                raise ConfigError("code-files.languages", language, "is unknown", nearest(language, _LANGUAGES))

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            path = str(document.metadata.get("path", document.id))
            language = language_of(path, document.raw)
            reason = self._unwanted(language) or _unreadable(document.raw)
            if reason:
                reject(document, reason)
                continue
            text = document.raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            metadata = {**document.metadata, "path": path}
            metadata |= {"language": language} if language else {}
            yield document.with_text(text, metadata=metadata)

    def _unwanted(self, language: str | None) -> str | None:
        if language is None:
            return None if self.unknown else "no known programming language"
        return f"language {language}" if self.languages and language not in self.languages else None


def language_of(path: str, raw: bytes = b"") -> str | None:
    """Returns the programming language of a file by its name, its ending, or the interpreter in its first line."""
    name = path.rsplit("/", 1)[-1].rsplit("!", 1)[-1].lower()
    if name in _NAMES:
        return _NAMES[name]
    if "." in name[1:]:
        return LANGUAGES.get(name.rsplit(".", 1)[-1])
    found = _SHEBANG.match(raw[:200])
    return _INTERPRETERS.get(found.group(1).decode()) if found else None


def _unreadable(raw: bytes) -> str | None:
    if b"\x00" in raw:
        return "holds a zero byte: a binary, or UTF-16"
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    return None if raw.strip() else "empty"
