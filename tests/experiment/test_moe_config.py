"""A mixture of experts that cannot be is refused in one line that names the field."""

import pytest

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import ModelConfig, Moe

SIZES = {"experts": 8, "experts_per_token": 2, "expert_size": 16}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"experts": 0}, "model.moe.experts = 0"),
        ({"experts_per_token": 9}, "model.moe.experts_per_token = 9: is more than the 8 experts; choose at most 8"),
        ({"expert_size": -1}, "model.moe.expert_size = -1"),
        ({"shared_size": -1}, "model.moe.shared_size = -1"),
        ({"score": "sigmoids"}, "did you mean 'sigmoid'?"),
        ({"groups": 3}, "model.moe.groups = 3: does not divide experts = 8"),
        ({"groups_kept": 2}, "model.moe.groups_kept = 2: is more than groups = 1"),
        ({"groups": 8, "groups_kept": 1}, "is more than the 1 experts in 1 of 8 groups"),
        ({"threshold": 1.5}, "model.moe.threshold = 1.5"),
        ({"scale": 0}, "model.moe.scale = 0"),
        ({"bias_rate": -0.1}, "model.moe.bias_rate = -0.1"),
        ({"aux_loss": float("nan")}, "model.moe.aux_loss = nan"),
        ({"router_z_loss": 2}, "model.moe.router_z_loss = 2"),
        ({"capacity": 0}, "model.moe.capacity = 0"),
    ],
)
def test_refused(change, told):
    with pytest.raises(ConfigError) as caught:
        Moe(**{**SIZES, **change})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_keeps_a_block_with_experts():
    sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 1, "num_kv_heads": 1, "head_size": 8, "mlp_size": 8}
    sizes |= {"vocab_size": 8}
    assert ModelConfig(**sizes, moe=Moe(**SIZES, first_dense=1)).moe.first_dense == 1
    with pytest.raises(ConfigError, match=r"model.moe.first_dense = 2: leaves no block of num_layers = 2"):
        ModelConfig(**sizes, moe=Moe(**SIZES, first_dense=2))
