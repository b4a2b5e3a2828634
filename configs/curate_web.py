"""General web pages from WARC files, L0 to L3: rules of Gopher, C4 and FineWeb, duplicates, educational value.

    davinci curate configs/curate_web.py --plan
    davinci curate configs/curate_web.py sources.web.inputs.crawl.path=s3://bucket/warc

The report takes this part of its pool ready-made (Nemotron-CC); here the order is FineWeb's, with the careful pass over
the pages that are left as MegaMath has it. Below FOLDER, relative to where the command runs, lie

    raw/crawl/                  WARC files
    blocked_domains.txt         hosts that are not read, one a line, such as the adult and malware lists of UT1
                                (https://dsi.ut-capitole.fr/blacklists/); an empty file blocks none
    models/educational-value/   a classifier with the grades 0 to 5 as classes: docs/curation.md, L3
    benchmarks/                 JSONL of the benchmarks that are to stay unseen

Copy the file to change more than a path; `sources.web.recipe.educational-value.parameters.threshold=2` changes a step.
"""

from davinci_jax.curriculum.curation_recipes import ENGLISH, EXACT_DUPLICATES, PERSONAL_DATA, Files, table_2
from davinci_jax.experiment import CurationConfig, Step

FOLDER = "data/web"


def config() -> CurationConfig:
    """One source, `web`."""
    files = Files(FOLDER)
    recipe = (
        # The address needs no page: it is looked at first.
        Step("drop-urls", domains_file=f"{FOLDER}/blocked_domains.txt"),
        Step("html-text", main_content=True, keep_raw=True),
        ENGLISH,
        # Rae et al. 2021, table A1 and section A.1.1; thresholds are the defaults of these steps.
        Step("gopher-repetition"),
        Step("gopher-quality"),
        # FineWeb keeps lines without a final mark: the rule of C4 took too much with it.
        Step("c4-quality", final_marks=False),
        Step("fineweb-quality"),
        EXACT_DUPLICATES,
        # FineWeb's 14 bands of 8 over 5 words, and like datatrove's default pages that differ in numbers are one.
        Step("near-duplicates", bands=14, rows=8, shingle=5, normalise_numbers=True),
        # Its text, with headings, lists and code, takes the place of the one that the rules have judged.
        Step("html-careful"),
        files.educational_value(),
        PERSONAL_DATA,
        files.decontaminate(),
    )
    source = table_2(
        "nemotron-cc-v1",
        name="web",
        inputs=(files.raw("warc", "crawl"),),
        recipe=recipe,
        note="That row was made by others with an ensemble of classifiers; this one has a single one.",
    )
    return CurationConfig(root=FOLDER, sources=(source,))
