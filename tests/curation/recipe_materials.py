"""What the shipped recipes want to find below the folder that they run in: raw files, classifiers, benchmarks."""

import dataclasses
import hashlib
import json
import pathlib
import re
from pydoc_data import topics

import numpy as np
import safetensors.numpy
from raw_files import fasttext_model, git, pdf, warc

from davinci_jax.curation import classifier
from davinci_jax.curation.labels import LabelledText
from davinci_jax.curation.ngrams import NGrams
from davinci_jax.experiment.load import load_any

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
NAMES = sorted(file.stem for file in CONFIGS.glob("curate_*.py"))
# Twenty words and more, which no page may have.
BENCHMARK = (
    "A farmer has twelve hens, and every hen lays five eggs in a week, of which he sells two thirds on the market "
    "for thirty cents each. How many cents does he earn in four weeks?"
)
ADVERTISEMENT = (
    "The sale of the year begins now, and you have never seen a discount like that. Click on the banner to order a "
    "voucher, and have the offer of the week sent to your door. The offer ends soon, so that you should order now."
)
PROSE = (
    "A river takes sand and mud from the hills, and lays them down where it slows. Near the sea, where the land is "
    "level, it builds a plain that is younger than the people who live on it.",
    "When the water is high it leaves its bed. What it carries then stays on the fields, and they have more to give in "
    "the next year. That is why the first large towns stood beside such rivers.",
    "A dam ends all of this. The sand stays behind the wall, the plain sinks, and the sea comes in with every storm.",
)
MIT = "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy of this software."
GPL = "GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007\n\nEveryone is permitted to copy this license document."


def load(name):
    """The curation config of a shipped recipe."""
    return load_any(CONFIGS / f"{name}.py")


def paragraphs():
    """Paragraphs of prose from the manual that Python carries with it, each on one line."""
    found = []
    for _, text in sorted(topics.topics.items()):
        blocks = [block for block in re.split(r"\n\s*\n", text) if not block.startswith((" ", "*", "-", "["))]
        joined = (" ".join(block.split()) for block in blocks)
        found += [
            block for block in joined if len(block) > 280 and block.endswith(".") and not set("{}|=") & set(block)
        ]
    return list(dict.fromkeys(found))


def write_benchmark(folder):
    (folder / "benchmarks").mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks/tiny.jsonl").write_text(json.dumps({"question": BENCHMARK, "answer": "4800"}) + "\n")


def train(folder, good, bad, prose):
    """A classifier that knows this project's prose from advertisements; the other classes have words of their own."""
    labels = [LabelledText(text, good) for text in prose[:60]]
    labels += [LabelledText(f"{ADVERTISEMENT} Order {n}.", bad[0]) for n in range(40)]
    labels += [LabelledText(f"{name} {name}xy word{n}", name) for name in bad[1:] for n in range(40)]
    settings = classifier.Training(epochs=4, batch=64)
    classifier.train(labels, folder, name=folder.name, ngrams=NGrams(bits=12), training=settings)


def leave_untrained(folder, good, bad, prose):
    """A classifier with these classes that knows nothing, which takes no time to make."""
    classes, ngrams = sorted([good, *bad]), NGrams(bits=8)
    weights = {"weights": np.zeros((256, len(classes)), "f4"), "bias": np.zeros(len(classes), "f4")}
    stored = safetensors.numpy.save(weights)
    card = {"classes": classes, "ngrams": dataclasses.asdict(ngrams), "temperature": 1.0}
    card["sha256"] = hashlib.sha256(stored).hexdigest()
    folder.mkdir()
    (folder / classifier.WEIGHTS_FILE).write_bytes(stored)
    (folder / classifier.CARD_FILE).write_text(json.dumps(card))


def write_models(folder, config, make=train):
    """Makes what the steps of a config name: a class for all that they keep and for all that they drop."""
    prose = paragraphs()
    for source in config.sources:
        for step in source.recipe:
            model = folder / step.parameters.get("model", "")
            if step.operation not in ("educational-value", "domain", "document-type") or model.exists():
                continue
            model.parent.mkdir(parents=True, exist_ok=True)
            keep, drop = list(step.parameters.get("keep", ())), list(step.parameters.get("drop", ()))
            if model.suffix == ".bin":
                words, axes = ("the", "of", "and", "sale", "discount", "voucher"), np.repeat([[1.0, 0], [0, 1]], 3, 0)
                classes = [f"__label__{keep[0]}", "__label__other"]
                # Advertisements have "the" and "of" too: their own words weigh more.
                axes[3:] *= 30
                model.write_bytes(fasttext_model(words, classes, axes, np.array([[5.0, -5], [-5, 5]])))
            elif step.operation == "educational-value":
                make(model, "4", ["0", "1", "2", "3", "5"], prose)
            elif keep:
                make(model, "computer science", ["shopping", *sorted({*keep} - {"computer science"})], prose)
            else:
                make(model, "textbook", drop, prose)


def page(text, title="A page"):
    """HTML with a menu around paragraphs."""
    menu = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/about'>About us</a></li></ul></nav>"
    body = "".join(f"<p>{part}</p>" for part in text.split("\n"))
    main = f"<main><h1>{title}</h1>{body}</main>"
    return f"<html><head><title>{title}</title></head><body>{menu}{main}</body></html>".encode()


def write_warc(file, pages):
    """Pages by their address."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(warc(*(("response", url, b"text/html; charset=utf-8", raw) for url, raw in pages.items())))


def write_repository(folder, files):
    """A git repository with one commit."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")


def write_pdf(file, texts):
    """A PDF file with paragraphs, broken into lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for text in texts for line in (*re.findall(r".{1,80}(?:\s|$)", text), "")]
    lines = [re.sub(r"[()\\]", "", line.strip()).encode("ascii", "ignore").decode() for line in lines]
    file.write_bytes(pdf(*(lines[n : n + 45] for n in range(0, len(lines), 45))))
