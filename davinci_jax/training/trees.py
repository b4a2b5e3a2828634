"""Pytrees as checkpoints see them: abstract, and as nested dicts by path."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def abstract(make: Callable[[], Any]) -> Any:
    """Returns shapes, dtypes and shardings on the current mesh of what `make` would return, computing nothing."""
    mesh = jax.sharding.get_mesh()

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A scalar made of constants has no sharding in its type; it lies whole on every device.
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, jax.eval_shape(make))


def nested(tree: Any) -> dict[str, Any]:
    """Returns the arrays of any pytree as nested dicts by their path: a file layout that needs no class of ours."""
    result: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, name = _names(path)
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return result


def unnested(like: Any, tree: dict[str, Any]) -> Any:
    """Returns the arrays of nested dicts in the structure of `like`."""

    def find(path: tuple, _: Any) -> Any:
        node = tree
        for name in _names(path):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(find, like)


def describe(tree: Any) -> dict[str, str]:
    """Returns path -> dtype and shape, in words."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_names(path)): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def steps_on_disk(directory: pathlib.Path) -> list[int]:
    """Returns the steps that have a folder, finished or not, oldest first."""
    return sorted(int(path.name) for path in directory.iterdir() if path.is_dir() and path.name.isdigit())


def _names(path: tuple) -> list[str]:
    keys = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path)
    return [str(key) for key in keys]
