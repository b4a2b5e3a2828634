"""The same bytes from any executor and any number of workers."""

import os
import pathlib
import sys

import pytest
from curated_corpus import content, run, write_config, write_corpus

from davinci_jax.errors import DataError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def reference(raw, tmp_path_factory):
    result = run(write_config(tmp_path_factory.mktemp("one"), raw, "one"))
    rows = {step["operation"]: step["rejected"] for step in result.funnel["steps"]}
    assert rows["drop-short"] > 50
    assert rows["near-duplicates"] > 50
    assert len(list((result.folder / "documents").iterdir())) > 4
    return content(result.folder)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_nothing(raw, tmp_path, reference, workers):
    assert content(run(write_config(tmp_path, raw, "many", f"workers={workers}")).folder) == reference


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read() if os.path.isfile(sys.argv[-1]) else sys.stdin.read()
if "merge_stats" not in script:
    first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", script).groups())
    for task in range(first, last + 1):
        environment = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here"}}
        subprocess.run(["bash", "-c", script], env=environment, check=True)
print("Submitted batch job 7")
"""


def test_slurm_is_handed_the_same_steps(raw, tmp_path, monkeypatch):
    """`sbatch`, `srun` and `scontrol` are stand-ins that run a job at once, one task after the other."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (tools / "srun").write_text('#!/bin/sh\nwhile [ "${1#-}" != "$1" ] || [ "$1" = 1 ]; do shift; done\nexec "$@"\n')
    (tools / "scontrol").write_text("#!/bin/sh\necho here\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    size = 1_000_000  # two tasks, each a process of its own
    made = run(write_config(tmp_path, raw, "slurm", "executor='slurm', slurm=Slurm(partition='p')", size))
    assert content(made.folder) == content(run(write_config(tmp_path, raw, "local", "workers=1", size)).folder)


def test_a_task_that_fails_in_another_process_is_told(raw, tmp_path):
    file = write_config(tmp_path, raw, "broken", "workers=2")
    text = file.read_text().replace('Step("near-duplicates")', 'Step("decontaminate", benchmarks=("nothing",))')
    file.write_text(text)
    with pytest.raises(DataError, match="nothing"):
        run(file)
