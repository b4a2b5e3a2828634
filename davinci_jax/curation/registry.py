"""Names of operations: what a recipe writes, and where the operation lies.

A new operation is one line in `OPERATIONS`, and a function below where its file is new: modules are imported
when a recipe names them, since some need a library of the extra `curation`. Functions and not names of modules, because
nothing here is imported by name.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from davinci_jax.curation.corpus import CorpusOperation
from davinci_jax.curation.inputs import Reader
from davinci_jax.curation.pipeline import Operation
from davinci_jax.curation.versions import INSTALL
from davinci_jax.errors import ConfigError, nearest
from davinci_jax.experiment.curation import Input, Step
from davinci_jax.experiment.serialize import parse


def _annotate() -> ModuleType:
    from davinci_jax.curation.generation import annotate

    return annotate


def _background() -> ModuleType:
    from davinci_jax.curation.generation import background

    return background


def _c4() -> ModuleType:
    from davinci_jax.curation import c4

    return c4


def _code() -> ModuleType:
    from davinci_jax.curation import code

    return code


def _code_rules() -> ModuleType:
    from davinci_jax.curation import code_rules

    return code_rules


def _decontaminate() -> ModuleType:
    from davinci_jax.curation import decontaminate

    return decontaminate


def _dialogues() -> ModuleType:
    from davinci_jax.curation.generation import dialogues

    return dialogues


def _duplicates() -> ModuleType:
    from davinci_jax.curation import duplicates

    return duplicates


def _environments() -> ModuleType:
    from davinci_jax.curation import environments

    return environments


def _extract() -> ModuleType:
    from davinci_jax.curation import extract

    return extract


def _fineweb() -> ModuleType:
    from davinci_jax.curation import fineweb

    return fineweb


def _garbled() -> ModuleType:
    from davinci_jax.curation import garbled

    return garbled


def _gopher() -> ModuleType:
    from davinci_jax.curation import gopher

    return gopher


def _html() -> ModuleType:
    from davinci_jax.curation import html

    return html


def _judges() -> ModuleType:
    from davinci_jax.curation import judges

    return judges


def _language() -> ModuleType:
    from davinci_jax.curation import language

    return language


def _licences() -> ModuleType:
    from davinci_jax.curation import licences

    return licences


def _minhash() -> ModuleType:
    from davinci_jax.curation import minhash

    return minhash


def _notebooks() -> ModuleType:
    from davinci_jax.curation import notebooks

    return notebooks


def _pages() -> ModuleType:
    from davinci_jax.curation import pages

    return pages


def _pdf() -> ModuleType:
    from davinci_jax.curation import pdf

    return pdf


def _pdf_pages() -> ModuleType:
    from davinci_jax.curation import pdf_pages

    return pdf_pages


def _personal_data() -> ModuleType:
    from davinci_jax.curation import personal_data

    return personal_data


def _questions() -> ModuleType:
    from davinci_jax.curation.generation import questions

    return questions


def _readers() -> ModuleType:
    from davinci_jax.curation import readers

    return readers


def _refine() -> ModuleType:
    from davinci_jax.curation.generation import refine

    return refine


def _rejection() -> ModuleType:
    from davinci_jax.curation.generation import rejection

    return rejection


def _repositories() -> ModuleType:
    from davinci_jax.curation import repositories

    return repositories


def _retrieval() -> ModuleType:
    from davinci_jax.curation import retrieval

    return retrieval


def _rules() -> ModuleType:
    from davinci_jax.curation import rules

    return rules


def _sizes() -> ModuleType:
    from davinci_jax.curation import sizes

    return sizes


def _threads() -> ModuleType:
    from davinci_jax.curation import threads

    return threads


def _transcribe() -> ModuleType:
    from davinci_jax.curation.generation import transcribe

    return transcribe


def _urls() -> ModuleType:
    from davinci_jax.curation import urls

    return urls


# Kind of an input -> (module, class of its reader).
READERS: dict[str, tuple[Callable[[], ModuleType], str]] = {
    "documents": (_readers, "DocumentsReader"),
    "folder": (_readers, "FolderReader"),
    "git": (_repositories, "GitReader"),
    "html": (_readers, "HtmlReader"),
    "jsonl": (_readers, "JsonlReader"),
    "parquet": (_readers, "ParquetReader"),
    "pdf": (_readers, "PdfReader"),
    "python-installation": (_readers, "PackageReader"),
    "stack-exchange": (_threads, "StackExchangeReader"),
    "warc": (_readers, "WarcReader"),
}

# Name in a recipe -> (module, class).
OPERATIONS: dict[str, tuple[Callable[[], ModuleType], str]] = {
    "c4-quality": (_c4, "C4Quality"),
    "code-files": (_code, "CodeFiles"),
    "code-quality": (_code_rules, "CodeQuality"),
    "decode-utf8": (_extract, "DecodeUtf8"),
    "decontaminate": (_decontaminate, "Decontaminate"),
    "docstring-pages": (_extract, "DocstringPages"),
    "doctest-pairs": (_extract, "DoctestPairs"),
    "drop-garbled": (_rules, "DropGarbled"),
    "drop-garbled-text": (_garbled, "DropGarbledText"),
    "drop-paths": (_rules, "DropPaths"),
    "drop-short": (_rules, "DropShort"),
    "drop-unparsable": (_rules, "DropUnparsable"),
    "drop-urls": (_urls, "DropUrls"),
    "exact-duplicates": (_duplicates, "ExactDuplicates"),
    "find-licence": (_licences, "FindLicence"),
    "fineweb-quality": (_fineweb, "FineWebQuality"),
    "gopher-quality": (_gopher, "GopherQuality"),
    "gopher-repetition": (_gopher, "GopherRepetition"),
    "html-careful": (_html, "HtmlCareful"),
    "html-text": (_html, "HtmlText"),
    "join-pages": (_pages, "JoinPages"),
    "keep-languages": (_language, "KeepLanguages"),
    "keep-licences": (_licences, "KeepLicences"),
    "keep-sizes": (_sizes, "KeepSizes"),
    "near-duplicates": (_minhash, "NearDuplicates"),
    "notebook-text": (_notebooks, "NotebookText"),
    "pdf-pages": (_pdf_pages, "PdfPages"),
    "pdf-text": (_pdf, "PdfText"),
    "replace-personal-data": (_personal_data, "ReplacePersonalData"),
    "thread-text": (_threads, "ThreadText"),
    "ask-questions": (_questions, "AskQuestions"),
    "complete": (_refine, "Complete"),
    "document-type": (_judges, "DocumentType"),
    "domain": (_judges, "Domain"),
    "educational-value": (_judges, "EducationalValue"),
    "refine": (_refine, "Refine"),
    "rejection-sampling": (_rejection, "RejectionSampling"),
    "transcribe": (_transcribe, "Transcribe"),
    "write-dialogues": (_dialogues, "WriteDialogues"),
    "bring-references": (_retrieval, "BringReferences"),
    "run-claims": (_environments, "RunClaims"),
    "write-background": (_background, "WriteBackground"),
    "annotate": (_annotate, "Annotate"),
    "apply-strategy": (_refine, "ApplyStrategy"),
}


def build(step: Step, field: str = "recipe") -> Operation | CorpusOperation:
    """Returns the operation that a step of a recipe names, with its parameters in their declared types.

    Args:
      step: name and parameters.
      field: what errors call the place of the step.

    Raises:
      ConfigError: an unknown operation, an unknown parameter or one of the wrong type, or a missing one.
    """
    return _build(OPERATIONS, step.operation, dict(step.parameters), field, "is no operation")


def build_reader(given: Input, field: str = "inputs") -> Reader:
    """Returns what reads an input, with its options in their declared types.

    Raises:
      ConfigError: an unknown kind, an unknown option or one of the wrong type.
    """
    return _build(READERS, given.kind, dict(given.options), field, "is no kind of input")


def _build(table: dict[str, tuple[Callable[[], ModuleType], str]], name: str, values: dict, field: str, problem: str):
    if name not in table:
        raise ConfigError(field, name, problem, nearest(name, table))
    module, kind = table[name]
    try:
        return parse(getattr(module(), kind), values, f"{field}.{name}")
    except ImportError as error:
        raise ConfigError(field, name, f"needs a package that is not installed ({error})", INSTALL) from error
