"""L3 to L6 end to end: `curate` against the project's own server with a tiny model of random weights, no hub."""

import glob
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
import scripted_server

from davinci_jax.curation.generation import prompts
from davinci_jax.curation.generation.store import GenerationStore
from davinci_jax.data.tokenizer import load_tokenizer
from davinci_jax.data.train_tokenizer import train
from davinci_jax.experiment import MeshConfig, ModelConfig
from davinci_jax.inference.server import ModelServer
from davinci_jax.models.decoder import build
from davinci_jax.sharding import make_mesh

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
    vocab_size=900, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_size=8, mlp_size=24,
    compute_dtype="float32", init_std=0.5, max_positions=2048,
)  # fmt: skip
TEXTS = [
    f"In trial {n} the pressure fell while the volume grew, and their product kept its value to one part in {n + 90}."
    for n in range(3)
]


class Counted(ModelServer):
    """Counts the prompts that it completes."""

    asked = ()

    def complete(self, body, prompt):
        self.asked = (*self.asked, prompt)
        return super().complete(body, prompt)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    words = [path.read_text() for path in sorted(prompts.FOLDER.glob("*.txt"))]
    train(iter(words), CONFIG.vocab_size).save(str(file))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        decoder = build(CONFIG, jax.random.key(0))
    with Counted(decoder, load_tokenizer(file), mesh, name="tiny") as server:
        yield server


RECIPE = """
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step

def config():
    common = {common!r}
    recipe = (
        Step("refine", **common, quality={{"max_ratio": {max_ratio}}}),
        Step("complete", **common, chat=False, temperature=0.8),
    )
    papers = CuratedSource(
        name="papers", domain="Science", level="L5", inputs=(Input(kind="jsonl", path={path!r}),), recipe=recipe
    )
    return CurationConfig(root={root!r}, sources=(papers,), workers=1)
"""


def start(root, url, required=0.0, max_ratio=1.5):
    """Starts the command in a process of its own, as a user does."""
    source, config = root / "raw.jsonl", root / "config.py"
    source.write_text("".join(json.dumps({"id": f"t{n}", "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    common = {"endpoint": url, "model": "tiny", "max_tokens": 16, "attempts": 1, "rounds": 1, "required": required}
    common |= {"patience": 2.0, "retries": 1, "delay": 0.1}
    config.write_text(RECIPE.format(common=common, max_ratio=max_ratio, path=str(source), root=str(root)))
    command = [
        sys.executable,
        "-c",
        "import sys; from davinci_jax.cli import main; sys.exit(main())",
        "curate",
        str(config),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def curate(root, url, **settings):
    """Runs the command to its end; returns it with documents and rejects."""
    process = start(root, url, **settings)
    output, errors = process.communicate()
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    folder = root / "curated" / "papers" / "current"
    return done, *([json.loads(line) for line in _lines(folder / name)] for name in ("documents", "rejects"))


def _lines(folder):
    for name in sorted(glob.glob(f"{folder}/**/*.jsonl*", recursive=True)):  # follows links, as rglob does not
        with gzip.open(name, "rt") if name.endswith(".gz") else open(name) as file:
            yield from file.read().splitlines()


def test_l4_and_l5_run_against_a_real_server_and_no_token_is_bought_twice(server, tmp_path):
    done, documents, rejects = curate(tmp_path, server.url)
    assert done.returncode == 0, done.stderr
    # Random weights restore nothing: every piece stays as it was, and says why.
    assert [document["text"] for document in documents] == TEXTS
    assert rejects == []
    for document in documents:
        assert document["level"] == "L5"
        assert sum(document["metadata"]["refine"]["kept"].values()) == 1
        names = [step["operation"] for step in document["lineage"]][-2:]
        assert names == ["refine", "complete"]
        assert document["lineage"][-1]["parameters"]["prompt"]["name"] == "complete_v1"
    assert len(server.asked) == 6
    refined, completed = server.asked[:3], server.asked[3:]
    assert all(prompts.load("refine_v1").text in prompt for prompt in refined)
    assert all(prompts.load("complete_v1").text in prompt for prompt in completed)
    assert all(any(text in prompt for prompt in refined) for text in TEXTS)
    kept = sorted((tmp_path / "curated" / "papers" / "kept").rglob("*.jsonl"))
    records = [record for file in kept for record in GenerationStore(file.parent).records()]
    assert len(records) == 6
    assert all(record["response"]["completion_tokens"] > 0 for record in records)

    curate(tmp_path, server.url)  # up to date
    curate(tmp_path, "replay", max_ratio=1.4)  # another threshold: made again from what is kept, with no server
    assert len(server.asked) == 6
    done, documents, _ = curate(tmp_path, "replay", required=0.95)
    assert [document["text"] for document in documents] == TEXTS  # an empty result takes the place of no other
    [said] = [line for line in done.stdout.splitlines() if "no document is left" in line]
    rejects = [json.loads(line) for line in _lines(said.partition("; see ")[2])]
    assert [reject["operation"] for reject in rejects] == ["refine"] * 3
    assert "1 of 1 pieces failed in 1 rounds" in rejects[0]["reason"]
    assert len(server.asked) == 6


def test_a_server_that_is_down_stops_the_run_with_one_line(tmp_path):
    done, documents, rejects = curate(tmp_path, "http://127.0.0.1:9")
    assert done.returncode != 0
    assert "http://127.0.0.1:9': does not answer within 2 s (connection refused); start it" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert documents == rejects == []


def test_a_command_that_is_killed_pays_no_request_twice(tmp_path):
    answered = []

    def script(payload, times):
        (text,) = scripted_server.material(payload)
        tag = "CLEANED_TEXT" if "messages" in payload else "COMPLETED_TEXT"
        if len(answered) >= 4 and not script.free:
            return scripted_server.Reply("", delay=1.0, status=503)
        answered.append(payload)
        return f"<{tag}>{text}</{tag}>"

    script.free = False
    with scripted_server.serve(script) as server:
        process = start(tmp_path, server.url)
        while len(answered) < 4 or server.at_once < 1:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)  # the last answer arrives
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        script.free = True
        done, documents, _ = curate(tmp_path, server.url)
    assert done.returncode == 0, done.stderr
    assert [document["text"] for document in documents] == TEXTS
    assert len(server.paid) == len({json.dumps(payload) for payload in server.paid}) == 6
