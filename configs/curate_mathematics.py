"""Mathematics of the web, L0 to L4, in the two passes of MegaMath (Zhou et al. 2025, arXiv 2504.02807).

    davinci curate configs/curate_mathematics.py sources.mathematics-refined.recipe.refine.parameters.endpoint=http://host:8000

Pages go fast through extraction, a classifier of mathematics and duplicates; what is left is extracted again with care,
then judged again, because only now its formulas are whole. The refined source reads the documents of the first, so
that the language model sees nothing twice. Below FOLDER, relative to where the command runs, lie

    raw/crawl/                  WARC files
    models/mathematics.bin      a fastText classifier with the label __label__math, and another one for the rest
                                (fasttext supervised -input labels.txt -output mathematics; .ftz as well)
    models/educational-value/   a classifier with the grades 0 to 5 as classes: docs/curation.md, L3
    benchmarks/                 JSONL of the benchmarks that are to stay unseen

Rules for prose are left out: curly brackets, symbols and short lines are what mathematics is made of.
"""

from davinci_jax.curriculum.curation_recipes import ENGLISH, EXACT_DUPLICATES, PERSONAL_DATA, Files, table_2
from davinci_jax.experiment import CurationConfig, Step

FOLDER = "data/mathematics"
LLM = {"endpoint": "http://localhost:8000", "model": "openai/gpt-oss-120b"}


def config() -> CurationConfig:
    """Two sources: `mathematics` at L3, and `mathematics-refined`, its documents at L4."""
    files = Files(FOLDER)
    # Assumption: half; a fast pass that loses formulas is not to be strict.
    mathematics = Step("domain", model=f"{FOLDER}/models/mathematics.bin", keep=("math",), probability=0.5)
    web = table_2(
        "megamath-web",
        name="mathematics",
        inputs=(files.raw("warc", "crawl"),),
        recipe=(
            Step("html-text", main_content=True, keep_raw=True),
            ENGLISH,
            mathematics,
            EXACT_DUPLICATES,
            # MegaMath's 11 bands of 10; exercises that differ in their numbers are different exercises.
            Step("near-duplicates", bands=11, rows=10, shingle=5, normalise_numbers=False),
            Step("html-careful"),
            mathematics,
            # Assumption: explained in parts is enough for mathematics that is rare.
            files.educational_value(threshold=2.0),
            PERSONAL_DATA,
            files.decontaminate(),
        ),
    )
    refined = table_2(
        "megamath-refined",
        name="mathematics-refined",
        inputs=(files.documents("mathematics"),),
        # Pieces and quota of Data Darwinism's L4. A model may know a benchmark by heart: decontaminated again.
        recipe=(Step("refine", **LLM, characters=1024, required=0.95), files.decontaminate()),
    )
    return CurationConfig(root=FOLDER, sources=(web, refined))
