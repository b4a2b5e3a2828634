"""Questions and answers: synthesis grounded in curated books, and rejection sampling on problems with known results.

    davinci curate configs/curation_qa.py sources.math-rs.inputs.0.path=/data/problems.jsonl

A problem is a line {"text": "...", "question": "...", "answer": "..."}: fields besides the text become metadata. Name
the files of the benchmarks that you will evaluate on in `decontaminate`.
"""

from davinci_jax.experiment import CuratedSource, CurationConfig, Input, Step

LLM = {"endpoint": "http://localhost:8000", "model": "Qwen/Qwen3-235B-A22B-Instruct-2507"}
STAGES = ("2-1", "2-2")
CLEAN = (Step("decontaminate", benchmarks=("benchmarks.jsonl",), ngram=20),)


def config() -> CurationConfig:
    """Returns one source of grounded questions and three of rejection sampling, one for each checker."""
    book_qa = CuratedSource(
        name="book-qa",
        domain="QA",
        level="L5",
        inputs=(Input(kind="documents", path="data/science/curated/books/current/documents"),),
        recipe=(Step("ask-questions", **LLM, count=3, verify=True), *CLEAN),
        stages=STAGES,
        note="As Darwin-Science-Book QA.",
    )
    sampled = [
        CuratedSource(
            name=f"{name}-rs",
            domain="QA",
            level="L5",
            inputs=(Input(kind="jsonl", path=f"raw/{name}.jsonl"),),
            recipe=(*CLEAN, Step("rejection-sampling", **LLM, checker=checker, samples=8, keep=2)),
            stages=STAGES,
            note="Answers that a checker finds right.",
        )
        for name, checker in (("math", "math"), ("science", "choice"), ("code", "code"))
    ]
    return CurationConfig(root="data/qa", sources=(book_qa, *sampled))
