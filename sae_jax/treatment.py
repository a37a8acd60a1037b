"""Input treatment: what is done to rows before the SAE sees them, and how to undo it.

`none`; `standardise`, each row on its own, as the Top-AFA authors' code does; and
`scale`, one constant for the whole dataset, so that rows have a norm of sqrt(D) on
average. Loss, codes and biases live in the treated space.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Treatment = Literal["none", "standardise", "scale"]


class Undo(NamedTuple):
    """Maps treated rows back: `rows * factor + shift`."""

    factor: Float[Array, "#B 1"]
    shift: Float[Array, "#B 1"]

    def __call__(self, rows: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """The rows in the units that the input came in."""
        return rows * self.factor + self.shift


def standardise(x: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], Undo]:
    """`(x - mean) / (std + 1e-5)` over the width of each row, std unbiased.

    Undone by `rows * std + mean`, without the 1e-5, as in the Top-AFA authors' code.
    """
    mean = x.mean(1, keepdims=True)
    variance = x.var(1, keepdims=True, ddof=1)
    flat = variance == 0  # where the root has no gradient
    std = jnp.where(flat, 0, jnp.sqrt(jnp.where(flat, 1, variance)))
    return (x - mean) / (std + 1e-5), Undo(std, mean)


def scale(
    x: Float[Array, "B D"], constant: Float[Array, ""]
) -> tuple[Float[Array, "B D"], Undo]:
    """`x * constant`."""
    zero = jnp.zeros((1, 1), x.dtype)
    return x * constant, Undo(zero + 1 / constant, zero)


def no_treatment(x: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], Undo]:
    """`x` itself."""
    zero = jnp.zeros((1, 1), x.dtype)
    return x, Undo(zero + 1, zero)


def estimate_scale(sample: Float[Array, "B D"]) -> Float[Array, ""]:
    """The constant that brings the mean norm of the sample's rows to sqrt(D)."""
    mean_norm = jnp.linalg.norm(sample, axis=1).mean()
    return jnp.sqrt(sample.shape[1]).astype(sample.dtype) / mean_norm
