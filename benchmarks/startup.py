"""From the command to the first step, from resume to the first step, and peak host memory of every quickstart verb.

  python benchmarks/startup.py --output benchmarks/results/startup.json            five starts, about a minute
  python benchmarks/startup.py --whole --output benchmarks/results/quickstart.json all verbs to the end, minutes

The clock starts before the process is made and stops at the time that the run wrote into its own metrics. Memory is
the largest resident set of a verb's process. Times are of one run each: other load on the machine is in them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

DAVINCI = pathlib.Path(sys.executable).with_name("davinci")
PREPARE = {"curate": (), "shard": ("--new-tokenizer",)}


def run(verb: str, *arguments: str) -> dict[str, Any]:
    """Runs a verb to its end; returns seconds and peak memory."""
    print(f"davinci {verb} {' '.join(arguments)}", flush=True)
    started = time.time()
    return finish(subprocess.Popen([DAVINCI, verb, *arguments]), started)


def finish(process: subprocess.Popen, started: float) -> dict[str, Any]:
    """Waits for a process; returns seconds and peak memory, or ends the benchmark if it failed."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, process.args))} ended with {process.returncode}")
    # Linux counts kibibytes.
    return {"seconds": time.time() - started, "peak_memory_bytes": usage.ru_maxrss * 1024}


def first_step(config: str, directory: pathlib.Path, overrides: list[str]) -> dict[str, Any]:
    """Starts or continues a run, stops it after its next step; returns seconds from the command to what it wrote."""
    file = directory / "metrics.jsonl"
    lines_before = len(read_lines(file))
    started = time.time()
    process = subprocess.Popen([DAVINCI, "train", config, f"run.directory={directory}", *overrides])
    while not any(line["kind"] == "train" for line in read_lines(file)[lines_before:]):
        if process.poll() is not None:
            sys.exit(f"davinci train ended with {process.returncode} before its first step")
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    result = finish(process, started)
    new = read_lines(file)[lines_before:]
    events = {line["event"]: line["time"] - started for line in new if line["kind"] == "event"}
    step = next(line for line in new if line["kind"] == "train")
    return {
        "opened_seconds": events.get("resume", events.get("start")),
        "compiled_seconds": events.get("compiled"),
        "first_step_seconds": step["time"] - started,
        "first_step": step["step"],
        "peak_memory_bytes": result["peak_memory_bytes"],
    }


def read_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a JSON lines file that may be written at this moment."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def measure(config: str, folder: pathlib.Path, overrides: list[str], whole: bool) -> dict[str, Any]:
    """Returns the measurements by name."""
    # Without it nothing compiled is kept, as for a user who has not asked for it.
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    overrides = [f"data.root={folder / 'data'}", *overrides]
    result: dict[str, Any] = {verb: run(verb, config, *options, *overrides) for verb, options in PREPARE.items()}
    if whole:
        directory = folder / "run"
        result["train"] = run("train", config, f"run.directory={directory}", *overrides)
        result["generate"] = run("generate", str(directory), "--save")
        result["report"] = run("report", str(directory))
        return result
    overrides = ["run.log_every_steps=1", *overrides]
    result["start"] = first_step(config, folder / "run", overrides)
    result["resume"] = first_step(config, folder / "run", overrides)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    first_step(config, folder / "another", overrides)
    result["resume_with_compiled_programs_kept"] = first_step(config, folder / "another", overrides)
    result["start_with_compiled_programs_kept"] = first_step(config, folder / "a-third", overrides)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.py")
    parser.add_argument("--whole", action="store_true", help="run every verb of the quickstart to its end")
    parser.add_argument("--override", action="append", default=[], metavar="section.field=value")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args.config, pathlib.Path(folder), args.override, args.whole)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "measured": measured,
        "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in measured.values()),
        "commit": commit(),
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "load_before": load},
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain")
            },
        },
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def commit() -> str:
    """Returns the commit of the working tree, with "+" where something has changed since."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def cpu() -> str:
    """Returns the name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
