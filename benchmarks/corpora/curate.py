"""Curation of the two corpora that benchmarks/corpora.py fetches, L0 to L2: rules of Gopher, C4, FineWeb and OpenCoder.

davinci curate benchmarks/corpora/curate.py
"""

from davinci_jax.experiment import CuratedSource, CurationConfig, Input, Step

ROOT = "data/corpora"
PROSE = (
    Step("keep-languages", probability=0.5),
    Step("drop-garbled-text"),
    Step("gopher-repetition"),
    # Manuals have signs, braces and headings that the rules for web pages take for noise.
    Step("gopher-quality", min_alphabetic=0.6),
    Step("c4-quality", final_marks=False, curly_brackets=False),
    Step("fineweb-quality", min_final_marks=0.02),
)
UNIQUE = (Step("exact-duplicates"), Step("near-duplicates"), Step("replace-personal-data"))


def config() -> CurationConfig:
    """Four sources: `manuals` of HTML and man pages, `books` of PDF, and `guides` and `code` of Python's projects."""
    debian, archives = f"{ROOT}/debian", f"{ROOT}/python"
    manuals = CuratedSource(
        name="manuals",
        domain="General",
        level="L2",
        inputs=(
            Input(kind="html", path=f"{debian}/html", name="html"),
            Input(kind="html", path=f"{debian}/man", name="man"),
        ),
        recipe=(Step("html-text"), *PROSE, *UNIQUE),
    )
    books = CuratedSource(
        name="books",
        domain="Science",
        level="L2",
        inputs=(Input(kind="pdf", path=f"{debian}/pdf", name="pdf"),),
        recipe=(
            Step("pdf-text"),
            Step("keep-languages", probability=0.5),
            Step("keep-sizes"),
            Step("drop-garbled-text"),
            *UNIQUE,
        ),
    )
    guides = CuratedSource(
        name="guides",
        domain="General",
        level="L2",
        inputs=(Input(kind="folder", path=archives, name="guides", options={"suffixes": (".rst", ".md")}),),
        recipe=(Step("code-files", languages=("restructuredtext", "markdown")), *PROSE, *UNIQUE),
    )
    code = CuratedSource(
        name="code",
        domain="Code",
        level="L2",
        inputs=(Input(kind="folder", path=archives, name="code", options={"suffixes": (".py",)}),),
        recipe=(Step("code-files"), Step("find-licence"), Step("code-quality"), *UNIQUE),
    )
    return CurationConfig(root=ROOT, sources=(manuals, books, guides, code))
