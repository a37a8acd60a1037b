"""The factorisation: rows as sums of neuron groups, with codes that are not negative.

Shafran et al. 2025, arXiv:2506.10920, and their code. Rows X [T, N], such as the hidden
units of an MLP, one row a token, become

    X ~ G F        G [T, K] >= 0 codes,  F [K, N] neuron groups, of either sign

(their A and F are the transposes). One step, with A+ = (|A| + A) / 2 and
A- = (|A| - A) / 2:

    F = (G'G + 1e-6 I)^-1 G'X                       least squares
    of each group the ceil(share N) largest |F| stay          winner takes all
    columns of G to norm 1, groups multiplied by the old norms
    P = X F', Q = F F'
    G = G * sqrt((P+ + G Q-) / (P- + G Q+ + 1e-6))

F follows from G, so that only G has a start. Without the second line no step raises the
error; with it some do, so the best is kept. X has to fit in memory: sample tokens.

Differs: the error that is kept and waited on is |X - G F|^2 / |X|^2; the scale of
theirs is not known. `encode`, the codes of new rows for given groups, is ours: the last
line alone, repeated.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import checks
from sae_jax.analysis.snmf.starts import STARTS, Start, most

RIDGE = FLOOR = 1e-6
TOLERANCE = 1e-4  # of the error: what counts as better


class Factors(NamedTuple):
    """`codes @ groups`, and the error of each step, NaN where none was made.

    `codes` are those of the rows that were factored.
    """

    codes: Float[Array, "T K"]
    groups: Float[Array, "K N"]
    errors: Float[Array, " steps"]


def factorise(
    x: Float[Array, "T N"],
    k: int,
    *,
    share: float = 0.01,
    start: Start = "random",
    steps: int = 2000,
    patience: int = 1500,
    seed: int = 0,
) -> Factors:
    """The best of `steps` steps; fewer if `patience` of them bring nothing.

    Args:
      x: the rows.
      k: number of groups.
      share: of the neurons, how many a group has; 1 for all.
      start: codes to start with; see `starts`.
      steps: at most.
      patience: steps without an error lower by `TOLERANCE` after which it ends.
      seed: of the start.
    """
    checks.raise_all(_faults(x, k, share, start, steps))
    codes = STARTS[start](jax.random.key(seed), x, k)
    return _best(x, codes, kept(share, x.shape[1]), steps, patience)


def kept(share: float, n: int) -> int:
    """How many neurons of n a group keeps; products such as .07 * 100 are rounded."""
    return max(1, math.ceil(share * n - 1e-9))


def step(
    x: Float[Array, "T N"], codes: Float[Array, "T K"], n_kept: int
) -> tuple[Float[Array, "T K"], Float[Array, "K N"], Float[Array, ""]]:
    """New codes, the groups that they belong to, and |X - G F|^2 - |X|^2."""
    gram = codes.T @ codes + RIDGE * jnp.eye(codes.shape[1], dtype=x.dtype)
    groups = winners(jnp.linalg.solve(gram, codes.T @ x), n_kept)
    norms = jnp.linalg.norm(codes, axis=0)
    codes = codes / jnp.where(norms > 0, norms, 1)
    groups = groups * norms[:, None]
    p, q = x @ groups.T, groups @ groups.T
    codes = multiplied(codes, p, q)
    # From products that are there already: G F itself would be a third one of its size.
    return codes, groups, jnp.vdot(codes.T @ codes, q) - 2 * jnp.vdot(codes, p)


def winners(groups: Float[Array, "K N"], n_kept: int) -> Float[Array, "K N"]:
    """The largest entries of each group, by size; the others are 0."""
    if n_kept >= groups.shape[1]:
        return groups
    _, indices = jax.lax.top_k(jnp.abs(groups), n_kept)
    values = jnp.take_along_axis(groups, indices, axis=1)
    rows = jnp.arange(len(groups))[:, None]
    return jnp.zeros_like(groups).at[rows, indices].set(values)


def multiplied(
    codes: Float[Array, "T K"], p: Float[Array, "T K"], q: Float[Array, "K K"]
) -> Float[Array, "T K"]:
    """The multiplicative update of codes, by P and Q of the groups."""
    up = jnp.maximum(p, 0) + codes @ jnp.maximum(-q, 0)
    down = jnp.maximum(-p, 0) + codes @ jnp.maximum(q, 0) + FLOOR
    return codes * jnp.sqrt(up / down)


@partial(jax.jit, static_argnames="steps")
def encode(
    x: Float[Array, "T N"], groups: Float[Array, "K N"], *, steps: int = 100
) -> Float[Array, "T K"]:
    """Codes of rows for given groups; each row's depend on nothing but that row."""
    p, q = x @ groups.T, groups @ groups.T
    # Above 0 everywhere, or it would stay there; of the size that one group alone has.
    start = jnp.abs(p) / jnp.maximum(jnp.diag(q), FLOOR) + FLOOR
    return jax.lax.fori_loop(0, steps, lambda _, codes: multiplied(codes, p, q), start)


def unexplained(
    x: Float[Array, "T N"], codes: Float[Array, "T K"], groups: Float[Array, "K N"]
) -> float:
    """|X - G F|^2 / |X|^2; NaN for rows of zeros."""
    wrong, size = jnp.square(x - codes @ groups).sum(), jnp.square(x).sum()
    return float(wrong / size) if size > 0 else math.nan


class _State(NamedTuple):
    t: Array
    codes: Array
    best: tuple[Array, Array]
    lowest: Array  # error of the best
    to_beat: Array  # by TOLERANCE
    waited: Array
    errors: Array


@partial(jax.jit, static_argnums=(2, 3))
def _best(
    x: Array, codes: Array, n_kept: int, steps: int, patience: int | Array
) -> Factors:
    size = jnp.square(x).sum()

    def going(state: _State) -> Array:
        return (state.t < steps) & (state.waited < patience)

    def once(state: _State) -> _State:
        codes, groups, less = step(x, state.codes, n_kept)
        error = 1 + less / jnp.where(size > 0, size, 1)
        best = jax.lax.cond(
            error < state.lowest, lambda: (codes, groups), lambda: state.best
        )
        better = error < state.to_beat - TOLERANCE
        return _State(
            state.t + 1,
            codes,
            best,
            jnp.minimum(error, state.lowest),
            jnp.where(better, error, state.to_beat),
            jnp.where(better, 0, state.waited + 1),
            state.errors.at[state.t].set(error),
        )

    none = jnp.zeros((codes.shape[1], x.shape[1]), x.dtype)
    infinite = jnp.asarray(jnp.inf, x.dtype)
    errors = jnp.full(steps, jnp.nan, x.dtype)
    zero = jnp.zeros((), jnp.int32)
    first = _State(zero, codes, (codes, none), infinite, infinite, zero, errors)
    last = jax.lax.while_loop(going, once, first)
    return Factors(*last.best, last.errors)


def _faults(x: Array, k: int, share: float, start: Start, steps: int) -> list[str]:
    if x.ndim != 2 or not x.size:
        return [f"x has shape {list(x.shape)}; needed are rows [T, N]."]
    if start not in STARTS:
        return [checks.unknown("start", start, STARTS)]
    faults = []
    limit = most(start, (x.shape[0], x.shape[1]), k)
    if not 1 <= k <= limit:
        faults.append(f"k={k} must be from 1 to {limit} with start={start!r}.")
    if not 0 < share <= 1:
        faults.append(f"share={share} must be above 0 and at most 1.")
    if steps < 1:
        faults.append(f"steps={steps}; at least one is needed.")
    return faults
