"""Cases for the kernels of all devices, and how their routing is compared with the reference."""

import numpy as np

from pallas_kernels.kernels.routing import Routing

EXPERTS = 16
CASES = {
    "softmax": {"top_k": 2},
    "raw weights": {"top_k": 2, "normalize": False, "scale": 2.5},
    "groups, bias": {"top_k": 2, "score": "sigmoid", "bias": True, "groups": (2, 1)},
    "threshold that some reach": {"top_k": 3, "score": "sigmoid", "threshold": 0.6},
    "threshold that none reach": {"top_k": 1, "threshold": 2.0},
    "capacity": {"top_k": 2, "score": "sigmoid", "capacity": 3},
    "all experts": {"top_k": EXPERTS},
}


def inputs(seed, tokens, options):
    """Logits, some of them equal, and the options with a bias in place of True."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal((tokens, EXPERTS)) * 2, 1).astype(np.float32)
    options = dict(options)
    if options.get("bias"):
        options["bias"] = (rng.standard_normal(EXPERTS) * 0.2).astype(np.float32)
    return logits, options


def compare(routing, expected):
    for name, got, expects in zip(Routing._fields, routing, expected, strict=True):
        if name in ("weights", "scores"):
            np.testing.assert_allclose(got, expects, atol=3e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(got, expects, err_msg=name)


def undefined():
    """A token with a NaN, one with no finite logit, and options; `softmax` makes NaN of the whole row."""
    logits = np.random.default_rng(5).standard_normal((70, EXPERTS)).astype(np.float32)
    logits[3, 5], logits[7] = np.nan, -np.inf
    return logits, {"top_k": 2, "threshold": 1e-6}


def check_undefined(routing):
    """The order is still one of all assignments, and weights show where a score was undefined."""
    everything = np.arange(routing.permutation.shape[0])
    np.testing.assert_array_equal(np.sort(routing.permutation), everything)
    np.testing.assert_array_equal(np.asarray(routing.permutation)[np.asarray(routing.inverse)], everything)
    np.testing.assert_array_equal(np.isnan(routing.weights).any(axis=1), np.isin(np.arange(70), (3, 7)))


def equal_groups():
    """Two groups whose two largest have the same sum, exactly; the second has the largest of all."""
    bias = np.repeat(np.float32(-0.5), EXPERTS)
    bias[[0, 1, EXPERTS // 2, EXPERTS // 2 + 1]] = 0.0, 0.0, 0.25, -0.25
    logits = np.zeros((8, EXPERTS), np.float32)
    return logits, {"top_k": 2, "score": "sigmoid", "bias": bias, "groups": (2, 1)}
