"""Questions and answers grounded in refined books, L5: each answer is verified against its passage.

    davinci curate configs/curate_qa.py sources.book-qa.inputs.books.path=/data/curated/books/current/documents

It goes on from the books of configs/curate_darwin_science.py, in the folder that it leaves them in. Below FOLDER,
relative to where the command runs, lie

    benchmarks/     JSONL of the benchmarks that are to stay unseen

Every question is a document with its place marked, so that training can leave questions out of the loss.
"""

from davinci_jax.curriculum.curation_recipes import EXACT_DUPLICATES, Files, table_2
from davinci_jax.experiment import CurationConfig, Step

FOLDER = "data/qa"
BOOKS = Files("data/darwin_science")
LLM = {"endpoint": "http://localhost:8000", "model": "Qwen/Qwen3-235B-A22B-Instruct-2507"}


def config() -> CurationConfig:
    """One source, `book-qa`."""
    source = table_2(
        "darwin-science-book-qa",
        name="book-qa",
        inputs=(BOOKS.documents("books"),),
        recipe=(
            # Assumptions: windows as long as those of L5, three questions for each. The answer must lie in the passage
            # and a second reading must agree, which is the report's rule.
            Step("ask-questions", **LLM, tokens=1024, count=3, verify=True),
            EXACT_DUPLICATES,
            Files(FOLDER).decontaminate(),
        ),
    )
    return CurationConfig(root=FOLDER, sources=(source,))
