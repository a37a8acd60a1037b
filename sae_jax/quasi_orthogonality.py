"""Approximate feature activation: what the length of a vector says of its code.

Lee, Davies, Canby, Hockenmaier 2025, arXiv:2503.24277. For `z = f @ V` with unit rows
in V whose cosines are at most eps in size,

    ||z||^2 = ||f||^2 + cross term,  |cross term| <= eps * (||f||_1^2 - ||f||_2^2),

so ||f|| is known from ||z|| up to a closed-form error, without knowing f.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def cross_term_bound(
    codes: Float[Array, "B F"], epsilon: float | Float[Array, ""]
) -> Float[Array, " B"]:
    """The largest `| ||z||^2 - ||f||^2 |` that an eps-quasi-orthogonal V allows."""
    l1, squares = jnp.abs(codes).sum(1), jnp.square(codes).sum(1)
    return epsilon * (jnp.square(l1) - squares)


def scaled_norm(
    codes: Float[Array, "B F"],
    W_dec: Float[Array, "F D"],
    b_dec: Float[Array, " D"] | None = None,
) -> Float[Array, " B"]:
    """The norm of the code of unit decoder rows: `f_j * ||d_j||` for each feature.

    With `b_dec` the bias counts as one more feature that is always on, as in the
    authors' evaluation, where the vector is not centred.
    """
    squares = jnp.square(codes * jnp.linalg.norm(W_dec, axis=1)).sum(1)
    if b_dec is not None:
        squares = squares + jnp.square(b_dec).sum()
    return jnp.sqrt(squares)


def epsilon_lbo(
    norm_z: Float[Array, " B"], norm_f: Float[Array, " B"], n_features: int
) -> Float[Array, " B"]:
    """The least eps for which the theorem allows this pair of norms (lower is better).

    `| ||z||^2 - ||f||^2 | / ((F - 1) ||f||^2)`, from the authors' evaluation code: F
    counts the dictionary alone, even where `norm_f` includes the bias. Infinite for an
    empty code.
    """
    z, f = jnp.square(norm_z), jnp.square(norm_f)
    return jnp.abs(z - f) / ((n_features - 1) * f)
