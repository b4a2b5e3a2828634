"""One token of a step, followed through shard, row, document, chunk and operations to the file that it came from."""

import dataclasses
import hashlib
import json

import pytest
import tiny_run
from rich.console import Console

from davinci_jax.cli import main
from davinci_jax.curation.documents import read_documents
from davinci_jax.curation.run import curate
from davinci_jax.data.shard_sources import shard_sources
from davinci_jax.data.tokenizer import load_tokenizer
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step


def curate_code(root, raw):
    """Curates the source "code" from a folder."""
    source = CuratedSource(
        name="code",
        domain="Code",
        level="L2",
        inputs=(Input(kind="folder", path=str(raw), name="raw", licence="MIT"),),
        recipe=(Step("decode-utf8"), Step("docstring-pages"), Step("drop-short", characters=20)),
    )
    curate(CurationConfig(root=str(root / "data"), sources=(source,), workers=1), Console(quiet=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An experiment whose source "code" is curated from Python files with docstrings; nothing is trained."""
    root = tmp_path_factory.mktemp("traced")
    raw = root / "raw"
    raw.mkdir()
    for n in range(40):
        text = "".join(
            f'def f{k}(x):\n    """Docstring {k} of file {n}, which goes on for a while."""\n\n' for k in range(6)
        )
        (raw / f"m{n:02d}.py").write_text(text)
    curate_code(root, raw)
    experiment = tiny_run.make_experiment(root)
    tiny_run.make_documents(root / "data")
    sources = tuple(
        dataclasses.replace(item, documents="curated/code/current/documents") if item.name == "code" else item
        for item in experiment.data.sources
    )
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, sources=sources))
    shard_sources(experiment, new_tokenizer=True, console=Console(quiet=True))
    return root, experiment, tiny_run.write_config(experiment, root / "config.json")


@pytest.mark.slow
def test_every_token_of_a_sequence_leads_to_its_file(made, capsys):
    root, experiment, config = made
    tokenizer = load_tokenizer(root / "data" / experiment.data.tokenizer)
    assert main(["trace", str(config), "--step", "2", "--json"]) == 0
    step = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    record = max((record for record in step if record["source"] == "code"), key=lambda record: record["num_tokens"])
    tokens = []
    columns = range(record["first_column"], record["first_column"] + record["num_tokens"])
    for column in columns:
        arguments = ["--step", "2", "--sequence", str(record["sequence"]), "--column", str(column), "--json"]
        assert main(["trace", str(config), *arguments]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["id"], found["row"], found["column"]) == (record["id"], record["row"], column)
        assert found["token_of_document"] == record["first_token"] + column - record["first_column"]
        tokens.append(found["token"])
    assert found["shard"].endswith(".array_record")
    name = found["id"].split("::")[0].removeprefix("raw/")
    raw = (root / "raw" / name).read_bytes()
    assert found["origin"]["place"] == str(root / "raw" / name)
    assert found["origin"]["state"] == "unchanged"
    assert found["origin"]["record"]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert [step["operation"] for step in found["lineage"]] == [
        "read-folder",
        "decode-utf8",
        "docstring-pages",
        "drop-short",
    ]
    assert found["lineage"][2]["from"] == f"raw/{name}"
    [document] = [
        document
        for file in (root / "data/curated/code/current/documents").iterdir()
        for document in read_documents(file)
        if document.id == found["id"]
    ]
    text = tokenizer.decode([token for token in tokens if token != tokenizer.eos_id])
    assert len(text) > 20
    assert text in document.text


def test_the_way_of_a_token_is_printed(made, capsys):
    root, _, config = made
    assert main(["trace", str(config), "--step", "2", "--json"]) == 0
    step = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for source, told in (("code", f"{root}/raw/m"), ("web", "the lineage does not name it")):
        record = next(record for record in step if record["source"] == source)
        column = str(record["first_column"])
        arguments = ["--step", "2", "--sequence", str(record["sequence"]), "--column", column]
        assert main(["trace", str(config), *arguments]) == 0
        shown = capsys.readouterr().out
        assert told in next(line for line in shown.splitlines() if line.startswith("source file"))
        assert f"column {column} of sequence {record['sequence']:,} in step 2" in shown


def test_a_sequence_or_column_that_is_not_there_is_told(made, capsys):
    _, _, config = made
    assert main(["trace", str(config), "--step", "2", "--sequence", "0"]) == 2
    assert "is not in step 2" in capsys.readouterr().err
    assert main(["trace", str(config), "--step", "1", "--sequence", "0", "--column", "99"]) == 2
    assert "give a column from 0 to 31" in capsys.readouterr().err


def test_a_source_that_was_curated_anew_leads_to_the_file_of_the_shards(made, capsys):
    root, _, config = made
    (root / "moved").mkdir()
    for file in (root / "raw").iterdir():
        (root / "moved" / file.name).write_text(f"{file.read_text()}\nx = 1\n")
    curate_code(root, root / "moved")
    assert main(["trace", str(config), "--step", "2", "--json"]) == 0
    step = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    record = next(record for record in step if record["source"] == "code")
    place = ["--sequence", str(record["sequence"]), "--column", str(record["first_column"])]
    assert main(["trace", str(config), "--step", "2", *place, "--json"]) == 0
    origin = json.loads(capsys.readouterr().out)["origin"]
    assert origin["place"].startswith(f"{root}/raw/m")
    assert origin["state"] == "unchanged"
