"""The verbs on a finished run, and one clear line with exit code 2 for what a user can mend."""

import dataclasses
import fcntl
import json
import pathlib
import resource
import shutil
import signal
import subprocess
import urllib.request

import jax
import numpy as np
import pytest
import sentencepiece
import tiny_run

from davinci_jax.cli import main
from davinci_jax.data.rows import open_rows
from davinci_jax.experiment import Experiment, load_config
from davinci_jax.models import huggingface
from davinci_jax.sharding import make_mesh
from davinci_jax.training.load import load_model

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

LAST = sum(tiny_run.STEPS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A root with data, config.json and a finished run."""
    root = tmp_path_factory.mktemp("finished")
    experiment = tiny_run.prepare(root)
    assert main(["train", str(tiny_run.write_config(experiment, root / "config.json"))]) == 0
    return root


@pytest.fixture
def copied(finished, tmp_path) -> tuple[pathlib.Path, Experiment]:
    """A copy of the data that a test may damage, and its experiment; nothing was trained."""
    shutil.copytree(finished / "data", tmp_path / "data")
    return tmp_path, tiny_run.make_experiment(tmp_path)


def fails(capsys, *arguments: object) -> str:
    """Runs a verb that must fail as a user's mistake; returns its one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1, lines
    assert lines[0].startswith("davinci: ")
    return lines[0]


def succeeds(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


# What a finished run gives.


def test_the_run_directory_holds_what_it_promises(finished):
    run = finished / "run"
    assert load_config(str(run)) == load_config(str(finished / "config.json"))
    stages = [json.loads(line) for line in (run / "curriculum.jsonl").read_text().splitlines()]
    assert [line["first_step"] for line in stages] == [0, *np.cumsum(tiny_run.STEPS)[:-1]]
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [15, 18]
    assert list((run / "tensorboard").iterdir())


def test_evaluate_repeats_the_last_evaluation_of_the_run(finished, capsys):
    from davinci_jax.training.metrics import read_metrics

    succeeds(capsys, "evaluate", finished / "run")
    result = json.loads((finished / "run" / "evaluations" / f"{LAST}.json").read_text())
    inside = read_metrics(finished / "run").evaluations[-1]
    assert result["step"] == inside["step"] == LAST
    for name in ("loss", "bits_per_byte", "loss/General", "bits_per_byte/QA"):
        assert result[name] == pytest.approx(inside[name], rel=1e-6)


def test_heldout_figures_cover_questions_that_training_masks(finished):
    """Half of every QA document is a question; only the ends of documents have no target when held out."""
    data = load_config(str(finished / "run")).data
    train, heldout = (open_rows(data, 2, split) for split in ("train", "heldout"))
    shares = [(rows.read(np.arange(rows.num_rows - 1)).labels < 0).mean() for rows in (train, heldout)]
    assert shares[0] > 0.4
    assert shares[1] < 0.05


def test_generate_writes_samples(finished, capsys):
    out = succeeds(
        capsys, "generate", finished / "run", "--prompt", "abc", "--prompt", "x=", "--max-new-tokens", 5, "--save"
    )
    assert "abc" in out
    samples = json.loads((finished / "run" / "samples.json").read_text())
    assert [sample["prompt"] for sample in samples["samples"]] == ["abc", "x="]
    again = succeeds(capsys, "generate", finished / "run", "--prompt", "abc", "--prompt", "x=", "--max-new-tokens", 5)
    assert "written" not in again
    for prompt in ("abc", "b", "c"):
        succeeds(capsys, "generate", finished / "run", "--prompt", prompt, "--max-new-tokens", 5, "--save")
    kept = [json.loads((finished / "run" / f"samples{n}.json").read_text()) for n in ("-1", "-2", "-3", "")]
    assert [[sample["prompt"] for sample in one["samples"]] for one in kept] == [["abc", "x="], ["abc"], ["b"], ["c"]]
    assert [line for line in again.splitlines() if line.strip()] == [
        line for line in out.splitlines() if line.strip() and not line.startswith("written")
    ]


def test_serve_answers_until_it_is_terminated(finished, capsys):
    command = tiny_run.command("serve", finished / "run", "--port", "0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            told = server.stdout.readline()
            assert told.startswith(f"step 18 of {finished / 'run'} as 'tiny' at http://127.0.0.1:")
            body = json.dumps({"model": "tiny", "prompt": "ab", "max_tokens": 4, "temperature": 0}).encode()
            with urllib.request.urlopen(f"{told.split()[-1]}/completions", body, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] <= 4
        finally:
            server.terminate()  # a test that was started with `&` ignores Ctrl-C, and so do its children
        try:
            assert server.communicate(timeout=60)[0] == "stopped\n"
        finally:
            server.kill()
    assert server.returncode == 0
    line = fails(capsys, "serve", finished / "run", "--batch", 3)
    assert line == "davinci: batch = 3: is no power of 2; give 1, 2, 4, 8, ..."


def test_trace_names_the_documents_whose_tokens_the_step_saw(finished, capsys):
    """Every traced part is found, token by token, in the text of the document that it names."""
    from davinci_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(finished / "data" / "tokenizer.json")
    texts = {}
    for file in (finished / "data" / "documents").rglob("*.jsonl"):
        texts |= {line["id"]: line["text"] for line in map(json.loads, file.read_text().splitlines())}
    records = [
        json.loads(line) for line in succeeds(capsys, "trace", finished / "run", "--step", 12, "--json").splitlines()
    ]
    assert {record["sequence"] for record in records} == set(
        range(16 * 2 + 8 * 2 + 32 + 16 * 5, 16 * 2 + 8 * 2 + 32 + 16 * 6)
    )
    assert {record["source"] for record in records} == {"web", "code", "pairs"}
    assert all(record["level"] == "L2" for record in records)
    experiment = load_config(str(finished / "run"))
    rows = read_rows(experiment, 12)
    for record in records:
        tokens = [*tokenizer.encode(texts[record["id"]]), tokenizer.eos_id]
        part = tokens[record["first_token"] : record["first_token"] + record["num_tokens"]]
        row = rows[record["sequence"]]
        assert row[record["first_column"] : record["first_column"] + record["num_tokens"]].tolist() == part
    assert "is or will be given" not in succeeds(capsys, "trace", finished / "run", "--step", LAST)
    unborn = succeeds(capsys, "trace", finished / "run", "--step", 5, f"run.directory={finished / 'unborn'}")
    assert unborn.startswith("the run has logged steps up to 0; this is what step 5 is or will be given\nsequence ")


def read_rows(experiment, step: int) -> dict[int, np.ndarray]:
    """The tokens that training is given at a step, by global sequence."""
    from davinci_jax.training.inputs import open_inputs
    from davinci_jax.training.layout import batch_layout

    inputs = open_inputs(experiment, batch_layout(experiment, make_mesh(experiment.mesh)))
    _, batch = next(inputs.loader.steps(step - 1))
    first = inputs.timeline.at(step - 1).first_sequence
    inputs.close()
    tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
    return {first + n: row for n, row in enumerate(tokens)}


def test_to_hugging_face_and_back(finished, tmp_path, capsys):
    run, folder = finished / "run", tmp_path / "hf"
    succeeds(capsys, "convert", "to-hf", run, folder, "--dtype", "float32")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    other = tmp_path / "again"
    succeeds(capsys, "convert", "from-hf", folder, run, f"run.directory={other}")
    experiment = load_config(str(run))
    moved = dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, directory=str(other)))
    with jax.set_mesh(make_mesh(experiment.mesh)):
        before, _ = load_model(experiment)
        after, step = load_model(moved)
        _, stored = huggingface.load(folder)
    assert step == 0
    for a, b, c in zip(*map(jax.tree.leaves, (before, after, stored)), strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
    assert "already" in fails(capsys, "convert", "from-hf", folder, run, f"run.directory={other}")
    succeeds(capsys, "train", run, f"run.directory={other}")
    assert "num_layers: 2 there, 3 in the config" in fails(
        capsys, "convert", "from-hf", folder, run, "model.num_layers=3", f"run.directory={tmp_path / 'third'}"
    )


def test_weights_of_another_tokenizer_are_refused(finished, tmp_path, capsys):
    run, folder, other = finished / "run", tmp_path / "hf", f"run.directory={tmp_path / 'again'}"
    succeeds(capsys, "convert", "to-hf", run, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))  # the same, without line breaks
    succeeds(capsys, "convert", "from-hf", folder, run, other + "-1")
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer.json: is another tokenizer than" in fails(capsys, "convert", "from-hf", folder, run, other + "-2")


def test_tokenizers_that_cannot_be_compared_are_told(finished, tmp_path, capsys):
    run, folder, other = finished / "run", tmp_path / "hf", f"run.directory={tmp_path / 'again'}"
    succeeds(capsys, "convert", "to-hf", run, folder)
    assert "compared" not in succeeds(capsys, "convert", "from-hf", folder, run, other + "-1")
    trained = tmp_path / "pieces.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abd", "bca dab"] * 50), model_writer=trained.open("wb"), vocab_size=20,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    # Its shards are of another tokenizer, which is told next.
    assert main(["convert", "from-hf", str(folder), str(run), other + "-2", f"data.tokenizer={trained}"]) == 2
    assert f"{trained} could not be compared" in capsys.readouterr().out
    for found, name in (("tokenizer.model", "tokenizer.model"), ("no tokenizer", "vocab.txt")):
        next(folder.glob("tokenizer.[jm]*")).rename(folder / name)
        out = succeeds(capsys, "convert", "from-hf", folder, run, f"{other}-{name}")
        assert "could not be compared with the tokenizer that the weights have learnt" in out
        assert f"{folder} holds {found}; see to it" in out


def test_a_run_is_read_from_any_folder(finished, tmp_path, capsys, monkeypatch):
    """The config names the data relative to where training was started; the run directory is moved afterwards."""
    (tmp_path / "data").symlink_to(finished / "data")
    monkeypatch.chdir(tmp_path)
    experiment = tiny_run.make_experiment(pathlib.Path())
    config = tiny_run.write_config(experiment, tmp_path / "config.json")
    assert experiment.data.root == "data"
    succeeds(capsys, "train", config, "evaluation.every_steps=none")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere" / "moved")
    succeeds(capsys, "evaluate", "moved")
    succeeds(capsys, "trace", "moved", "--step", 3)
    assert (tmp_path / "elsewhere" / "moved" / "evaluations" / f"{LAST}.json").is_file()


def test_the_experiment_of_a_moved_run_is_read_as_its_folder(finished, tmp_path, capsys):
    """Training would else start anew where the run lay before; a resolved experiment elsewhere keeps its directory."""
    moved, alone = tmp_path / "moved", tmp_path / "alone"
    shutil.copytree(finished / "run", moved)
    experiment = tiny_run.make_experiment(finished)
    old = tmp_path / "old"
    experiment = dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, directory=str(old)))
    tiny_run.write_config(experiment, moved / "experiment.json")
    succeeds(capsys, "train", moved / "experiment.json")
    assert not old.exists()
    assert json.loads(succeeds(capsys, "plan", moved / "experiment.json", "--json"))["directory"] == str(moved)
    alone.mkdir()
    config = tiny_run.write_config(experiment, alone / "experiment.json")
    assert json.loads(succeeds(capsys, "plan", config, "--json"))["directory"] == str(old)


def test_report_is_written(finished, capsys):
    succeeds(capsys, "report", finished / "run")
    assert "tiny" in (finished / "run" / "report.html").read_text()


# What a user can mend.


def test_missing_shard_folder(copied, capsys):
    root, experiment = copied
    shutil.rmtree(root / "data" / "code")
    line = fails(capsys, "train", tiny_run.write_config(experiment, root / "config.json"))
    assert "data.sources[code]" in line
    assert "davinci shard" in line
    assert not (root / "run").exists()


def test_truncated_shard_is_named_before_training(copied, capsys):
    root, experiment = copied
    shard = next((root / "data" / "code").glob("train-0*.array_record"))
    shard.write_bytes(shard.read_bytes()[:-100])
    line = fails(capsys, "train", tiny_run.write_config(experiment, root / "config.json"))
    assert shard.name in line
    assert "truncated" in line


def test_altered_shard_is_named_with_its_record(copied, capsys):
    """A flipped bit keeps the size, so it shows when the record is read; the run can be continued after mending."""
    root, experiment = copied
    shard = next((root / "data" / "code").glob("train-0*.array_record"))
    whole = shard.read_bytes()
    altered = bytearray(whole)
    for eighth in range(1, 8):  # in most of its records, so that a short run meets one
        altered[len(whole) * eighth // 8] ^= 0x10
    shard.write_bytes(altered)
    config = tiny_run.write_config(experiment, root / "config.json")
    line = fails(capsys, "train", config)
    assert shard.name in line
    assert "record" in line
    assert shard.name in fails(capsys, "shard", config, "--verify")
    shard.write_bytes(whole)
    succeeds(capsys, "train", config)


def test_manifest_of_another_tokenizer(copied, capsys):
    root, experiment = copied
    file = root / "data" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"].pop()
    file.write_text(json.dumps(tokenizer))
    line = fails(capsys, "train", tiny_run.write_config(experiment, root / "config.json"))
    assert "was made with another tokenizer" in line


def test_labels_that_the_shards_were_not_made_for(copied, capsys):
    root, experiment = copied
    config = tiny_run.write_config(experiment, root / "config.json")
    line = fails(capsys, "train", config, "data.sources.web.level=L4")
    assert "data.sources[web].level = 'L4': is not what the shards in" in line
    line = fails(capsys, "train", config, "data.sources.web.domain=Code", "data.sources.code.domain=General")
    assert "data.sources[web].domain = 'Code': is not what the shards in" in line


def test_vocabulary_mismatch(copied, capsys):
    root, experiment = copied
    line = fails(capsys, "train", tiny_run.write_config(experiment, root / "config.json"), "model.vocab_size=256")
    assert "model.vocab_size = 256" in line
    assert "use " in line


def test_source_that_runs_out(copied, capsys):
    root, experiment = copied
    config = tiny_run.write_config(experiment, root / "config.json")
    line = fails(capsys, "train", config, "data.sources.pairs.max_epochs=0.01")
    assert "data.sources.pairs.max_epochs = 0.01" in line
    assert "epochs" in line


def test_batch_not_divisible_by_devices(copied, capsys):
    root, experiment = copied
    config = tiny_run.write_config(experiment, root / "config.json")
    line = fails(capsys, "train", config, "curriculum.1-1.batch.0.size=12")
    assert "12: is not divisible by the 8 devices" in line


def test_resuming_with_a_changed_config(finished, capsys):
    line = fails(capsys, "train", finished / "config.json", "optimizer.weight_decay=0.2", "run.seed=5")
    assert "optimizer.weight_decay: 0.1 there, 0.2 here" in line
    assert "run.seed: 0 there, 5 here" in line


@pytest.mark.parametrize("override", ["model.mlp_size=64", "model.rope_base=50.0"])
@pytest.mark.parametrize(
    "verb", [("evaluate",), ("generate", "--prompt", "abc", "--max-new-tokens", "4"), ("serve", "--port", "0")]
)
def test_reading_a_checkpoint_as_another_model(finished, capsys, verb, override):
    """One override changes a shape; the other would load and give figures of a model that was never trained."""
    file = finished / "run" / "evaluations" / f"{LAST}.json"
    before = file.read_bytes()
    line = fails(capsys, verb[0], finished / "run", *verb[1:], override)
    name, value = override.split("=")
    assert "holds a run of another experiment" in line
    assert f"{name}: " in line
    assert f"{value} here" in line
    assert file.read_bytes() == before


def test_resuming_on_other_shards(finished, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    shutil.rmtree(root / "data" / "code")
    documents = root / "data" / "documents" / "code" / "part.jsonl"
    documents.write_text("".join(documents.read_text().splitlines(keepends=True)[:200]))
    experiment = tiny_run.make_experiment(root)
    config = tiny_run.write_config(experiment, root / "config.json")
    succeeds(capsys, "shard", config)
    assert "was trained on other shards of code" in fails(capsys, "train", config)


def test_a_loss_that_is_not_finite_names_step_and_batch(copied, capsys):
    """A learning rate of 1e30 makes the parameters infinite; nothing of that is saved."""
    root, experiment = copied
    config = tiny_run.write_config(experiment, root / "config.json")
    line = fails(
        capsys, "train", config, "curriculum.1-2.learning_rate.peak=1e30", "curriculum.1-2.learning_rate.final=1e30"
    )
    # 6 steps of stage 1-1 on 2 x 8 + 4 x 16 sequences come before it.
    assert "is not finite at step 7 (stage 1-2, sequences 80 to 95" in line or "at step 8 (stage 1-2" in line
    assert "davinci trace" in line
    assert "the checkpoint of step 6 is whole" in line
    assert max(int(path.name) for path in (root / "run" / "checkpoints").iterdir()) == 6
    metrics = (root / "run" / "metrics.jsonl").read_text()
    assert '"non_finite"' in metrics


def test_two_processes_never_train_in_one_directory(copied, capsys):
    """The one that is refused has changed nothing, though it may write other intervals into the directory."""
    root, experiment = copied
    config = tiny_run.write_config(experiment, root / "config.json")
    succeeds(capsys, "train", config)
    resolved = (root / "run" / "experiment.json").read_bytes()
    folder = root / "hf"
    succeeds(capsys, "convert", "to-hf", root / "run", folder)
    shutil.rmtree(root / "run" / "checkpoints")
    with (root / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for verb in (("train", config), ("convert", "from-hf", folder, config)):
            line = fails(capsys, *verb, "checkpoint.every_steps=7")
            assert "is being trained by another process" in line
            assert (root / "run" / "experiment.json").read_bytes() == resolved
    assert not (root / "run" / "checkpoints").exists()
    succeeds(capsys, "train", config, "checkpoint.every_steps=7")
    assert load_config(str(root / "run")).checkpoint.every_steps == 7


def test_trace_refuses_other_shards_than_the_run_saw(finished, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    shutil.rmtree(root / "data" / "code")
    documents = root / "data" / "documents" / "code" / "part.jsonl"
    documents.write_text("".join(documents.read_text().splitlines(keepends=True)[:250]))
    config = tiny_run.write_config(tiny_run.make_experiment(root), root / "config.json")
    succeeds(capsys, "shard", config)
    assert "was trained on other shards of code" in fails(capsys, "trace", config, "--step", 5)


def test_disk_full_while_saving(copied, capsys):
    """The limit on file sizes stands for a full disk: only the arrays of a checkpoint are larger."""
    root, experiment = copied
    config = tiny_run.write_config(experiment, root / "config.json")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        line = fails(capsys, "train", config, "run.tensorboard=false")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "checkpoints/3: could not be written" in line
    assert "start the same command again" in line
    succeeds(capsys, "train", config)


def test_documents_that_are_no_text_are_counted_and_left_out(copied, capsys):
    root, experiment = copied
    shutil.rmtree(root / "data" / "web")
    with (root / "data" / "documents" / "web" / "part.jsonl").open("ab") as file:
        file.write(b'{"id": "bad", "text": "\xff\xfe"}\n{"id": "empty", "text": ""}\nnot json\n')
    out = succeeds(capsys, "shard", tiny_run.write_config(experiment, root / "config.json"))
    assert "3 rejected" in out
    rejects = [json.loads(line) for line in (root / "data" / "web" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [301, 302, 303]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nowhere.py"), "does not exist"),
        (("train", "{root}/data/tokenizer.json"), "unknown field"),
        (("train", "{config}", "model.num_layer=3"), "did you mean 'num_layers'"),
        (("train", "{config}", "model.num_layers=three"), "'three'"),
        (("train", "{config}", "model.num_kv_heads=3"), "does not divide num_heads"),
        (("evaluate", "{config}", "run.directory={root}/none"), "holds no whole checkpoint"),
        (("evaluate", "{root}/run", "--step", "7"), "has no whole checkpoint of it; give one of 15, 18"),
        (("trace", "{root}/run", "--step", "99"), "give a step from 1 to 18"),
        (("generate", "{root}/run", "--temperature", "-1"), "temperature = -1.0"),
        (("generate", "{root}/run", "--prompt", "abc", "--max-new-tokens", "999"), "more than the 64 positions"),
        (("report", "{root}/data"), "experiment.json"),
        (("shard", "{config}", "--source", "cod"), "did you mean 'code'"),
        (("plan", "{config}", "--devices", "0"), "--devices = 0"),
        (("train", "{config}", "run.directory={config}"), "run.directory"),
        (("train", "{config}", "run.directory=/proc/none/run"), "cannot be made"),
        (("convert", "to-hf", "{root}/run", "{root}/data"), "is not an empty folder"),
    ],
)
def test_one_clear_line(finished, capsys, arguments, message):
    places = {"root": finished, "config": finished / "config.json"}
    assert message in fails(capsys, *(argument.format(**places) for argument in arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian", "configs/quickstart.py"), "'trian' is unknown; did you mean 'train'?"),
        (("convert", "form-hf", "a", "b"), "'form-hf' is unknown; did you mean 'from-hf'?"),
    ],
)
def test_a_mistyped_verb_gets_the_nearest(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_overrides_are_not_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["curate"])
    assert "the following arguments are required: CONFIG\n" in capsys.readouterr().err


def test_unknown_options_end_with_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "configs/quickstart.py", "--fast"])
    assert stop.value.code == 2
    assert "unknown argument '--fast'" in capsys.readouterr().err
