"""Gradient pursuit at inference: other codes for the same dictionary and the same L0.

Blumensath, Davies 2008, as in the code of Engels, Riggs, Tegmark 2024,
arXiv:2410.14670: how much of an SAE's error is its encoder's fault? With the atoms D
and w = 0, K times:

    r = x - w D
    p = r D'
    S = {w != 0} and the argmax of p       (not of |p|)
    g = p on S, 0 elsewhere
    c = g D
    w = max(0, w + (c . r) / (c . c) g)

K is the number of features that the SAE's own encoder activates in that row. Rows stop
one by one. No array has K times B times F numbers: the largest is the atoms that were
chosen, [B, K, D], for as many rows at once as `AT_ONCE` allows.

Differs: a dictionary's rows are brought to length 1 first, as the authors' have it; a
longer one would be chosen for its length. c = 0 is a step of 0. Codes are never
negative, also for rules whose codes are signed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax import codes
from sae_jax.analysis.dark_matter import require_autoencoder
from sae_jax.model import SAE
from sae_jax.treatment import Undo
from sae_jax.variables import Variables

AT_ONCE = 2**26  # numbers in the largest array


@partial(jax.jit, static_argnames="budget_max")
def pursue(
    x: Float[Array, "B D"],
    atoms: Float[Array, "F D"],
    budget: Int[Array, " B"],
    *,
    budget_max: int,
) -> codes.Sparse:
    """Codes of each row after `budget` steps of its own, at most `budget_max`."""
    n_rows, width = x.shape
    slots = jnp.arange(budget_max)

    def step(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        values, indices, chosen = state
        r = x - jnp.einsum("bk,bkd->bd", values, chosen)
        best = jnp.argmax(r @ atoms.T, axis=1)[:, None]
        known = (indices == best).any(1, keepdims=True)
        indices = jnp.where(slots == t, best, indices)
        # A slot of zeros where the atom has one already: its value stays 0.
        chosen = chosen.at[:, t].set(jnp.where(known, 0, atoms[best[:, 0]]))
        support = (values != 0) | (indices == best)
        g = jnp.where(support, jnp.einsum("bd,bkd->bk", r, chosen), 0)
        c = jnp.einsum("bk,bkd->bd", g, chosen)
        square = jnp.square(c).sum(1, keepdims=True)
        flat = square == 0
        size = (c * r).sum(1, keepdims=True) / jnp.where(flat, 1, square)
        moved = jnp.maximum(values + jnp.where(flat, 0, size) * g, 0)
        going = t < budget[:, None]
        return jnp.where(going, moved, values), indices, chosen

    values = jnp.zeros((n_rows, budget_max), x.dtype)
    indices = jnp.full((n_rows, budget_max), -1)  # no feature
    chosen = jnp.zeros((n_rows, budget_max, width), x.dtype)
    last = jnp.minimum(budget.max(), budget_max)
    values, indices, _ = jax.lax.fori_loop(0, last, step, (values, indices, chosen))
    return codes.Sparse(values, jnp.maximum(indices, 0), atoms.shape[0])


def reconstruct(
    sae: SAE,
    variables: Variables,
    x: Float[Array, "B D"],
    use: Bool[Array | np.ndarray, " B"],
) -> Float[Array, "B D"]:
    """What pursuit makes of rows with an SAE's dictionary, in the rows' own units."""
    require_autoencoder(sae)
    centred, atoms, b_dec, budget, undo = _problem(sae, variables, x, use)
    budget_max = 1 << max(int(budget.max()) - 1, 0).bit_length()  # few programs
    per_row = max(budget_max * sae.d_in, sae.n_features)
    n = min(len(x), max(AT_ONCE // per_row, 1))
    missing = -len(x) % n
    centred = jnp.pad(centred, ((0, missing), (0, 0)))
    budget = jnp.pad(budget, (0, missing))
    found = [
        _decoded(centred[i : i + n], atoms, budget[i : i + n], budget_max)
        for i in range(0, len(centred), n)
    ]
    return undo(jnp.concatenate(found)[: len(x)] + b_dec)


@partial(jax.jit, static_argnums=0)
def _problem(
    sae: SAE, variables: Variables, x: Array, use: Array
) -> tuple[Array, Array, Array, Array, Undo]:
    """Treated rows less b_dec, unit atoms, b_dec, the rows' own L0, the way back."""
    out = sae.forward(variables, x, mask=use)
    assert out.target is not None  # an autoencoder's is its input
    W_dec, b_dec = out.weights.W_dec, out.weights.b_dec
    lengths = jnp.linalg.norm(W_dec, axis=1, keepdims=True)
    atoms = W_dec / jnp.where(lengths > 0, lengths, 1)
    budget = jnp.where(use, codes.l0(out.codes), 0)
    return out.target - b_dec, atoms, b_dec, budget, out.undo


@partial(jax.jit, static_argnums=3)
def _decoded(centred: Array, atoms: Array, budget: Array, budget_max: int) -> Array:
    active = pursue(centred, atoms, budget, budget_max=budget_max)
    return jnp.einsum("bk,bkd->bd", active.values, atoms[active.indices])
