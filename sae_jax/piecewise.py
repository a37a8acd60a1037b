"""Functions of rows, applied to some rows at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def by_rows(fn: Callable, at_once: int, *arrays: Array) -> Any:
    """`fn(*arrays)` for a function of rows; on a CPU so many of them at a time.

    What `fn` makes on its way then stays in the cache, and never exists for all rows.
    """
    n_rows = arrays[0].shape[0]
    if n_rows <= at_once or jax.default_backend() != "cpu":
        return fn(*arrays)

    def some(start: Array | int, n: int) -> Any:
        return fn(*(jax.lax.dynamic_slice_in_dim(a, start, n) for a in arrays))

    whole = n_rows // at_once * at_once
    starts = jnp.arange(0, whole, at_once)
    found = jax.lax.map(lambda start: some(start, at_once), starts)
    found = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), found)
    if whole == n_rows:
        return found
    rest = some(whole, n_rows - whole)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), found, rest)
