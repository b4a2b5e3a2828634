"""Assignments on the command line."""

import pytest
from experiments import small

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import LearningRate, RopeScaling, apply_overrides, resolve


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("run.seed=3", lambda e: e.run.seed, 3),
        ("--run.seed=3", lambda e: e.run.seed, 3),
        ("run.seed=1_000", lambda e: e.run.seed, 1000),
        ("run.seed=1e3", lambda e: e.run.seed, 1000),
        ("run.name=2024", lambda e: e.run.name, "2024"),
        ("run.name=true", lambda e: e.run.name, "true"),
        ("run.directory=a=b", lambda e: e.run.directory, "a=b"),
        ("run.directory=none", lambda e: e.run.directory, None),
        ("run.tensorboard=False", lambda e: e.run.tensorboard, False),
        ("checkpoint.keep_every=None", lambda e: e.checkpoint.keep_every, None),
        ("optimizer.clip_norm=2", lambda e: e.optimizer.clip_norm, 2.0),
        ("curriculum.2.tokens=1e9", lambda e: e.curriculum[1].tokens, 1e9),
        ("curriculum.0.tokens=64", lambda e: e.curriculum[0].tokens, 64.0),
        ("curriculum.1.batch.0.size=8", lambda e: e.curriculum[0].batch[0].size, 8),
        ("data.sources.books.level=L4", lambda e: e.data.sources[1].level, "L4"),
        ('data.sources.web.stages=["1"]', lambda e: e.data.sources[0].stages, ("1",)),
        ("data.sources.General.max_epochs=3", lambda e: [s.max_epochs for s in e.data.sources], [3.0, 3.0, 1.0]),
        ('model.rope_scaling={"factor": 8}', lambda e: e.model.rope_scaling, RopeScaling(factor=8.0)),
        (
            'curriculum.2.learning_rate={"peak":3e-5,"shape":"cosine","final":3e-6}',
            lambda e: e.curriculum[1].learning_rate,
            LearningRate(peak=3e-5, shape="cosine", final=3e-6),
        ),
    ],
)
def test_value_takes_the_type_of_its_field(override, read, value):
    result = read(apply_overrides(small(), [override]))
    assert result == value
    assert type(result) is type(value)


def test_overrides_apply_in_order_and_as_a_whole():
    # Neither of the two fields may be set alone: a constant shape has no final value, a cosine needs one.
    both = ["curriculum.1.learning_rate.shape=cosine", "curriculum.1.learning_rate.final=1e-5"]
    for overrides in (both, both[::-1]):
        rate = apply_overrides(small(), overrides).curriculum[0].learning_rate
        assert (rate.shape, rate.final) == ("cosine", 1e-5)
    assert apply_overrides(small(), ["run.seed=1", "run.seed=2"]).run.seed == 2
    whole_then_part = ['model.rope_scaling={"factor":8}', "model.rope_scaling.factor=4"]
    assert apply_overrides(small(), whole_then_part).model.rope_scaling.factor == 4


def test_a_source_named_like_a_domain_goes_first():
    renamed = apply_overrides(small(), ["data.sources.pairs.name=General", "data.sources.General.max_epochs=3"])
    assert [source.max_epochs for source in renamed.data.sources] == [1.0, 1.0, 3.0]


def test_nothing_given_changes_nothing():
    assert apply_overrides(small(), []) == resolve(small())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"override = 'seed': has no '='; write section.field=value"),
        ("runn.seed=1", r"runn\.seed: has an unknown part 'runn'; did you mean 'run'\?"),
        ("model.hiden_size=3", r"model\.hiden_size: has an unknown part 'hiden_size'; did you mean 'hidden_size'\?"),
        ("data.sources.boks.level=L2", r"unknown part 'boks'; did you mean 'books'\?"),
        ("data.sources.7.level=L2", r"unknown part '7'; known names: books, pairs, web"),
        ("curriculum.1.batch.2.size=1", r"unknown part '2'; known names: 0, 1"),
        ("run.seed.x=1", r"run\.seed\.x: has no part 'x'"),
        ("model.rope_scaling.factor=1", r"model\.rope_scaling\.factor: has no part 'factor'"),
        ("run.seed=one", r"run\.seed = 'one': is not a whole number"),
        ("run.seed=1.5", r"run\.seed = 1\.5: is not a whole number"),
        ("run.seed=", r"run\.seed = '': is not a whole number"),
        ("run.tensorboard=maybe", r"run\.tensorboard = 'maybe': is not true or false"),
        ("model.norm_eps=none", r"model\.norm_eps: cannot be unset; give a number"),
        ("data.sources=web", r"data\.sources = 'web': is not a list"),
        ("model=3", r"model = 3: is no ModelConfig"),
        ("model.remat=som", r"model\.remat = 'som': is not one of"),
        ("data.workers=-1", r"data\.workers = -1: is outside"),
    ],
)
def test_mistakes_are_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        apply_overrides(small(), [override])
    assert "\n" not in str(caught.value)
