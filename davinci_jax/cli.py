"""The `davinci` command: one thin function a verb, which says what it does and where its results lie."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from davinci_jax.errors import ConfigError, UserError, nearest
from davinci_jax.experiment import CurationConfig, Experiment, apply_overrides, load_any, load_config

if TYPE_CHECKING:
    from rich.console import Console

# Modules that load JAX are imported by the verbs that need them, so that `davinci --help` answers at once.

_PIPE_WIDTH = 140  # of tables that go to a file or another program, where no window sets one


def plan(args: argparse.Namespace) -> None:
    """Print what a run would do; changes nothing."""
    from davinci_jax.training.plan import make_plan
    from davinci_jax.training.plan_view import show_plan

    if args.devices is not None and args.devices < 1:
        raise ConfigError("--devices", args.devices, "is no number of devices", "give 1 or more")
    result = make_plan(_experiment(args), num_devices=args.devices)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        with _tables() as console:
            show_plan(result, console)


def curate(args: argparse.Namespace) -> None:
    """Bring sources through their recipes: documents, what was dropped and why, cards, a report."""
    from davinci_jax.curation.run import curate as run
    from davinci_jax.curation.run import show_plan

    config = _curation(args)
    if config is None:
        print("curate: no source of this config has a recipe; the user's own documents are left as they are")
    elif args.plan:
        show_plan(config)
    else:
        try:
            run(config)
        except KeyboardInterrupt:
            print("curate: stopped; the same command goes on from here")
            raise


def cards(args: argparse.Namespace) -> None:
    """Print the sources of a config with domain, tokens, level and stages, as the report's table 2."""
    from davinci_jax.curation.cards import print_cards

    with _tables() as console:
        print_cards(_any(args), as_json=args.json, console=console)


def shard(args: argparse.Namespace) -> None:
    """Turn documents into token shards."""
    from davinci_jax.data.shard_sources import shard_sources

    shard_sources(_experiment(args), only=args.source, verify=args.verify, new_tokenizer=args.new_tokenizer)


def train(args: argparse.Namespace) -> None:
    """Start a run, or continue it where it stopped."""
    from davinci_jax.training.distributed import initialize
    from davinci_jax.training.loop import train as run

    initialize()
    run(_experiment(args))


def evaluate(args: argparse.Namespace) -> None:
    """Held-out loss and bits per byte per domain of a checkpoint."""
    from davinci_jax.training.offline import evaluate_run

    result, file = evaluate_run(_experiment(args), args.step)
    for name, value in result.items():
        print(f"{name:32s} {value:.4f}" if isinstance(value, float) else f"{name:32s} {value}")
    print(f"written to {file}")


def generate(args: argparse.Namespace) -> None:
    """Continue prompts with a checkpoint."""
    from davinci_jax.inference.run import generate_run

    generate_run(
        _experiment(args),
        args.prompt,
        step=args.step,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        save=args.save,
    )


def serve(args: argparse.Namespace) -> None:
    """Serve a checkpoint to OpenAI-compatible clients, until it is interrupted."""
    from davinci_jax.inference.server import serve_run

    serve_run(_experiment(args), step=args.step, host=args.host, port=args.port, batch=args.batch)


def trace(args: argparse.Namespace) -> None:
    """Show which documents a step of a run saw, or the way of one token back to the file that it came from."""
    from davinci_jax.training.trace import print_token, print_trace

    if args.sequence is None:
        print_trace(_experiment(args), args.step, as_json=args.json)
    else:
        print_token(_experiment(args), args.step, args.sequence, args.column, as_json=args.json)


def to_hf(args: argparse.Namespace) -> None:
    """Write a checkpoint as a folder that transformers loads."""
    from davinci_jax.training.offline import export_run

    export_run(_experiment(args), pathlib.Path(args.folder), args.step, args.dtype)
    print(f"written to {args.folder}")


def from_hf(args: argparse.Namespace) -> None:
    """Begin the run of a config from the weights of a Hugging Face folder."""
    from davinci_jax.training.offline import import_run

    print(f"the weights are step 0 of {import_run(_experiment(args), pathlib.Path(args.folder))}")


def report(args: argparse.Namespace) -> None:
    """Write report.html into the run directory."""
    from davinci_jax.science.report import write_report

    print(f"written to {write_report(_experiment(args).run.path)}")


@contextlib.contextmanager
def _tables() -> Iterator[Console]:
    """A console for tables; in a file or another program lines end where their text does."""
    from rich.console import Console

    if sys.stdout.isatty():
        yield Console()
        return
    console = Console(width=None if "COLUMNS" in os.environ else _PIPE_WIDTH)
    with console.capture() as lines:
        yield console
    for line in lines.get().splitlines():
        print(line.rstrip())


def _any(args: argparse.Namespace) -> Experiment | CurationConfig:
    config = load_any(args.config)
    return _experiment(args) if isinstance(config, Experiment) else apply_overrides(config, args.overrides)


def _curation(args: argparse.Namespace) -> CurationConfig | None:
    """Returns what a config curates, `None` for an experiment whose documents are all the user's own."""
    from davinci_jax.curation.recipes import builtin_sources

    config = _any(args)
    return builtin_sources(config) if isinstance(config, Experiment) else config


def _experiment(args: argparse.Namespace) -> Experiment:
    experiment = load_config(args.config)
    directory = _run_directory(pathlib.Path(args.config))
    if directory is not None:
        # It may have been moved since it was written.
        experiment = dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, directory=str(directory)))
    return apply_overrides(experiment, args.overrides)


def _run_directory(config: pathlib.Path) -> pathlib.Path | None:
    """Returns the run directory that a config names, itself or by the experiment.json in it; `None` for another."""
    if config.is_dir():
        return config
    left_by_a_run = ("curriculum.jsonl", "metrics.jsonl", "checkpoints")
    is_of_a_run = config.name == "experiment.json" and any((config.parent / name).exists() for name in left_by_a_run)
    return config.parent if is_of_a_run else None


class _Parser(argparse.ArgumentParser):
    """Offers the nearest name for a mistyped one."""

    def error(self, message: str) -> NoReturn:
        match = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if match:
            known = re.findall(r"[^\s,']+", match[2])
            message = f"{match[1]!r} is unknown; {nearest(match[1], known)}"
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="davinci", description="Open pretraining in JAX, from documents to a scored checkpoint.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _verb(verbs, plan).add_argument("--json", action="store_true", help="print JSON")
    verbs.choices["plan"].add_argument(
        "--devices", type=int, metavar="N", help="devices to plan for (default: those the mesh names, else 1)"
    )
    _verb(verbs, curate).add_argument("--plan", action="store_true", help="show what would be done; changes nothing")
    _verb(verbs, cards).add_argument("--json", action="store_true", help="print JSON")
    _verb(verbs, shard).add_argument(
        "--source", action="append", metavar="NAME", help="only this source; may be repeated"
    )
    verbs.choices["shard"].add_argument(
        "--verify", action="store_true", help="check the checksums of shard sets that are there"
    )
    verbs.choices["shard"].add_argument(
        "--new-tokenizer", action="store_true", help="train data.tokenizer on the documents, unless it is there"
    )
    _verb(verbs, train)
    _step(_verb(verbs, evaluate))
    _generate_options(_step(_verb(verbs, generate)))
    server = _step(_verb(verbs, serve))
    server.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="where to listen (default: this machine alone)"
    )
    server.add_argument("--port", type=int, default=8000, metavar="P", help="0 takes a free one (default: 8000)")
    server.add_argument(
        "--batch", type=int, default=8, metavar="N", help="the most requests computed together, a power of 2"
    )
    one = _verb(verbs, trace)
    one.add_argument("--step", type=int, required=True, metavar="N", help="the step, 1 is the first")
    one.add_argument("--sequence", type=int, metavar="S", help="a sequence of the step: follow one token of it")
    one.add_argument("--column", type=int, default=0, metavar="C", help="which token of the sequence (default: 0)")
    one.add_argument("--json", action="store_true", help="print JSON, one document a line")
    _verb(verbs, report)
    convert = verbs.add_parser("convert", help="To and from Hugging Face folders.").add_subparsers(
        dest="way", required=True, metavar="WAY"
    )
    out = _step(_verb(convert, to_hf, folder="after"))
    out.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the weights written"
    )
    _verb(convert, from_hf, folder="before")
    return parser


def _verb(verbs, function: Callable, folder: str | None = None) -> argparse.ArgumentParser:
    """Adds a verb with the arguments that all have; a conversion's folder stands where its direction puts it."""
    parser = verbs.add_parser(function.__name__.replace("_", "-"), help=function.__doc__, description=function.__doc__)
    arguments = {"config": ("CONFIG", "a recipe (.py), a resolved experiment (.json) or a run directory")}
    if folder == "before":
        arguments = {"folder": ("FOLDER", "the Hugging Face folder to read"), **arguments}
    elif folder == "after":
        arguments["folder"] = ("FOLDER", "the Hugging Face folder to write")
    for name, (metavar, text) in arguments.items():
        parser.add_argument(name, metavar=metavar, help=text)
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.field=value", help="fields to change")
    parser.set_defaults(function=function)
    return parser


def _step(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint (default: the newest whole one)")
    return parser


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated (default: beginnings of held-out documents)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save", action="store_true", help="also write samples.json into the run directory, for the report"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; overrides may stand before, between or after options, with or without dashes."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    for text in rest:
        if "=" not in text:
            parser.error(f"unknown argument {text!r}; see `davinci {args.verb} --help`")
    args.overrides = [*args.overrides, *rest]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, or 2 with one line on standard error for what the user can mend."""
    args = _parse(arguments)
    try:
        args.function(args)
        sys.stdout.flush()  # here, where a reader that has gone is dealt with
    except UserError as error:
        print(f"davinci: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone; standard output cannot be flushed any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG):
            raise
        print(
            f"davinci: {error.filename or 'disk'}: {error.strerror}; free the disk or mend permissions",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
