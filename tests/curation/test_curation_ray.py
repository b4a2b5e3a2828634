"""The Ray executor gives the bytes of the local one."""

import pytest
from curated_corpus import content, run, write_config, write_corpus

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore:placement_group:DeprecationWarning"),  # of datatrove's calls
]


def test_ray_gives_the_same(tmp_path):
    import ray  # extra `curation-ray`, which only this needs

    size = 1_000_000  # two tasks, since Ray takes seconds to start each
    raw = write_corpus(tmp_path / "raw")
    try:
        made = run(write_config(tmp_path, raw, "ray", "workers=2, executor='ray'", size))
    finally:
        ray.shutdown()
    assert len(list((made.folder / "documents").iterdir())) == 2
    assert content(made.folder) == content(run(write_config(tmp_path, raw, "local", "workers=2", size)).folder)
