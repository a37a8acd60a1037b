"""Functions of rows or of columns, applied to some of them at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def by_rows(fn: Callable, at_once: int, *arrays: Array) -> Any:
    """`fn(*arrays)` for a function of rows; on a CPU so many of them at a time.

    What `fn` makes on its way then stays in the cache, and never exists for all rows.
    """
    return _in_parts(fn, at_once, arrays, 0)


def by_columns(fn: Callable, at_once: int, *arrays: Array) -> Any:
    """Likewise along the last axis of each array; results have it in front."""
    return _in_parts(fn, at_once, arrays, -1)


def _in_parts(fn: Callable, at_once: int, arrays: tuple[Array, ...], axis: int) -> Any:
    n_all = arrays[0].shape[axis]
    if n_all <= at_once or jax.default_backend() != "cpu":
        return fn(*arrays)

    def some(start: Array | int, n: int) -> Any:
        return fn(
            *(jax.lax.dynamic_slice_in_dim(a, start, n, axis=axis) for a in arrays)
        )

    whole = n_all // at_once * at_once
    starts = jnp.arange(0, whole, at_once)
    found = jax.lax.map(lambda start: some(start, at_once), starts)
    found = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), found)
    if whole == n_all:
        return found
    rest = some(whole, n_all - whole)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), found, rest)
