"""What a run tells of its tasks: a line now and then in a log, a bar on a terminal."""

import dataclasses
import io
import re
import sys
import time

import pytest
from rich.console import Console

from davinci_jax.curation import progress, registry
from davinci_jax.curation.run import curate
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step


@dataclasses.dataclass(frozen=True)
class Slow:
    """Takes its time for every document, and makes two of it."""

    name = "slow"
    level = "L2"

    def parameters(self):
        return {}

    def apply(self, documents, reject):
        for document in documents:
            time.sleep(0.1)
            yield document
            yield dataclasses.replace(document, id=f"{document.id}-2")


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
def test_lines_tell_of_tasks_and_documents_where_there_is_no_terminal(tmp_path, monkeypatch, terminal):
    monkeypatch.setitem(registry.OPERATIONS, "slow", (lambda: sys.modules[__name__], "Slow"))
    for name in ("_SECONDS", "_LINE_SECONDS"):
        monkeypatch.setattr(progress, name, 0.05)
    (tmp_path / "in").mkdir()
    for n in range(6):
        (tmp_path / f"in/{n}.txt").write_text(f"text {n}")
    given, recipe = Input(kind="folder", path=str(tmp_path / "in")), (Step("decode-utf8"), Step("slow"))
    source = CuratedSource(name="s", domain="D", level="L2", inputs=(given,), recipe=recipe)
    config = CurationConfig(root=str(tmp_path / "root"), sources=(source,), workers=1, task_bytes=1)
    curate(config, Console(file=(out := io.StringIO()), width=40, force_terminal=terminal))
    assert terminal == (re.search(r"tasks.*, 0 min", out.getvalue()) is None)
    lines = re.findall(r"^s: slow  (\d) of 6 tasks(?:, (\d+) documents)?, 0 min$", out.getvalue(), re.M)
    told = [(int(tasks), int(documents or 0)) for tasks, documents in lines]
    assert terminal or len({tasks for tasks, _ in told}) > 2
    assert told == sorted(told)
    assert all(documents - 2 * tasks in (0, 2) for tasks, documents in told)  # of tasks that are done, and one at work
