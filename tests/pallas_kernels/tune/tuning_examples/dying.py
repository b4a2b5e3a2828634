"""The products, with a config that ends the process as a failed check inside the compiler does."""

import os

from tuning_examples.products.tuning import OPERATION, Config, Shape, candidates, shape_class, shapes
from tuning_examples.products.tuning import build as build_product

__all__ = ["OPERATION", "Config", "Shape", "build", "candidates", "shape_class", "shapes"]


def build(family, shape, config):
    if config.rows == 0:
        os.abort()
    return build_product(family, shape, config)
