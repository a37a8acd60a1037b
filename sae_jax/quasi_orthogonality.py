"""Approximate feature activation: what the length of a vector says of its code.

Lee, Davies, Canby, Hockenmaier 2025, arXiv:2503.24277. For `z = f @ V` with unit rows
in V whose cosines are at most eps in size, and a code f with s active features,

    ||z||^2 = ||f||^2 + cross term
    |cross term| <= eps * (||f||_1^2 - ||f||_2^2) <= eps * (s - 1) * ||f||^2

so ||f|| is known from ||z|| up to a closed-form error, without knowing f. The paper
puts s = F, the size of the dictionary. How large eps is, `coherence` measures.
"""

import math
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from sae_jax.codes import Codes, Sparse, strengths

ForAllOrEach: TypeAlias = float | Float[Array, ""] | Float[Array, " B"]


def cross_term_bound(
    codes: Codes, epsilon: float | Float[Array, ""]
) -> Float[Array, " B"]:
    """The largest `| ||z||^2 - ||f||^2 |` that an eps-quasi-orthogonal V allows."""
    values = strengths(codes)
    l1, squares = jnp.abs(values).sum(1), jnp.square(values).sum(1)
    return epsilon * (jnp.square(l1) - squares)


def scaled_norm(
    codes: Codes,
    W_dec: Float[Array, "F D"],
    b_dec: Float[Array, " D"] | None = None,
) -> Float[Array, " B"]:
    """The norm of the code of unit decoder rows: `f_j * ||d_j||` for each feature.

    Two variants are in use, each with a norm of its own to compare with:

      without `b_dec`   against ||x - b_dec||, as the activation rule of the paper
      with `b_dec`      against ||x||, not centred, as the authors' evaluation: the bias
                        counts as one more feature, always on, with value ||b_dec||
    """
    squares = jnp.square(_scaled(codes, W_dec)).sum(1)
    if b_dec is not None:
        squares = squares + jnp.square(b_dec).sum()
    return jnp.sqrt(squares)


def scaled_l1(codes: Codes, W_dec: Float[Array, "F D"]) -> Float[Array, " B"]:
    """The sum of `|f_j| * ||d_j||`: the L1 norm of the code of unit decoder rows."""
    return jnp.abs(_scaled(codes, W_dec)).sum(1)


def _scaled(codes: Codes, W_dec: Float[Array, "F D"]) -> Float[Array, "B _"]:
    """Values that may be non-zero, each times the norm of its decoder row."""
    norms = jnp.linalg.norm(W_dec, axis=1)
    if isinstance(codes, Sparse):
        norms = norms[codes.indices]
    return strengths(codes) * norms


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


def slack(
    epsilon: ForAllOrEach, n_active: int | Int[Array, " B"]
) -> Float[Array, ""] | Float[Array, " B"]:
    """The relative error of ||f||^2 that eps allows: `c = eps * (s - 1)`.

    `n_active` is s: F as in the paper, or `codes.l0`, which is tighter and holds as
    well. Where a norm counts the bias as a feature, the theorem wants s + 1; the
    authors leave it at F.
    """
    return epsilon * jnp.maximum(n_active - 1, 0)


def norm_interval(
    norm_z: Float[Array | np.ndarray, " B"], c: ForAllOrEach
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """The least and the largest ||f|| that rows of length `norm_z` allow.

        ||z|| / sqrt(1 + c)  <=  ||f||  <=  ||z|| / sqrt(1 - c),    c = `slack`

    The paper's approximation, ||f|| = ||z||, lies between the two. From c = 1 on there
    is no upper end, so it is infinite.
    """
    norm_z, c = jnp.asarray(norm_z), jnp.asarray(c)
    bounded = c < 1
    high = norm_z / jnp.sqrt(jnp.where(bounded, 1 - c, 1))
    return norm_z / jnp.sqrt(1 + c), jnp.where(bounded, high, jnp.inf)


def misactivation(
    norm_z: Float[Array, " B"], norm_f: Float[Array, " B"], c: ForAllOrEach = 0.0
) -> Int[Array, " B"]:
    """1 where a row activates more than `norm_interval` allows, -1 where less, else 0.

    With c = 0 it is the sign of ||f|| - ||z||: above or below the diagonal of a ZF
    plot.
    """
    low, high = norm_interval(norm_z, c)
    return (norm_f > high).astype(int) - (norm_f < low).astype(int)


def description_length(
    l0: float | Num[Array, " B"], n_features: int, *, value_bits: float = 7
) -> float | Float[Array, " B"]:
    """Bits that it takes to write a code down: `L0 * (7 + log2 F)`, as the authors do.

    Each active feature costs its value and its index. Left out: that the order of the
    features is free and that some are rarer than others (both would save bits), how
    many are active, the dictionary itself, and what rounding values to 7 bits and the
    remaining error of the reconstruction would cost.
    """
    return l0 * (value_bits + math.log2(n_features))
