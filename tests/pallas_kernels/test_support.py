"""Which functions `supported` can be asked about."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import ArgumentError, load_balancing_loss, rms_norm, support, supported


@pytest.mark.parametrize(
    "function", [load_balancing_loss, jnp.sin, functools.partial(rms_norm, eps=0.1), np.ones(3), None]
)
def test_what_has_no_backend_is_refused_with_the_names_of_those_that_do(function):
    with pytest.raises(ArgumentError, match=r"`function` is .*give one of attention, .*rms_norm, .*swiglu") as caught:
        supported(function, jnp.ones((2, 2)))
    assert caught.value.argument == "function"
    assert len(str(caught.value).splitlines()) == 1


def test_every_public_function_with_a_backend_can_be_asked_about():
    others = {"load_balancing_loss", "router_z_loss", "supported"}
    public = {name for name in pallas_kernels.__all__ if name.islower()} - others
    assert {function.__name__ for function in support.FUNCTIONS} == public
