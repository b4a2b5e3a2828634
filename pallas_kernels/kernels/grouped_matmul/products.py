"""What the kernels of all devices share: the kinds of products, their keys in the tables, gathered rows."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tables
from pallas_kernels.target import current


def kind(weights: int, transpose_w: bool) -> str:
    """The kind of a product with this many weights; that of the gradient of the weights is "dw"."""
    return "gated" if weights > 1 else "product_t" if transpose_w else "product"


def shape_class(kind: str, groups: int, k: int, n: int) -> str:
    """Key of the tables of block sizes; `kind` is "product", "product_t" (with `transpose_w`), "gated" or "dw"."""
    return f"{kind}/groups{groups}/{k}x{n}"


def recorded(operation: str, config: type, kind: str, groups: int, k: int, n: int) -> Any:
    """The recorded block sizes on the current target as a `config`; None where there are none."""
    found = tables.lookup(operation, current().family, shape_class(kind, groups, k, n))
    return config(**found) if found else None


def take(x: jax.Array, rows: jax.Array | None) -> jax.Array:
    """x, or x[rows] where rows past the groups may have any index."""
    return x if rows is None else jnp.take(x, rows, axis=0, mode="clip")
