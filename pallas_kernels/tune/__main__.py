"""python -m pallas_kernels.tune OPERATION [--device FAMILY] [--shape NAME] [--write [--force]] [--jobs N]"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

from pallas_kernels import target
from pallas_kernels.compiler import static_cycles
from pallas_kernels.errors import ArgumentError
from pallas_kernels.tune import costs, entries, operations


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.jobs < 1:
            raise ArgumentError("tune", "--jobs", f"is {options.jobs}", "give at least 1")
        module = operations.find(options.operation)
        family = _family(options.device, operations.families(module))
        shapes = module.shapes()
        if options.shape:
            operations.check("tune", "--shape", options.shape, shapes)
            shapes = {options.shape: shapes[options.shape]}
        failed = [name for name, shape in shapes.items() if not tune(module, family, name, shape, options)]
    except ArgumentError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if failed else 0


def tune(module: Any, family: str, name: str, shape: Any, options: argparse.Namespace) -> bool:
    """Compares the candidates of one shape, prints them, and writes the best if asked; False if none compiles."""
    configs = module.candidates(family, shape)
    measured = target.current().family == family
    if not measured:
        costs.check_static(family)
    source = "time on this device" if measured else "static cycles of the compiler's schedule (no such device here)"
    print(f"\n{module.OPERATION} {name} on {family}, {len(configs)} candidates, by {source}", flush=True)
    if measured:
        found = costs.measured_costs(module, family, shape, configs)
    else:
        found = list(costs.static_costs(module, family, shape, configs, options.jobs))
    ranked = sorted(zip(configs, found, strict=True), key=lambda pair: pair[1].value)
    for config, cost in ranked:
        print("  " + line(family, config, cost), flush=True)
    if not ranked or not math.isfinite(ranked[0][1].value):
        print("  no candidate compiles", file=sys.stderr)
        return False
    _record(module, family, shape, ranked[0], options)
    return True


def line(family: str, config: Any, cost: costs.Cost) -> str:
    """A candidate and its cost."""
    fields = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())
    if cost.failure:
        return f"{'fails':>14}  {fields}  {cost.failure}"
    spills = "" if cost.spills is None else f"  {cost.spills} spills"
    if cost.unit == "us":
        return f"{cost.value:>11.1f} us  {fields}{spills}"
    estimate = cost.value / static_cycles.CHIPS[family].clock * 1e3
    return f"{cost.value:>9.0f} cycles (~{estimate:.3f} ms)  {fields}{spills}"


def _record(module: Any, family: str, shape: Any, best: tuple[Any, costs.Cost], options: argparse.Namespace) -> None:
    key, new = module.shape_class(shape), entries.entry(*best)
    if not options.write:
        print(f"  best for {family} {key}: {new['config']} ({new['source']}); --write puts it into the table")
    elif entries.write(module.OPERATION, family, key, new, force=options.force):
        print(f"  written for {family} {key}: {new['config']} ({new['source']})")
    else:
        print(f"  kept for {family} {key}: its entry was measured; --force replaces it with a static one")


def _family(asked: str | None, families: Sequence[str]) -> str:
    if asked is not None:
        operations.check("tune", "--device", asked, families)
        return asked
    here = target.current().family
    if here in families:
        return here
    static = [family for family in families if family in static_cycles.CHIPS]
    if not static:
        costs.check_static(families[0])
    raise ArgumentError("tune", "--device", "is needed: no such device is here", f"choose one of {', '.join(static)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.add_argument("operation", help="the name of a table, for example attention_tpu")
    parser.add_argument("--device", help="a family: v5e, v5p, v6e, tpu7x, hopper; the one that is here if left out")
    parser.add_argument("--shape", help="one of the operation's shapes; all if left out")
    parser.add_argument("--write", action="store_true", help="put the best into the table")
    parser.add_argument("--force", action="store_true", help="also write static entries over measured ones")
    parser.add_argument("--jobs", type=int, default=1, help="candidates compiled at a time (static cycles)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
