"""Codes to start a factorisation with: all of them 0 or more.

A code of 0 stays 0 under the multiplicative update, so that zeros are filled.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Start = Literal["random", "svd", "kmeans"]
LLOYD = 10  # rounds of the clustering
SMEAR = 0.2  # added to its indicators, as in Ding, Li, Jordan 2010


def random(key: Array, x: Float[Array, "T N"], k: int) -> Float[Array, "T k"]:
    """Uniform from 0 to 1."""
    return jax.random.uniform(key, (len(x), k), x.dtype)


def svd(key: Array, x: Float[Array, "T N"], k: int) -> Float[Array, "T k"]:
    """Left singular vectors, of each the heavier sign; zeros become the mean.

    As in NNDSVDa (Boutsidis, Gallopoulos 2008), for one of its two factors.
    """
    _, right = jnp.linalg.eigh(x.T @ x)
    left = x @ right[:, : -k - 1 : -1]
    heavier = jnp.square(jnp.maximum(left, 0)).sum(0)
    left *= jnp.where(2 * heavier < jnp.square(left).sum(0), -1, 1)
    left = jnp.maximum(left, 0)
    return jnp.where(left > 0, left, left.mean())


def kmeans(key: Array, x: Float[Array, "T N"], k: int) -> Float[Array, "T k"]:
    """Indicators of clusters, which begin at rows drawn by lot."""
    centres = x[jax.random.choice(key, len(x), (k,), replace=False)]

    def member(centres: Array) -> Array:
        distance = jnp.square(centres).sum(1) - 2 * x @ centres.T
        return jax.nn.one_hot(distance.argmin(1), k, dtype=x.dtype)

    def moved(_: Array, centres: Array) -> Array:
        of = member(centres)
        n = of.sum(0)[:, None]
        return jnp.where(n > 0, of.T @ x / jnp.maximum(n, 1), centres)

    return member(jax.lax.fori_loop(0, LLOYD, moved, centres)) + SMEAR


STARTS: dict[str, Callable[[Array, Array, int], Array]] = {
    "random": random,
    "svd": svd,
    "kmeans": kmeans,
}


def most(start: Start, shape: tuple[int, int], k: int) -> int:
    """The most groups that there can be with a start."""
    return {"random": k, "svd": min(shape), "kmeans": shape[0]}[start]
