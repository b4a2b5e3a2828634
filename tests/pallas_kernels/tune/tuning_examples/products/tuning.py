"""A product of square matrices, by the rows of a block: fewer blocks take fewer cycles; one size does not compile."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

OPERATION = "example_product"


@dataclasses.dataclass(frozen=True)
class Shape:
    size: int


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int
    repeats: int = 1


def shapes():
    return {"small": Shape(256), "large": Shape(512)}


def candidates(family, shape):
    return [Config(rows=8), Config(rows=shape.size), Config(rows=64), Config(rows=100)]


def build(family, shape, config):
    if shape.size % config.rows:
        raise ValueError(f"rows of {config.rows} do not divide {shape.size}\nand a second line")
    struct = jax.ShapeDtypeStruct((shape.size, shape.size), jnp.float32)
    return (lambda x, w: _product(x, w, config)), [struct, struct]


def shape_class(shape):
    return f"square/{shape.size}"


def _product(x, w, config):
    def kernel(x, w, out):
        out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    size = x.shape[0]
    return pl.pallas_call(
        kernel,
        grid=(size // config.rows,),
        in_specs=[pl.BlockSpec((config.rows, size), lambda i: (i, 0)), pl.BlockSpec((size, size), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((config.rows, size), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        name="product",
    )(x, w)
