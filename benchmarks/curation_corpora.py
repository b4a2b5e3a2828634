"""From raw documents to token shards on the corpora of benchmarks/corpora.py: funnel, core-seconds, peak memory.

  python benchmarks/curation_corpora.py --corpora data/corpora --root data/corpora-run \
      --most 1100 --output benchmarks/results/curation_corpora.json

A random sample of the files (`--sample`, megabytes) goes first, then all of them or `--most`, so that memory can be
compared. A run is `davinci curate benchmarks/corpora/curate.py` and `davinci shard`, each with a clean folder.
Core-seconds are the CPU time of the command and all its processes; peak memory is that of the largest one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from davinci_jax.experiment import Batch as RampPiece
from davinci_jax.experiment import DataConfig, Experiment, LearningRate, ModelConfig, RunConfig, Source, Stage, to_json
from davinci_jax.experiment.load import load_any

CONFIG = pathlib.Path(__file__).parent / "corpora" / "curate.py"
KINDS = ("debian/html", "debian/man", "debian/pdf", "python")
PACKAGES = ("datatrove", "spacy", "resiliparse", "pypdf", "tiktoken", "tokenizers", "xxhash", "numpy")


def take_sample(corpora: pathlib.Path, folder: pathlib.Path, megabytes: float, seed: int) -> None:
    """Links files into a folder of the same layout, of every kind as large a share as it has of all files."""
    files = {kind: sorted(f for f in (corpora / kind).rglob("*") if f.is_file()) for kind in KINDS}
    size = {kind: sum(file.stat().st_size for file in found) for kind, found in files.items()}
    for kind, found in files.items():
        random.Random(seed).shuffle(found)
        left = megabytes * 1e6 * size[kind] / sum(size.values())
        for file in found:
            left -= file.stat().st_size
            if left < 0:
                break
            target = folder / file.relative_to(corpora)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)


def measured(command: Sequence[str]) -> dict[str, float]:
    """Runs a command; returns seconds of the clock, of the processors, and the memory of its largest process in MB.

    The processes of a pool are children of a server that forks them, so no wait of ours would count them: they are
    looked at as they run, and what one does in its last half second is lost.
    """
    started = time.perf_counter()
    process, seconds, peaks = subprocess.Popen(command), {}, {}
    while process.poll() is None:
        for pid in _family(process.pid):
            try:
                seconds[pid], peaks[pid] = _cpu_seconds(pid), _peak_mb(pid)
            except (OSError, StopIteration):  # it has just ended
                continue
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"curation_corpora: {' '.join(command)} ended with status {process.returncode}")
    return {
        "seconds": time.perf_counter() - started,
        "core_seconds": sum(seconds.values()),
        "peak_mb": max(peaks.values()),
    }


def _family(root: int) -> set[int]:
    """Returns a process and all that descend from it."""
    parents = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    family, size = {root}, 0
    while len(family) > size:
        size = len(family)
        family |= {pid for pid, parent in parents.items() if parent in family}
    return family


def _cpu_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_mb(pid: int) -> float:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def write_experiment(root: pathlib.Path, vocabulary: int) -> pathlib.Path:
    """Writes the config of an experiment that trains on the curated documents; returns its file."""
    sources = tuple(
        Source(
            name=source.name, domain=source.domain, level=source.level, tokens=1e8,
            documents=f"curated/{source.name}/current/documents",
        )
        for source in load_any(CONFIG).sources
    )  # fmt: skip
    mixture = {domain: 100 / len({s.domain for s in sources}) for domain in {s.domain for s in sources}}
    stage = Stage(
        name="1-1", tokens=1e6, batch=(RampPiece(size=8),), learning_rate=LearningRate(peak=1e-3), mixture=mixture
    )
    experiment = Experiment(
        run=RunConfig(name="corpora"),
        model=ModelConfig(
            vocab_size=vocabulary, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_size=32, mlp_size=64,
            max_positions=4096,
        ),
        data=DataConfig(root=str(root), sources=sources, sequence_length=4096, heldout=0.01),
        curriculum=(stage,),
    )  # fmt: skip
    file = root / "experiment.json"
    file.write_text(to_json(experiment))
    return file


def run(corpora: pathlib.Path, root: pathlib.Path, vocabulary: int) -> dict[str, Any]:
    """Curates and shards everything below a folder; returns what it took and the funnels."""
    root.mkdir(parents=True)
    paths = [f"root={root}"]
    for source in load_any(CONFIG).sources:
        for given in source.inputs:
            paths.append(
                f"sources.{source.name}.inputs.{given.label}.path={corpora / pathlib.Path(*_tail(given.path))}"
            )
    davinci = [sys.executable, "-m", "davinci_jax.cli"]
    result: dict[str, Any] = {"curate": measured([*davinci, "curate", str(CONFIG), *paths])}
    experiment = write_experiment(root, vocabulary)
    result["shard"] = measured([*davinci, "shard", str(experiment), "--new-tokenizer"])
    folders = {source.name: root / "curated" / source.name / "current" for source in load_any(CONFIG).sources}
    result["funnels"] = {name: json.loads((folder / "funnel.json").read_text()) for name, folder in folders.items()}
    result["shards"] = {name: json.loads((root / name / "manifest.json").read_text()) for name in folders}
    result["megabytes"] = sum(funnel["steps"][0]["bytes_out"] for funnel in result["funnels"].values()) / 1e6
    return result


def _tail(path: str) -> tuple[str, ...]:
    """The part of an input's path below the folder of the corpora."""
    parts = pathlib.Path(path).parts
    return parts[parts.index("corpora") + 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpora", type=pathlib.Path, required=True, help="what benchmarks/corpora.py has filled")
    parser.add_argument("--root", type=pathlib.Path, required=True, help="a new folder beside it, on the same disk")
    parser.add_argument("--sample", type=float, default=50.0, help="megabytes of files of the smaller run")
    parser.add_argument("--most", type=float, help="megabytes of files of the larger run; all if left out")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    given = parser.parse_args()
    corpora, root = given.corpora.absolute(), given.root.absolute()
    shutil.rmtree(root, ignore_errors=True)
    fetched = {file.parent.name: json.loads(file.read_text()) for file in sorted(corpora.glob("*/manifest.json"))}
    if given.most is not None:
        take_sample(corpora, root / "most-files", given.most, 7)
        corpora = root / "most-files"
    take_sample(corpora, root / "sample-files", given.sample, 0)
    runs = {
        "sample": run(root / "sample-files", root / "sample", given.vocabulary),
        "all": run(corpora, root / "all", given.vocabulary),
    }
    result = {
        "command": " ".join(["python", *sys.argv]).replace(str(pathlib.Path.cwd()) + "/", ""),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "fetched": fetched,
        "runs": runs,
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(tables(result))


def tables(result: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    machine, versions = result["machine"], ", ".join(f"{name} {v}" for name, v in result["packages"].items())
    lines = [
        "# Two corpora from raw files to token shards",
        "",
        f"`{result['command']}`",
        "",
        f"{machine['cores']} cores shared with other work, Python {machine['python']}; {versions}. "
        "Core-seconds are CPU time; the seconds of steps are of their processes' clocks, which other work slows down.",
        "",
        "| | sample | all |",
        "|---|---|---|",
    ]
    runs = result["runs"]
    for title, show in _FIGURES.items():
        lines.append(f"| {title} | {show(runs['sample'])} | {show(runs['all'])} |")
    for name, funnel in runs["all"]["funnels"].items():
        lines += ["", f"## `{name}`", "", *_funnel_table(funnel)]
    return "\n".join(lines) + "\n"


def _core_seconds(run: dict[str, Any]) -> float:
    return run["curate"]["core_seconds"] + run["shard"]["core_seconds"]


_FIGURES = {
    "raw documents, MB": lambda run: f"{run['megabytes']:,.0f}",
    "`davinci curate`, core-seconds": lambda run: f"{run['curate']['core_seconds']:,.0f}",
    "`davinci shard --new-tokenizer`, core-seconds": lambda run: f"{run['shard']['core_seconds']:,.0f}",
    "MB of raw documents per core-second, the whole path": lambda run: f"{run['megabytes'] / _core_seconds(run):.2f}",
    "largest process of `davinci curate`, MB": lambda run: f"{run['curate']['peak_mb']:,.0f}",
    "largest process of `davinci shard`, MB": lambda run: f"{run['shard']['peak_mb']:,.0f}",
    "tokens in shards": lambda run: f"{sum(_tokens(manifest) for manifest in run['shards'].values()):,}",
}


def _tokens(manifest: dict[str, Any]) -> int:
    return sum(split["tokens"] for split in manifest["splits"].values())


def _funnel_table(funnel: dict[str, Any]) -> list[str]:
    rows = ["| step | documents in | out | MB in | out | seconds | MB/s |", "|---|---|---|---|---|---|---|"]
    for step in funnel["steps"]:
        megabytes = step["bytes_in"] / 1e6
        rate = f"{megabytes / step['seconds']:.1f}" if step["seconds"] > 0.1 else ""
        rows.append(
            f"| {step['operation']} | {step['documents_in']:,} | {step['documents_out']:,} | {megabytes:,.1f} | "
            f"{step['bytes_out'] / 1e6:,.1f} | {step['seconds']:,.1f} | {rate} |"
        )
    return rows


if __name__ == "__main__":
    main()
