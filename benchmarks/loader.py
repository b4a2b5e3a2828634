"""The loader: tokens/s read and mixed in one process, start-up with 10,000 shards, look-ups of the mixture index.

Four synthetic sources of Zipf-distributed tokens (60,000 ids, uint16) and log-normal document lengths are mixed into
rows of 4096 tokens. Rounds take turns, so that other load on the machine falls on all alike:

- `loader`: `TrainLoader`, steps of whole batches: mixture look-up, reading, labels, segments and positions.
- `one_thread`: the same work without Grain's threads.
- `best_fit`: `loader` with best-fit packing, where a row's documents lie in several blocks.
- `workers`: `loader` with two worker processes, their start left out.
- `grain`: a plain pipeline over one source: ArrayRecord source -> shuffle -> map (decode, tokens and labels) -> batch,
  with Grain's default threads; no mixture, segments or positions.

  python benchmarks/loader.py --output benchmarks/results/loader.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import grain.python as grain
import numpy as np

from davinci_jax.curriculum.timeline import Timeline
from davinci_jax.data import blocks
from davinci_jax.data.best_fit import BestFitRows
from davinci_jax.data.loader import TrainLoader
from davinci_jax.data.manifest import Manifest, TokenizerEntry
from davinci_jax.data.mixture import MixtureIndex
from davinci_jax.data.rows import ConcatRows
from davinci_jax.data.shard_writer import BLOCK_TOKENS, SplitWriter
from davinci_jax.data.shards import ShardSet
from davinci_jax.experiment import Batch, LearningRate, Stage

LENGTH = 4096
SHARES = (0.5, 0.2, 0.2, 0.1)
IDS = 60_000
PACKAGES = ("numpy", "grain", "array_record", "jax")
# Sequences of the report's 8 T tokens at 4096 a row, over the 28 sources of its pool.
ALL_SEQUENCES, ALL_SOURCES = 1_953_125_000, 28


def write_source(folder: pathlib.Path, tokens: int, seed: int, **options: int) -> None:
    """Writes a shard set of synthetic documents with about `tokens` tokens."""
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(1 / np.arange(1, IDS + 1))
    folder.mkdir(parents=True)
    writers = {split: SplitWriter(folder, split, "uint16", **options) for split in ("train", "heldout")}
    count = 0
    while writers["train"].num_tokens < tokens:
        length = int(min(rng.lognormal(6.4, 0.9) + 16, 30_000, tokens - writers["train"].num_tokens))
        ids = np.searchsorted(cumulative, rng.random(length) * cumulative[-1])
        writers["train"].add(ids, np.zeros((0, 2)), {"id": str(count), "level": "L2", "lineage": []})
        count += 1
    splits = {split: writer.close() for split, writer in writers.items()}
    tokenizer = TokenizerEntry("synthetic", IDS + 1, IDS)
    Manifest("synthetic", "Code", "L2", tokenizer, "uint16", BLOCK_TOKENS, 0.0, (), (), {}, splits).write(folder)


def make_loader(
    folders: list[pathlib.Path], kind: type, steps: int, batch: int, micro: int, workers: int
) -> TrainLoader:
    """Returns a loader of `steps` batches over all sources."""
    rows = [kind(ShardSet(folder), LENGTH, n) for n, folder in enumerate(folders)]
    stage = Stage(
        name="all", tokens=steps * batch * LENGTH, batch=(Batch(size=batch),),
        learning_rate=LearningRate(peak=1.0), mixture={"Code": 1},
    )  # fmt: skip
    index = MixtureIndex([(steps * batch, SHARES)], [reader.num_rows for reader in rows], seed=0)
    timeline = Timeline.compile((stage,), LENGTH)
    return TrainLoader(rows, index, timeline, micro, np.arange(micro), workers)


def time_steps(loader: TrainLoader) -> tuple[int, float, float]:
    """Reads all steps but the first few; returns tokens, seconds and CPU seconds of this process."""
    steps = loader.steps(0)
    warm = 1 + 4 * loader.workers  # until all workers have started
    for _ in range(warm):
        next(steps)
    tokens, cpu, started = 0, time.process_time(), time.perf_counter()
    for _ in range(warm, loader.num_steps):
        tokens += next(steps)[1].tokens.size
    result = tokens, time.perf_counter() - started, time.process_time() - cpu
    loader.close()
    return result


def time_one_thread(loader: TrainLoader) -> tuple[int, float, float]:
    """Reads all steps but the first, one after the other in this thread."""
    source = loader.source()
    source.read(0)
    cpu, started = time.process_time(), time.perf_counter()
    tokens = sum(source.read(step).tokens.size for step in range(1, len(source)))
    return tokens, time.perf_counter() - started, time.process_time() - cpu


def time_grain(folder: pathlib.Path, steps: int, batch: int) -> tuple[int, float, float]:
    """Reads as many rows through a plain Grain pipeline over one source."""

    def row(record: bytes) -> dict[str, np.ndarray]:
        tokens = blocks.decode(record).tokens.astype(np.int32)
        return {"tokens": tokens[:-1], "labels": tokens[1:]}

    source = grain.ArrayRecordDataSource(sorted(str(file) for file in folder.glob("train-0*.array_record")))
    dataset = grain.MapDataset.source(source).shuffle(0).repeat().map(row).batch(batch)
    iterator = iter(dataset.to_iter_dataset())
    next(iterator)
    tokens, cpu, started = 0, time.process_time(), time.perf_counter()
    for _ in range(steps - 1):
        tokens += next(iterator)["tokens"].size
    result = tokens, time.perf_counter() - started, time.process_time() - cpu
    iterator.close()
    return result


def throughput(args: argparse.Namespace, root: pathlib.Path) -> dict[str, Any]:
    """Measures all ways of reading in turns."""
    folders = [root / f"source{n}" for n in range(len(SHARES))]
    for n, folder in enumerate(folders):
        write_source(folder, args.tokens // len(SHARES) // BLOCK_TOKENS * BLOCK_TOKENS, n)
    fill = [BestFitRows(ShardSet(folder), LENGTH).fill for folder in folders]  # makes the plans, too
    size = args.steps, args.batch, args.micro
    ways: dict[str, Callable[[], tuple[int, float, float]]] = {
        "loader": lambda: time_steps(make_loader(folders, ConcatRows, *size, workers=0)),
        "grain": lambda: time_grain(folders[0], args.steps, args.batch),
        "one_thread": lambda: time_one_thread(make_loader(folders, ConcatRows, *size, workers=0)),
        "best_fit": lambda: time_steps(make_loader(folders, BestFitRows, *size, workers=0)),
        "workers": lambda: time_steps(make_loader(folders, ConcatRows, *size, workers=2)),
    }
    rounds: dict[str, list[tuple[int, float, float]]] = {name: [] for name in ways}
    for number in range(args.rounds):
        for name, measure in ways.items():
            rounds[name].append(measure())
            tokens, seconds, _ = rounds[name][-1]
            print(f"round {number + 1}: {name:10s} {tokens / seconds / 1e6:6.1f} M tokens/s", flush=True)
    result: dict[str, Any] = {
        name: {
            "tokens_per_second": statistics.median(tokens / seconds for tokens, seconds, _ in measured),
            "rounds": [tokens / seconds for tokens, seconds, _ in measured],
        }
        for name, measured in rounds.items()
    }
    for name in ("loader", "grain", "one_thread", "best_fit"):
        per_cpu = statistics.median(tokens / cpu for tokens, _, cpu in rounds[name])
        result[name]["tokens_per_cpu_second"] = per_cpu
    ratios = [a / b for a, b in zip(result["loader"]["rounds"], result["grain"]["rounds"], strict=True)]
    files = [entry for folder in folders for entry in ShardSet(folder).entry.shards]
    return result | {
        "loader_over_grain": statistics.median(ratios),
        "best_fit_fill": statistics.mean(fill),
        "bytes_per_token_on_disk": sum(entry.bytes for entry in files) / sum(entry.tokens for entry in files),
    }


def start_up(args: argparse.Namespace, root: pathlib.Path) -> dict[str, Any]:
    """Measures start-up on a set of many shards in a process of its own."""
    folder = root / "many"
    print(f"writing {args.shards} shards", flush=True)
    with mock.patch("os.fsync"):
        write_source(folder, args.shards * BLOCK_TOKENS, 0, shard_bytes=1)
    command = [sys.executable, __file__, "--open", str(folder)]
    runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(args.rounds)]
    print(f"start-up: {runs}", flush=True)
    return {"shards": args.shards} | {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def open_many(folder: pathlib.Path) -> dict[str, float]:
    """Opens a shard set as a run does; prints nothing, so that its output is the result."""
    started = time.perf_counter()
    rows = ConcatRows(ShardSet(folder), LENGTH)
    opened = time.perf_counter() - started
    rows.read(np.random.default_rng(0).permutation(rows.num_rows)[:256])
    return {"seconds_to_open": opened, "seconds_to_256_rows": time.perf_counter() - started}


def look_ups(args: argparse.Namespace) -> dict[str, float]:
    """Measures random look-ups in a mixture of the report's size."""
    rng = np.random.default_rng(0)
    shares = rng.random(ALL_SOURCES)
    stages = [(ALL_SEQUENCES // 4, tuple(shares)), (ALL_SEQUENCES - ALL_SEQUENCES // 4, tuple(shares[::-1]))]
    index = MixtureIndex(stages, rng.integers(10**6, 10**9, ALL_SOURCES).tolist(), seed=0)
    indices = rng.integers(0, ALL_SEQUENCES, args.look_ups)
    seconds = []
    for _ in range(args.rounds):
        started = time.perf_counter()
        for part in np.array_split(indices, args.look_ups // 1000):
            index.lookup(part)
        seconds.append(time.perf_counter() - started)
    print(f"look-ups: {seconds}", flush=True)
    return {"look_ups": args.look_ups, "per_call": 1000, "seconds": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128_000_000, help="of all sources")
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--batch", type=int, default=128, help="rows of a step")
    parser.add_argument("--micro", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--shards", type=int, default=10_000, help="of the start-up measurement; 128 KiB each")
    parser.add_argument("--look-ups", type=int, default=1_000_000)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--open", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(open_many(args.open)))
        return
    root = pathlib.Path(tempfile.mkdtemp(prefix="loader-benchmark-"))
    try:
        result = {"throughput": throughput(args, root), "start_up": start_up(args, root), "mixture": look_ups(args)}
    finally:
        shutil.rmtree(root)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in PACKAGES}},
        "load_average": os.getloadavg(),
        "row_tokens": LENGTH,
        **result,
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
