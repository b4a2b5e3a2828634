"""Darwin-Science: books and papers from PDF files, L0 to L4, and papers to L5 (Data Darwinism, arXiv 2602.07824).

    davinci curate configs/curate_darwin_science.py sources.books.inputs.books.path=/data/books
    davinci curate configs/curate_darwin_science.py sources.books.recipe.refine.parameters.endpoint=http://host:8000

The order is the report's. Books and papers are two sources: the report tells them apart by their metadata, here their
folders do. Completed papers are a third, which reads the refined ones. Below FOLDER, relative to where the command
runs, lie

    raw/books/, raw/papers/     PDF files with a text layer; scans are rejected. The report transcribes all pages with
                                olmOCR: "pdf-pages", `Step("transcribe", unread="keep", **LLM)` and "join-pages"
                                in the place of "pdf-text" do that for scans (docs/curation.md, L1)
    models/educational-value/   a classifier with the grades 0 to 5 as classes: docs/curation.md, L3
    models/domain/              a classifier with the fields of DOMAINS among its classes
    models/document-type/       a classifier with the types of NOT_TEACHING among its classes
    benchmarks/                 JSONL of the benchmarks that are to stay unseen

The report has one distilled model of 0.5 B parameters for all three; labels from a language model (step `annotate`)
and the small classifiers of this project stand in for it.
"""

from davinci_jax.curriculum.curation_recipes import ENGLISH, NEAR_DUPLICATES, Files, table_2
from davinci_jax.experiment import CurationConfig, Step

FOLDER = "data/darwin_science"
LLM = {"endpoint": "http://localhost:8000", "model": "openai/gpt-oss-120b"}  # the report's model of L4
COMPLETION = {"endpoint": "http://localhost:8000", "model": "Qwen/Qwen3-235B-A22B-Instruct-2507"}
# Assumption: the report has nine fields and names of types; these names are this project's.
DOMAINS = (
    "mathematics", "physics", "chemistry", "biology", "medicine", "engineering", "computer science", "economics",
    "earth science",
)  # fmt: skip
NOT_TEACHING = ("advertisement", "form", "list", "legal text")


def text_to_refined(files: Files) -> tuple[Step, ...]:
    """Returns the recipe that books and papers have in common."""
    return (
        Step("pdf-text"),
        # L2: duplicates first, which took 22 % of the report's documents, then size, noise and language.
        NEAR_DUPLICATES,
        Step("keep-sizes", min_bytes=8192),
        Step("drop-garbled-text", share=0.5),
        ENGLISH,
        # L3: types that teach nothing go, then fields. Assumption: the threshold of educational value.
        Step("document-type", model=files.model("document-type"), drop=NOT_TEACHING),
        files.educational_value(),
        Step("domain", model=files.model("domain"), keep=DOMAINS),
        # L4: pieces of 1,024 characters; where a piece fails it stays; a document needs 95 % of its pieces.
        Step("refine", **LLM, characters=1024, required=0.95),
        files.decontaminate(),
    )


def config() -> CurationConfig:
    """Three sources: `books` and `papers` at L4, `papers-completed` at L5."""
    files = Files(FOLDER)
    books, papers = (
        table_2(
            row,
            name=name,
            inputs=(files.raw("pdf", name),),
            recipe=text_to_refined(files),
        )
        for row, name in (("darwin-science-book", "books"), ("darwin-science-paper", "papers"))
    )
    completed = table_2(
        "darwin-science-paper-qwen",
        name="papers-completed",
        inputs=(files.documents("papers"),),
        recipe=(Step("complete", **COMPLETION, tokens=1024, required=0.95), files.decontaminate()),
        note="The row's other half, darwin-science-paper-gpt, differs in model and stages.",
    )
    return CurationConfig(root=FOLDER, sources=(books, papers, completed))
