"""L1: text out of files. Python source is decoded; its docstrings become pages, their examples pairs."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
from collections.abc import Iterator
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.pipeline import Reject
from davinci_jax.curation.rules import parse

TOPICS = "python/pydoc_data/topics.py"
QUESTION, ANSWER = "Question:\n", "Answer:\n"


@dataclasses.dataclass(frozen=True)
class DecodeUtf8:
    """Reads bytes as UTF-8 and newlines as "\\n"; a byte order mark goes. What is no UTF-8 cannot be read."""

    name = "decode-utf8"
    level = "L1"

    def parameters(self) -> dict[str, Any]:
        return {"newlines": "\\n"}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            try:
                text = document.raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                reject(document, f"not UTF-8 at byte {error.start}")
                continue
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            if text:
                yield document.with_text(text)
            else:
                reject(document, "empty")


@dataclasses.dataclass(frozen=True)
class DocstringPages:
    """Turns a Python file into pages of documentation: one for the module, each function, and each class with its
    methods. The source is parsed, never imported. `pydoc` topics become a page each.

    A page holds, for every docstring, its dotted name with signature, a blank line and the docstring without its
    common indentation. Names are left out of the key that tells duplicates.
    """

    name = "docstring-pages"
    level = "L1"

    def parameters(self) -> dict[str, Any]:
        return {"page": "module, function, or class with its methods", "parser": "ast"}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        for document in documents:
            try:
                pages = list(_pages(document))
            except (SyntaxError, ValueError, RecursionError) as error:
                reject(document, f"does not parse ({error})")
                continue
            if not pages:
                reject(document, "no docstring")
            for page in pages:
                yield dataclasses.replace(
                    page, lineage=document.lineage, licence=document.licence, metadata=document.metadata
                )


@dataclasses.dataclass(frozen=True)
class DoctestPairs:
    """Turns the interactive examples of each docstring into one document of questions and answers.

    A question is the code since the last output, an answer is the output that the documentation prints; it is not
    run here. Earlier pairs of the same docstring are the context of later ones, so they stay together. Everything
    but the answers is marked as a question.
    """

    name = "doctest-pairs"
    level = "L1"

    def parameters(self) -> dict[str, Any]:
        return {"question": f"{QUESTION}>>> code\n{ANSWER}", "parser": "doctest.DocTestParser"}

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        parser = doctest.DocTestParser()
        for document in documents:
            for name, start, end in document.parts:
                if ">>>" not in document.text[start:end]:
                    continue
                part = dataclasses.replace(document, id=f"{document.id}#{name}", parts=())
                try:
                    examples = parser.get_examples(document.text[start:end])
                except ValueError as error:
                    reject(part, f"malformed example ({error})")
                    continue
                text, questions = _pairs(examples)
                if text:
                    yield dataclasses.replace(part, text=text, questions=questions)
                else:
                    reject(part, "no example has an output")


def _pairs(examples: list[doctest.Example]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns the pairs as text with the spans of the questions; examples after the last output are left out."""
    text, questions, code = "", [], ""
    for example in examples:
        lines = example.source.rstrip("\n").split("\n")
        code += "".join(f"{'>>>' if n == 0 else '...'} {line}".rstrip() + "\n" for n, line in enumerate(lines))
        if example.want:
            question = QUESTION + code + ANSWER
            questions.append((len(text), len(text) + len(question)))
            text += question + example.want.rstrip("\n") + "\n\n"
            code = ""
    return text[:-1], tuple(questions)


def _pages(document: Document) -> Iterator[Document]:
    if document.id == TOPICS:
        yield from _topic_pages(document)
    else:
        for entry, docstrings in _entries(document).items():
            yield _page(document, entry, docstrings)


def _page(document: Document, entry: str, docstrings: list[tuple[str, str, str]]) -> Document:
    text, parts = "", []
    for name, signature, docstring in docstrings:
        text += f"{name}{signature}\n\n"
        parts.append((name, len(text), len(text) + len(docstring)))
        text += docstring + "\n\n"
    identity = f"{document.id}::{entry}"
    return Document(id=identity, text=text[:-1], group=document.group, level="L1", parts=tuple(parts))


def _topic_pages(document: Document) -> Iterator[Document]:
    """Yields a page for each entry of the dictionary that `pydoc_data.topics` assigns."""
    for node in parse(document.text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in _constants(node.value):
                identity = f"{document.id}::{topic}"
                text = text.strip("\n") + "\n"
                parts = ((topic, 0, len(text)),)
                # No other document holds a topic's text, so each may be held out on its own.
                yield Document(id=identity, text=text, group=identity, level="L1", parts=parts)


def _constants(table: ast.Dict) -> Iterator[tuple[str, str]]:
    for key, value in zip(table.keys, table.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield str(key.value), value.value


def _entries(document: Document) -> dict[str, list[tuple[str, str, str]]]:
    """Returns page name -> (dotted name, signature, docstring), in the order of the file."""
    module = document.id.removesuffix(".py").removesuffix("/__init__").removeprefix("python/").replace("/", ".")
    entries: dict[str, list[tuple[str, str, str]]] = {}
    for path, signature, docstring in _docstrings(parse(document.text), ()):
        name = ".".join((module, *path))
        entries.setdefault(path[0] if path else module, []).append((name, signature, docstring))
    return entries


def _docstrings(node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yields (path inside the module, signature, docstring) of a definition and those below it."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = (ast.get_docstring(node) or "").strip()
        if docstring:
            yield path, _signature(node), docstring
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return  # functions inside functions are nobody's interface
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, (*path, child.name))
        elif isinstance(child, (ast.If, ast.Try, ast.ExceptHandler, ast.With)):
            yield from _docstrings(child, path)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _added_docstrings(child.value)


def _signature(node: ast.AST) -> str:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"({ast.unparse(node.args)})"
    if isinstance(node, ast.ClassDef) and node.bases:
        return f"({', '.join(ast.unparse(base) for base in node.bases)})"
    return ""


def _added_docstrings(call: ast.Call) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yields what a call documents: numpy and scipy give compiled functions their docstrings by such calls.

    `add_newdoc(place, name, doc)`, `add_newdoc(name, doc)` and `add_newdoc(place, name, (member, doc))`, the
    latter also with a list of pairs; `_array_method_doc(name, signature, doc)`.
    """
    function = getattr(call.func, "id", getattr(call.func, "attr", ""))
    if not (function.startswith("add_newdoc") or function == "_array_method_doc"):
        return
    names = [arg.value for arg in call.args[:-1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if not names:
        return
    named = names[1] if len(names) > 1 and names[1].isidentifier() else names[0]
    path = ("ndarray", names[0]) if function == "_array_method_doc" else (named,)
    docs = call.args[-1]
    for item in docs.elts if isinstance(docs, ast.List) else [docs]:
        parts = [e.value for e in (item.elts if isinstance(item, ast.Tuple) else [item]) if isinstance(e, ast.Constant)]
        if parts and all(isinstance(part, str) for part in parts) and parts[-1].strip():
            yield (*path, *parts[:-1]), "", inspect.cleandoc(parts[-1])
