"""Where the norm of a row's largest entries crosses a target, found without sorting.

Bisection on bit patterns, which order non-negative floats.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import mesh
from sae_jax.mesh import FEATURE
from sae_jax.piecewise import row_sums


def of_squares(
    squares: Float[Array, "B F"], target: Float[Array, " B"]
) -> Float[Array, " B"]:
    """The largest value v of a row with `norm of squares >= v` at least `target`.

    Where the whole row falls short of the target, v is the smallest entry that still
    changes the norm of the row.
    """
    size = squares.dtype.itemsize
    bits = {4: jnp.uint32, 8: jnp.uint64}[size]
    target = jnp.maximum(target, jnp.finfo(squares.dtype).tiny)  # one is always kept

    # Squares of a scaled row are below 1, whose bit pattern leaves the two highest
    # bits empty: sign, and exponents above 0.
    n_bits = 8 * size - 2

    def halve(i: Array, found: Array) -> Array:
        trial = found | (jnp.ones((), bits) << (n_bits - 1 - i).astype(bits))
        threshold = jax.lax.bitcast_convert_type(trial, squares.dtype)
        kept = jnp.where(squares >= threshold[:, None], squares, 0)
        norm = jnp.sqrt(mesh.total(row_sums(kept), FEATURE))
        return jnp.where(norm >= target, trial, found)

    start = jnp.zeros(target.shape, bits)
    found = jax.lax.fori_loop(0, n_bits, halve, start)
    value = jax.lax.bitcast_convert_type(found, squares.dtype)
    total = mesh.total(squares.sum(1), FEATURE)
    counts = squares > total[:, None] * jnp.finfo(squares.dtype).eps
    smallest = mesh.least(jnp.where(counts, squares, 1).min(1), FEATURE)
    return jnp.where(jnp.sqrt(total) >= target, jnp.maximum(value, smallest), smallest)
