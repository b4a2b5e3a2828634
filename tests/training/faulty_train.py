"""`davinci train` with a fault built in, to test what a kill leaves: faulty_train.py FAULT STEP CONFIG [OVERRIDES].

seal     SIGKILL between the commit of STEP's checkpoint and its seal
remove   SIGKILL when one file of STEP's checkpoint has been removed to make room
slow     a pause after every step, so that a signal from outside finds the run at work
"""

import os
import pathlib
import signal
import sys
import time

from davinci_jax.cli import main
from davinci_jax.training import checkpoint, loop


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: str, fault, otherwise):
    """Returns a function of a folder that is `fault` in the folder of one step."""
    return lambda folder, *rest: (fault if folder.name.split(".")[0] == step else otherwise)(folder, *rest)


def remove_one_file(folder: pathlib.Path) -> None:
    next(path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("seal")).unlink()
    die()


fault, step, *arguments = sys.argv[1:]
if fault == "seal":
    checkpoint.write_seal = at_step(step, die, checkpoint.write_seal)
elif fault == "remove":
    checkpoint.shutil.rmtree = at_step(step, remove_one_file, checkpoint.shutil.rmtree)
elif fault == "slow":
    after = loop._Run._after
    loop._Run._after = lambda *args: (time.sleep(0.2), after(*args))
sys.exit(main(["train", *arguments]))
