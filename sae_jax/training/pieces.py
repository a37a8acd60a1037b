"""Gradients of a batch taken piece by piece, for batches too large for memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import checks
from sae_jax.training.sums import grown

Seen = dict[str, Array]


def number_fault(n: int) -> str | None:
    """What is wrong with such a number of pieces."""
    if n == 0:
        return "accumulate=0 takes no rows; 1: whole batches."
    return checks.value_fault("accumulate", n, int)


def fault(n_rows: int, n: int) -> str | None:
    """What is wrong with taking so many rows in n pieces."""
    if n_rows % n == 0:
        return None
    return (
        f"accumulate={n} must divide the rows of a batch, {n_rows}: pieces are of one "
        f"size."
    )


def value_and_gradients(
    loss: Callable,
    n: int,
    axis: str | None,
    params: Any,
    carried: Any,
    batch: Any,
    *,
    late: Callable | None = None,
) -> tuple[tuple[Seen, Any, Any, Float[Array, " n"]], Any]:
    """Gradients of the mean loss over a batch, of which 1/n exists at a time.

    Piece i has the rows i, i + n, i + 2n, ...: where rows are spread over devices, each
    keeps its own. A piece counts by its share of the valid rows.

    Args:
      loss: `(params, carried, batch, i) -> loss, (carried, seen, stacked, left)`.
      n: number of pieces.
      axis: of `pmap`, whose devices have more pieces; what is carried stays theirs.
      params: what gradients are taken of.
      carried: what each piece gives the next.
      batch: arrays of rows; valid ones have a true `mask`, where there is one.
      late: `(seen, grads, params, left, share) -> seen, grads`, adds to those of a
        piece a loss that comes after the others.

    Returns:
      `(seen, carried, stacked, shares)`, the mean of `seen` (and of the loss, by that
      name), the last `carried`, all pieces' `stacked` and their shares; gradients.
    """
    shares = shares_of(batch, n, axis)

    def scaled(params: Any, carried: Any, i: Array) -> Any:
        value, (carried, seen, stacked, left) = loss(
            params, carried, piece(batch, n, i), i
        )
        seen = {"loss": value, **seen}
        seen = {name: v * shares[i].astype(v.dtype) for name, v in seen.items()}
        return seen["loss"], (seen, carried, stacked, left)

    gradients = jax.grad(scaled, has_aux=True)
    if n == 1:
        grads, found = gradients(params, carried, jnp.int32(0))
        seen, carried, stacked, left = found
        if late is not None:
            seen, grads = late(seen, grads, params, left, shares[0])
        stacked = jax.tree.map(lambda a: a[None], stacked)
        return summed(axis, seen, grads, carried, (stacked, shares))

    def add(sums: Any, i: Array) -> Any:
        (seen, grads), carried = sums
        grads, found = grown(gradients, grads, params, carried, i)
        own, carried, stacked, left = found
        if late is not None:
            own, grads = late(own, grads, params, left, shares[i])
        return ((jax.tree.map(jnp.add, seen, own), grads), carried), stacked

    like = jax.eval_shape(gradients, params, carried, jnp.int32(0))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (like[1][0], like[0]))
    sums = jax.lax.scan(add, (zeros, carried), jnp.arange(n))
    ((seen, grads), carried), stacked = sums
    return summed(axis, seen, grads, carried, (stacked, shares))


def summed(axis: str | None, seen: Any, grads: Any, carried: Any, each: Any) -> Any:
    """What `value_and_gradients` returns, with the pieces of all devices in it."""
    if axis is not None:
        seen, grads = jax.lax.psum((seen, grads), axis)
        each = jax.lax.all_gather(each, axis, tiled=True)
    stacked, shares = each
    return (seen, carried, stacked, shares), grads


def anywhere(found: Array, axis: str | None) -> Array:
    """Whether it is so on any device of an axis."""
    return found if axis is None else jax.lax.pmax(found, axis)


def piece(batch: Any, n: int, i: Array) -> Any:
    """Of the rows of a batch those of its i-th piece."""
    return jax.tree.map(lambda a: a.reshape(-1, n, *a.shape[1:])[:, i], batch)


def shares_of(batch: Any, n: int, axis: str | None) -> Float[Array, " n"]:
    """The share of the valid rows that is in each piece."""
    if "mask" not in batch:
        return jnp.full(n, 1 / (n * jax.lax.axis_size(axis) if axis else n))
    valid = batch["mask"].reshape(-1, n).sum(0)
    total = jax.lax.psum(valid.sum(), axis) if axis else valid.sum()
    return valid / jnp.maximum(total, 1)
