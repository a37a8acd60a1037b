"""Where the parameters of an SAE start."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Start = Literal["zeros", "mean", "geometric_median"]


def matrices(
    key: Array, d_in: int, n_features: int, d_out: int, dtype: Any
) -> tuple[Float[Array, "F D_in"], Float[Array, "F D_out"]]:
    """Encoder and decoder: the same random rows of norm 1.

    Where the widths differ, as in some transcoders, the encoder has random rows of its
    own.
    """
    key_dec, key_enc = jax.random.split(key)
    W_dec = _unit_rows(key_dec, (n_features, d_out), dtype)
    if d_in == d_out:
        return W_dec, W_dec
    return _unit_rows(key_enc, (n_features, d_in), dtype), W_dec


def _unit_rows(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    rows = jax.random.normal(key, shape, dtype)
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def centre(how: Start, sample: Float[Array, "B D"]) -> Float[Array, " D"]:
    """The decoder bias: nothing, or the middle of a sample."""
    if how == "mean":
        return sample.mean(0)
    if how == "geometric_median":
        return geometric_median(sample)
    return jnp.zeros(sample.shape[1], sample.dtype)


def geometric_median(
    sample: Float[Array, "B D"], iterations: int = 100
) -> Float[Array, " D"]:
    """The point with the least summed distance to the rows (Weiszfeld's iteration)."""
    point = sample.mean(0)
    for _ in range(iterations):
        distance = jnp.linalg.norm(sample - point, axis=1)
        weight = 1 / jnp.maximum(distance, 1e-8)
        point = (weight[:, None] * sample).sum(0) / weight.sum()
    return point
