"""Groups of neuron groups: the factorisation repeated, and tuned as one product.

Shafran et al. 2025, arXiv:2506.10920, with K = 400, 200, 100, 50. The groups of one
level are the rows of the next, F_l ~ G_{l+1} F_{l+1}, and so

    X ~ G_1 G_2 ... G_L F_L

in which the codes of tokens for the groups of level l, G_1 ... G_l, are not negative
either. `tune` lowers the error of the whole product with Adam.

Differs: that groups, not codes, are factored again is our reading. So is how signs and
zeros are kept: codes below 0 are put to 0 after each step, and neurons that are not in
a group of the last level stay out.
"""

from collections.abc import Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sae_jax.analysis.snmf.factors import Factors, factorise

SIZES = (400, 200, 100, 50)


def recursive(
    x: Float[Array, "T N"], sizes: Sequence[int] = SIZES, **options
) -> list[Factors]:
    """The levels, each the factors of the groups before; options as of `factorise`."""
    levels: list[Factors] = []
    for k in sizes:
        levels.append(factorise(levels[-1].groups if levels else x, k, **options))
    return levels


def token_codes(levels: Sequence[Factors]) -> Float[Array, "T K"]:
    """The codes of tokens for the groups of the last of these levels."""
    return reduce(jnp.matmul, [level.codes for level in levels])


def tune(
    x: Float[Array, "T N"],
    levels: Sequence[Factors],
    *,
    steps: int = 500,
    lr: float = 1e-3,
) -> list[Factors]:
    """The levels with a product nearer to x; groups between are made by the later.

    `errors` stay those of the factorisations.
    """
    last = levels[-1].groups
    codes, groups = _tuned(
        x, ([level.codes for level in levels], last), last != 0, steps, lr
    )
    tuned: list[Factors] = []
    for level, own in zip(reversed(levels), reversed(codes), strict=True):
        tuned.insert(0, Factors(own, groups, level.errors))
        groups = own @ groups
    return tuned


@partial(jax.jit, static_argnums=3)
def _tuned(
    x: Array,
    free: tuple[list[Array], Array],
    alive: Array,
    steps: int,
    lr: float | Array,
) -> tuple[list[Array], Array]:
    optimiser = optax.adam(lr)

    def loss(free: tuple[list[Array], Array]) -> Array:
        return jnp.square(x - reduce(jnp.matmul, free[0]) @ free[1]).mean()

    def once(_: Array, state: tuple) -> tuple:
        free, memory = state
        updates, memory = optimiser.update(jax.grad(loss)(free), memory)
        codes, groups = optax.apply_updates(free, updates)
        codes = [jnp.maximum(one, 0) for one in codes]
        return (codes, jnp.where(alive, groups, 0)), memory

    return jax.lax.fori_loop(0, steps, once, (free, optimiser.init(free)))[0]
