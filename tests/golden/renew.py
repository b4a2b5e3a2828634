"""Writes the resolved JSON of the shipped configs anew, after a change that is meant.

Usage: python tests/golden/renew.py [config name ...]    (default: all of configs/)
"""

import pathlib
import sys

from davinci_jax.experiment import load_any, to_json

GOLDEN = pathlib.Path(__file__).parent
CONFIGS = GOLDEN.parents[1] / "configs"


def main(names: list[str]) -> None:
    for name in names or sorted(file.stem for file in CONFIGS.glob("*.py")):
        file = GOLDEN / f"{name}.json"
        file.write_text(to_json(load_any(CONFIGS / f"{name}.py")))
        print(f"wrote {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
