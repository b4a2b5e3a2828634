"""Rejection sampling, L5: several answers to problems with a known result, of which a checker keeps the right ones.

    davinci curate configs/curate_rejection.py sources.mathematics-rs.recipe.rejection-sampling.parameters.samples=16

Below FOLDER, relative to where the command runs, lie

    raw/mathematics.jsonl   {"text": problem, "answer": "42" or TeX}
    raw/science.jsonl       {"text": problem with its lettered choices, "answer": "C"}
    raw/code.jsonl          {"text": problem, "tests": assertions in Python that run after the program}
    benchmarks/             JSONL of the benchmarks that are to stay unseen

Programs run in the sandbox (docs/curation.md), which needs namespaces of Linux; `sources.code-rs...` is the one source
that does.
"""

from davinci_jax.curriculum.curation_recipes import EXACT_DUPLICATES, Files, table_2
from davinci_jax.experiment import CurationConfig, Step

FOLDER = "data/rejection"
LLM = {"endpoint": "http://localhost:8000", "model": "Qwen/Qwen3-235B-A22B-Instruct-2507"}
# Row of table 2, problems, checker. The report samples code by no such rule: that row is its nearest.
SETS = (
    ("llama-nemotron-math-rs", "mathematics", "math"),
    ("llama-nemotron-science-rs", "science", "choice"),
    ("llama-nemotron-code", "code", "code"),
)


def config() -> CurationConfig:
    """Three sources, one for each checker."""
    files = Files(FOLDER)
    sources = tuple(
        table_2(
            row,
            name=f"{name}-rs",
            inputs=(files.raw("jsonl", name, ".jsonl"),),
            recipe=(
                # A problem of a benchmark is dropped before it is paid for, an answer that quotes one after.
                EXACT_DUPLICATES,
                files.decontaminate(),
                # Assumptions: number of samples, temperature, and one right answer kept of each problem.
                Step("rejection-sampling", **LLM, checker=checker, samples=4, keep=1, temperature=0.8),
                files.decontaminate(),
            ),
        )
        for row, name, checker in SETS
    )
    return CurationConfig(root=FOLDER, sources=sources)
