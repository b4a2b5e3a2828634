"""Errors that a user can mend."""

import pickle

import pytest

from davinci_jax.errors import CheckpointError, ConfigError, DataError, TrainingError, nearest


@pytest.mark.parametrize("kind", [CheckpointError, ConfigError, DataError, TrainingError])
def test_travel_between_processes(kind):
    error = kind("model.num_heads", 3, "does not divide", "choose a divisor")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) == "model.num_heads = 3: does not divide; choose a divisor"
    assert copy.value == 3


def test_nearest_offers_one_name_or_all():
    assert nearest("num_layer", ["num_layers", "num_heads"]) == "did you mean 'num_layers'?"
    assert nearest("max_steps", ["log_every_steps", "seed"]) == "known names: log_every_steps, seed"
    assert nearest("zzz", ["b", "a"]) == "known names: a, b"
