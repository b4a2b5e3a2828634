"""Source code from git repositories, rules after OpenCoder, and the threads of Stack Exchange.

    davinci curate configs/curate_code.py sources.code.inputs.repositories.path=/data/repositories

Below FOLDER, relative to where the command runs, lie

    raw/repositories/       git repositories, bare ones too; the report crawled those with 10 stars or more
    raw/threads/            Posts.xml of a site (https://archive.org/details/stackexchange)
    benchmarks/             JSONL of the benchmarks that are to stay unseen

The report calls its code L3: filtered by models, after OpenCoder and Seed-Coder. What OpenCoder published is about 118
heuristic signals and thresholds, and no model that judges quality: rules, which are L2. So `code` is declared L3 as
published, reaches L2 by what it does, and its card shows both. A classifier of your own makes it L3:
`Step("educational-value", model=...)` behind `code-quality`.
"""

from davinci_jax.curation.licences import PERMISSIVE
from davinci_jax.curriculum.curation_recipes import EXACT_DUPLICATES, NEAR_DUPLICATES, PERSONAL_DATA, Files, table_2
from davinci_jax.experiment import CurationConfig, Step

FOLDER = "data/code"
SITE = "https://stackoverflow.com"


def config() -> CurationConfig:
    """Two sources: `code` and `stack-exchange`."""
    files = Files(FOLDER)
    code = table_2(
        "github-10-stars",
        name="code",
        inputs=(files.raw("git", "repositories"),),
        recipe=(
            Step("code-files"),
            # Assumption: permissive only; the report names no rule for licences.
            Step("find-licence"),
            Step("keep-licences", licences=PERMISSIVE, unknown=False),
            # Signals of OpenCoder (Huang et al. 2024, in its appendix), thresholds of this project.
            Step("code-quality"),
            EXACT_DUPLICATES,
            NEAR_DUPLICATES,
            PERSONAL_DATA,
            files.decontaminate(),
        ),
        note="L3 as published, by operation L2: OpenCoder's filter is a list of heuristic signals.",
    )
    threads = table_2(
        "txt360-stack-exchange",
        name="stack-exchange",
        inputs=(files.raw("stack-exchange", "threads", site=SITE),),
        recipe=(
            # Assumption: threads without an answer teach nothing.
            Step("thread-text", need_answer=True),
            EXACT_DUPLICATES,
            NEAR_DUPLICATES,
            PERSONAL_DATA,
            files.decontaminate(),
        ),
    )
    return CurationConfig(root=FOLDER, sources=(code, threads))
