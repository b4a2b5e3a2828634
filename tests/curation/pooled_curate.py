"""`davinci curate CONFIG` that runs a pool of processes for as little as there is to read in tests."""

import sys

from davinci_jax.cli import main
from davinci_jax.curation import executors

if __name__ == "__main__":
    executors._WORKER_BYTES = 1
    sys.exit(main(["curate", sys.argv[1]]))
