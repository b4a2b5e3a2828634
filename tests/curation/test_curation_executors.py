"""The same bytes from any executor and any number of workers."""

import dataclasses
import io
import os
import pathlib
import sys

import pytest
from curated_corpus import content, run, write_config, write_corpus
from rich.console import Console

from davinci_jax.curation import executors
from davinci_jax.curation.run import curate
from davinci_jax.errors import DataError
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Slurm, Step

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


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_the_number_of_workers_changes_nothing(raw, tmp_path, reference, workers, monkeypatch):
    monkeypatch.setattr(executors, "_WORKER_BYTES", 1)  # as much as there is to read here would get one
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


@pytest.mark.exhaustive
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


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster that takes jobs and never runs them: its folder holds `jobs` and what `squeue` says, `queue`."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    sbatch = f'grep -q merge_stats "$(eval echo \\${{$#}})" || echo job >> {folder}/jobs\necho Submitted batch job 7\n'
    squeue = f'test "$3" = 7 && cat {folder}/queue && exit 0\ncat {folder}/trouble >&2; exit 1\n'
    for name, script in {"sbatch": sbatch, "squeue": squeue}.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def cluster_config(tmp_path, *recipe):
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in/a.txt").write_text("text")
    papers = CuratedSource(
        name="papers", domain="D", level="L1", inputs=(Input(kind="folder", path=str(tmp_path / "in")),),
        recipe=(Step("decode-utf8"), *recipe),
    )  # fmt: skip
    given = Input(kind="documents", path=str(tmp_path / "root/curated/papers/current/documents"))
    shorter = CuratedSource(name="shorter", domain="D", level="L2", inputs=(given,), recipe=())
    return CurationConfig(
        root=str(tmp_path / "root"), sources=(papers, shorter), executor="slurm", slurm=Slurm(partition="p")
    )


def told(config):
    curate(config, Console(file=(out := io.StringIO()), width=1000))
    return out.getvalue()


def test_a_source_waits_for_the_one_that_slurm_is_at_work_on(tmp_path, slurm):
    config = cluster_config(tmp_path)
    said = told(config)
    assert "papers: handed to Slurm, last job 7" in said
    assert "shorter: waits for papers" in said
    assert (slurm / "jobs").read_text().split() == ["job"]


def test_what_an_earlier_recipe_left_is_not_read_while_the_next_is_at_work(tmp_path, slurm):
    local = dataclasses.replace(cluster_config(tmp_path), executor="local", workers=1)
    assert len(curate(local, Console(quiet=True))) == 2
    assert "shorter: waits for papers" in told(cluster_config(tmp_path, Step("drop-short", characters=1)))


def test_a_second_start_leaves_the_jobs_of_the_first_alone(tmp_path, slurm):
    config = cluster_config(tmp_path, Step("near-duplicates"))
    told(config)
    submitted = (slurm / "jobs").read_text()
    assert submitted.split() == ["job"] * 4  # of a stage, and of the three passes of the next
    stage = next((tmp_path / "root/curated/papers").glob("*/plan.jsonl")).parent
    at_work = stage / "temporary" / "000000.node.1"
    at_work.mkdir(parents=True)
    (slurm / "queue").write_text("7_0 p davinci R\n")
    said = told(config)
    assert "papers: Slurm has not ended job 7; start" in said
    assert "shorter: waits for papers" in said
    assert at_work.is_dir()
    assert (slurm / "jobs").read_text() == submitted
    # A job that was cancelled or failed has left the queue: its tasks go out again.
    (slurm / "queue").write_text("")
    assert "handed to Slurm" in told(config)
    assert not at_work.exists()
    assert (slurm / "jobs").read_text().split() == ["job"] * 8


@pytest.mark.parametrize(("trouble", "ended"), [("Invalid job id specified", True), ("Unable to contact", False)])
def test_what_squeue_cannot_tell(tmp_path, slurm, trouble, ended):
    config = cluster_config(tmp_path)
    told(config)
    for file in (tmp_path / "root").rglob("slurm_job.txt"):
        file.write_text("8")
    (slurm / "trouble").write_text(f"slurm_load_jobs error: {trouble}\n")
    if ended:
        assert "handed to Slurm" in told(config)
    else:
        with pytest.raises(DataError, match=r"squeue does not say whether job 8 has ended.*Unable to contact"):
            told(config)


def test_a_task_that_fails_in_another_process_is_told(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "_WORKER_BYTES", 1)
    file = write_config(tmp_path, raw, "broken", "workers=2")
    text = file.read_text().replace('Step("near-duplicates")', 'Step("decontaminate", benchmarks=("nothing",))')
    file.write_text(text)
    with pytest.raises(DataError, match="nothing"):
        run(file)
