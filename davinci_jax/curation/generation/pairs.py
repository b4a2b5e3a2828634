"""Questions with answers as documents, the question marked so that training may leave it out of the loss."""

from __future__ import annotations

from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.extract import ANSWER, QUESTION


def pair(parent: Document, suffix: str, question: str, answer: str, **metadata: Any) -> Document:
    """Returns a document of one question with its answer, a child of the document that it came from."""
    asked = f"{QUESTION}{question.strip()}\n{ANSWER}"
    return parent.with_text(
        f"{asked}{answer.strip()}\n",
        id=f"{parent.id}#{suffix}",
        group=parent.group or parent.id,
        questions=((0, len(asked)),),
        metadata={**parent.metadata, **metadata},
    )


def unpair(document: Document) -> tuple[str, str]:
    """Returns the question and the answer of a document; an empty question if it has none that stands alone.

    They are `metadata["question"]`, or else a text without marked questions, and `metadata["answer"]` (for code
    `metadata["tests"]` will do); or the one marked question and the text after it.
    """
    question, answer = document.metadata.get("question"), document.metadata.get("answer", "")
    if not isinstance(question, str) and not document.questions and {"answer", "tests"} & document.metadata.keys():
        question = document.text
    if isinstance(question, str):
        return question.strip(), str(answer).strip()
    if len(document.questions) != 1:
        return "", ""
    start, end = document.questions[0]
    asked = document.text[start:end].removeprefix(QUESTION).removesuffix(ANSWER)
    return asked.strip(), document.text[end:].strip()
