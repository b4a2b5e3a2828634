"""A source of random prose with duplicates, and its curation as a config file: what slow tests share."""

import json
import random

from rich.console import Console

from davinci_jax.curation.run import curate
from davinci_jax.experiment import load_any

WORDS = ("the", "of", "a", "model", "learns", "text", "from", "many", "pages", "and", "some", "tables", "while", "it")
CONFIG = """
from davinci_jax.experiment import CuratedSource, CurationConfig, Input, Slurm, Step


def config():
    source = CuratedSource(
        name="s",
        domain="D",
        level="L2",
        inputs=(Input(kind="jsonl", path={path!r}, name="in"),),
        recipe=(
            Step("drop-short", characters=200),
            Step("near-duplicates"),
            Step("gopher-repetition"),
            Step("exact-duplicates"),
        ),
    )
    return CurationConfig(root={root!r}, sources=(source,), {more})
"""


def write_corpus(folder):
    """Twelve files of random prose, some of it twice, 200 kB each."""
    folder.mkdir(exist_ok=True)
    chance = random.Random(0)
    earlier = []
    for n in range(12):
        with (folder / f"{n:02d}.jsonl").open("w") as out:
            for k in range(100):
                text = " ".join(chance.choices(WORDS, k=chance.randrange(5, 600)))
                text = chance.choice(earlier) if earlier and chance.random() < 0.1 else text
                earlier.append(text)
                out.write(json.dumps({"id": f"{n}-{k}", "text": text}) + "\n")
    return folder


def write_config(tmp_path, raw, root, more="workers=1", task_bytes=400_000):
    file = tmp_path / f"{root}.py"
    more = f"task_bytes={task_bytes}, {more}"
    file.write_text(CONFIG.format(path=str(raw), root=str(tmp_path / root), more=more))
    return file


def run(file):
    """Curates the one source of a config file in this process."""
    [result] = curate(load_any(file), Console(quiet=True))
    return result


def content(folder):
    """Everything that must not depend on when and by how many it was made."""
    files = [file for part in ("documents", "rejects", "samples") for file in sorted((folder / part).rglob("*.*"))]
    funnel = json.loads((folder / "funnel.json").read_text())
    del funnel["recipe"]  # it changes with every edit of the code
    for step in funnel["steps"]:
        del step["seconds"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files} | {"funnel": funnel}
