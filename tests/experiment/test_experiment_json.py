"""Experiments as JSON and back, and their fingerprint."""

import dataclasses
import functools
import json
import operator
import typing

import pytest
from experiments import small

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import (
    Experiment,
    apply_overrides,
    fingerprint,
    from_json,
    identity,
    resolve,
    to_dict,
    to_json,
)


def count_fields(kind: type) -> int:
    """Counts the fields that a person can set, each dataclass once."""
    seen, kinds = {}, [kind]
    while kinds:
        current = kinds.pop()
        names = [field.name for field in dataclasses.fields(current)]
        children = [found for field in dataclasses.fields(current) for found in dataclasses_in(current, field.name)]
        seen[current] = len(names)
        kinds += [child for child in children if child not in seen]
    return sum(seen.values())


def dataclasses_in(kind: type, field: str) -> list[type]:
    found, hints = [], [typing.get_type_hints(kind)[field]]
    while hints:
        hint = hints.pop()
        if dataclasses.is_dataclass(hint):
            found.append(hint)
        hints += typing.get_args(hint)
    return found


def test_fewer_than_120_fields():
    assert 60 < count_fields(Experiment) < 120


def test_round_trip():
    experiment = resolve(small())
    assert from_json(to_json(experiment)) == experiment
    assert isinstance(from_json(to_json(experiment)).data.sources[0].tokens, float)


def test_numbers_written_as_integers_are_the_same_experiment():
    written, read = small(), from_json(to_json(small()))
    assert isinstance(written.data.sources[0].tokens, int)
    assert fingerprint(written) == fingerprint(read)
    assert identity(written) == identity(read)


DELETE = object()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.hiden_size", 3, r"model\.hiden_size: is an unknown field; did you mean 'hidden_size'"),
        ("data.sources.1.levle", "L2", r"data\.sources\.books\.levle: is an unknown field; did you mean 'level'"),
        ("curriculum", DELETE, r"curriculum: is missing; Experiment needs it"),
        ("curriculum.0.tokens", DELETE, r"curriculum\.1\.tokens: is missing; Stage needs it"),
        ("run.seed", "1", r"run\.seed = '1': is not a whole number"),
        ("run.seed", 1.5, r"run\.seed = 1\.5: is not a whole number"),
        ("run.seed", True, r"run\.seed = True: is not a whole number"),
        ("run.seed", None, r"run\.seed: cannot be unset"),
        ("run.tensorboard", 1, r"run\.tensorboard = 1: is not true or false"),
        ("model.norm_eps", "tiny", r"model\.norm_eps = 'tiny': is not a number"),
        ("run.name", 7, r"run\.name = 7: is not text"),
        ("data.sources", {}, r"data\.sources = {}: is not a list"),
        ("data.sources", [], r"data\.sources = \(\): is empty"),
        ("curriculum", [], r"curriculum = \(\): has no stage"),
        ("curriculum.0.mixture", [1], r"curriculum\.1\.mixture = \[1\]: is not an object"),
        ("model", 3, r"model = 3: is no ModelConfig"),
        ("curriculum.0.tokens", float("nan"), r"curriculum\[1\]\.tokens = nan: must be above 0"),
        ("curriculum.0.tokens", float("inf"), r"curriculum\[1\]\.tokens = inf: must be above 0 and finite"),
        ("curriculum.0.mixture", {"Genral": 1}, r"'Genral': is no domain of the sources; did you mean 'General'"),
        ("curriculum.0.mixture", {"QA": 1}, r"'QA': has no source in this stage"),
        ("curriculum.0.mixture", {"General": -1}, r"mixture\.General = -1\.0: must be at least 0"),
        ("curriculum.0.mixture", {"General": 0}, r"mixture = {'General': 0\.0}: adds up to nothing"),
        ("curriculum.0.batch.0.steps", None, r"curriculum\[1\]\.batch\.steps: only the last piece may leave out"),
        ("curriculum.0.batch.1.steps", 3, r"curriculum\[1\]\.batch\.steps = 3: the last piece lasts to the end"),
        ("curriculum.0.learning_rate.final", 0, r"learning_rate\.final = 0\.0: does nothing with a constant shape"),
        ("curriculum.0.learning_rate.decay", 0.5, r"curriculum\.1\.learning_rate\.decay = 0\.5: does nothing with"),
        (
            "curriculum.0.learning_rate",
            {"peak": 1e-3, "warmup_from": 1e-5},
            r"curriculum\.1\.learning_rate\.warmup_from = 1e-05: does not",
        ),
        ("curriculum.1.batch.0.size", "x", r"curriculum\.2\.batch\.0\.size = 'x': is not a whole number"),
        ("curriculum.1.batch.0.size", 0, r"curriculum\.2\.batch\.size = 0: must be above 0"),
        ("data.sources.0.tokens", "x", r"data\.sources\.web\.tokens = 'x': is not a number"),
        ("curriculum.0.learning_rate.shape", "wsd", r"learning_rate\.final: is needed by the shape 'wsd'"),
        ("data.sources.2.stages", ["3"], r"data\.sources\[pairs\]\.stages = '3': is no stage"),
        ("data.sources.0.name", "a.b", r"cannot be a folder and part of a dotted name"),
        ("data.sources.0.name", "..", r"cannot be a folder"),
        ("data.sources.0.level", "L10", r"level = 'L10': is not one of .*; did you mean 'L1'"),
        ("run.name", "../x", r"run\.name = '\.\./x': cannot be a folder name"),
        ("data.sources.1.name", "web", r"data\.sources = 'web': is named twice"),
        ("data.sources.1.weight", 2, r"data\.sources\.weight = 'General': is given for some"),
        ("curriculum.1.name", "1", r"curriculum\.name = '1': is used by two stages"),
        ("data.sequence_length", 8192, r"data\.sequence_length = 8192: is longer than"),
        ("model.num_kv_heads", 3, r"model\.num_kv_heads = 3: does not divide"),
        ("checkpoint.every_steps", 3, r"checkpoint\.keep_every = 5000: is no multiple"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_field(field, value, message):
    tree = json.loads(to_json(small()))
    *path, last = [int(part) if part.isdigit() else part for part in field.split(".")]
    place = functools.reduce(operator.getitem, path, tree)
    if value is DELETE:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(ConfigError, match=message) as caught:
        from_json(json.dumps(tree))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_json_that_is_no_experiment(text):
    with pytest.raises(ConfigError, match="is no Experiment"):
        from_json(text)


def test_text_that_is_no_json():
    with pytest.raises(ConfigError, match=r"x\.json: is not JSON"):
        from_json("{", "x.json")


# Another value for every field of the small experiment, and whether the run then computes something else.
ELSEWHERE = [
    "run.name=other", "run.directory=/tmp/x", "run.micro_batch=2", "run.log_every_steps=3", "run.tensorboard=false",
    "run.peak_flops=1e12", "run.watchdog_seconds=5", "model.remat=none", "model.loss_chunk=64", "data.root=/mnt",
    "data.tokenizer=/mnt/tokenizer.json", "data.workers=2", "data.prefetch=5", "data.sources.web.path=/mnt/web",
    "data.sources.web.documents=/mnt/documents", "data.sources.web.max_epochs=9", "mesh.replica=2", "mesh.fsdp=4",
    "evaluation.every_steps=7", "evaluation.tokens=9", "checkpoint.every_steps=500", "checkpoint.keep_last=9",
    "checkpoint.keep_every=none",
]  # fmt: skip
OTHERWISE = [
    "run.seed=1", "model.vocab_size=65", "model.hidden_size=16", "model.num_layers=2", "model.num_heads=4",
    "model.num_kv_heads=2", "model.head_size=8", "model.mlp_size=32", "model.max_positions=64", "model.rope_base=5",
    'model.rope_scaling={"factor":8}', "model.norm_eps=1e-5", "model.qkv_bias=false", "model.tied_embeddings=false",
    "model.qk_norm=true", 'model.moe={"experts":4,"experts_per_token":2,"expert_size":8}',
    "model.init_std=0.1", "model.compute_dtype=float32", "model.z_loss=0.1", "data.sequence_length=16",
    "data.packing=best_fit", "data.heldout=0.1", "data.sources.web.name=net", "data.sources.web.level=L4",
    "data.sources.web.tokens=7", 'data.sources.web.stages=["1"]', "data.sources.General.weight=1",
    "data.sources.web.loss=answers", "curriculum.1.name=first", "curriculum.1.tokens=900",
    "curriculum.1.batch.0.size=4", "curriculum.1.batch.0.steps=4", "curriculum.1.learning_rate.peak=2",
    'curriculum.1.learning_rate={"peak":1e-3,"shape":"cosine","final":0}',
    'curriculum.1.learning_rate={"peak":1e-3,"shape":"wsd","final":0,"decay":0.5}',
    'curriculum.1.learning_rate={"peak":1e-3,"warmup_steps":2,"warmup_from":1e-4}', "curriculum.2.mixture.QA=60",
    "curriculum.1.learning_rate.warmup_steps=1", "optimizer.name=muon", "optimizer.beta1=0.8", "optimizer.beta2=0.9",
    "optimizer.eps=1e-7", "optimizer.weight_decay=0", "optimizer.clip_norm=none", "optimizer.muon_momentum=0.9",
    "optimizer.muon_steps=6", "optimizer.muon_rms=0.3",
]  # fmt: skip


@pytest.mark.parametrize("override", ELSEWHERE)
def test_fingerprint_stays_where_the_run_computes_the_same(override):
    changed = apply_overrides(small(), [override])
    assert to_dict(changed) != to_dict(resolve(small()))
    assert fingerprint(changed) == fingerprint(small())


@pytest.mark.parametrize("override", OTHERWISE)
def test_fingerprint_changes_with_what_the_run_computes(override):
    assert fingerprint(apply_overrides(small(), [override])) != fingerprint(small())


def test_every_field_is_known_to_be_one_or_the_other():
    covered = {override.partition("=")[0] for override in ELSEWHERE + OTHERWISE}
    sections = {name for name in to_dict(small()) if name not in ("data", "curriculum")}
    fields = {f"{section}.{name}" for section in sections for name in to_dict(small())[section]}
    fields |= {f"data.{name}" for name in to_dict(small().data) if name != "sources"}
    assert fields <= covered
    sources = {name for field in covered if field.startswith("data.sources.") for name in [field.rpartition(".")[2]]}
    assert sources | {"domain"} == set(to_dict(small().data.sources[0]))
