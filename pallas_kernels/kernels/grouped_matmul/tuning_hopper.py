"""What the tuner needs to know of the Hopper kernels, for which only a device gives times."""

import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.kernels.grouped_matmul import hopper, tuning
from pallas_kernels.kernels.grouped_matmul.tuning import Shape, shape_class, shapes

__all__ = ["FAMILIES", "OPERATION", "arguments", "build", "candidates", "shape_class", "shapes"]

OPERATION = hopper.OPERATION
FAMILIES = ("hopper",)
BANDS = (4, 8, 16)


def candidates(family: str, shape: Shape) -> list[hopper.Config] | list[hopper.TransposedConfig]:
    """Tiles that fit into shared memory and registers, walked in bands of three heights."""
    del family
    if shape.kind == "dw":
        tiles = [{"tile_k": 128, "tile_n": 256}, {"tile_k": 256, "tile_n": 128, "stages": 3}]
        tiles += [{"tile_k": 128, "tile_n": 256, "tile_m": 128, "stages": 2}]
        found = [hopper.TransposedConfig(**tile, band=band) for tile, band in itertools.product(tiles, BANDS)]
        fitting = [config for config in found if hopper.fits(config) and shape.depth % config.tile_k == 0]
    else:
        weights = 2 if shape.kind == "gated" else 1
        tiles = [(128, 256, 4), (128, 128, 4), (128, 128, 6), (256, 128, 3), (256, 64, 3)]
        found = [hopper.Config(m, n, stages, band) for (m, n, stages), band in itertools.product(tiles, BANDS)]
        largest = max(config.tile_m * config.tile_n for config in found if hopper.fits(config, weights))
        fitting = [c for c in found if hopper.fits(c, weights) and 2 * c.tile_m * c.tile_n >= largest]
    return [config for config in fitting if shape.columns % config.tile_n == 0]


def build(family: str, shape: Shape, config: hopper.Config | hopper.TransposedConfig):
    """The function and its arguments."""
    structs = tuning.build(family, shape, config)[1]
    options = {"out_dtype": jnp.bfloat16, "config": config}
    if shape.kind == "dw":
        return functools.partial(hopper.transposed_product, **options), structs
    if shape.kind == "gated":
        return functools.partial(hopper.gated_product, keep=True, **options), structs
    return functools.partial(hopper.product, transpose_w=shape.kind == "product_t", **options), structs


def arguments(family: str, shape: Shape, config: hopper.Config | hopper.TransposedConfig) -> list[jax.Array]:
    """Random numbers, and sizes of groups as a nearly balanced router gives them."""
    return tuning.arguments(family, shape, config)
