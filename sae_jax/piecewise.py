"""Functions of rows or of columns, applied to some of them at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

HALVINGS = 4  # of a row before it is summed; fewer or more take longer


def by_rows(fn: Callable, at_once: int, *arrays: Array) -> Any:
    """`fn(*arrays)` for a function of rows; on a CPU so many of them at a time.

    What `fn` makes on its way then stays in the cache, and never exists for all rows.
    """
    return _in_parts(fn, at_once, arrays, 0)


def by_columns(fn: Callable, at_once: int, *arrays: Array) -> Any:
    """Likewise along the last axis of each array; results have it in front."""
    return _in_parts(fn, at_once, arrays, -1)


def in_place(fn: Callable, at_once: int, array: Array) -> Array:
    """Replaces so many rows at a time by `fn(rows, start)`, in the array's memory."""

    def some(array: Array, start: Array | int, n: int) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(array, start, n)
        return jax.lax.dynamic_update_slice_in_dim(array, fn(rows, start), start, 0)

    n_all = array.shape[0]
    n = min(at_once, n_all)
    array = jax.lax.fori_loop(
        0, n_all // n, lambda i, array: some(array, i * n, n), array
    )
    rest = n_all % n
    return some(array, n_all - rest, rest) if rest else array


def row_sums(x: Array) -> Array:
    """Sums along the last axis, of what is made of arrays and never written down.

    Halves are added first, which XLA does in one pass with what `x` is made of. For a
    sum over whole rows (of YNN, on CPUs) it would write `x` down: twice the time.
    """
    for _ in range(HALVINGS):
        half = x.shape[-1] // 2
        if x.shape[-1] % 32 == 0:  # halves of whole vectors
            x = x[..., :half] + x[..., half:]
    return x.sum(-1)


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
