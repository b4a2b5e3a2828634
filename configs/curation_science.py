"""Darwin-Science books and papers, in the order of the report (arXiv 2602.07824): L2 rules, L3, L4, and L5 for papers.

Give the folders of your PDF files, a server with OpenAI's interface, and two classifiers (docs/curation.md, L3):

    davinci curate configs/curation_science.py sources.books.inputs.0.path=/data/books

Pages without a text layer are rejected by `pdf-text`; pictures of pages go through the step `transcribe` instead.
"""

from davinci_jax.experiment import CuratedSource, CurationConfig, Input, Step

LLM = {"endpoint": "http://localhost:8000", "model": "openai/gpt-oss-120b"}
FIELDS = (
    "mathematics", "physics", "chemistry", "biology", "medicine", "engineering", "computer science", "economics",
    "earth science",
)  # fmt: skip
# Near-duplicates come first in the report and took 22 % of its documents.
RULES = (
    Step("pdf-text"),
    Step("near-duplicates", bands=14, rows=8),
    Step("keep-sizes", min_bytes=8192),
    Step("drop-garbled-text", share=0.5),
    Step("keep-languages", languages=("en",)),
)
SELECT = (
    Step("educational-value", model="models/educational-value", threshold=3.0),
    Step("domain", model="models/domain", keep=FIELDS),
)
REFINE = (Step("refine", **LLM, characters=1024, required=0.95),)


def config() -> CurationConfig:
    """Returns the sources of the report's table 2 that its own pipeline made from books and papers."""
    books = CuratedSource(
        name="books",
        domain="Science",
        level="L4",
        inputs=(Input(kind="pdf", path="raw/books"),),
        recipe=(*RULES, *SELECT, *REFINE),
        note="As Darwin-Science-Book.",
    )
    papers = CuratedSource(
        name="papers",
        domain="Science",
        level="L5",
        inputs=(Input(kind="pdf", path="raw/papers"),),
        recipe=(*RULES, *SELECT, *REFINE, Step("complete", **LLM, tokens=1024)),
        note="As Darwin-Science-Paper with cognitive completion; the report completes papers only.",
    )
    return CurationConfig(root="data/science", sources=(books, papers))
