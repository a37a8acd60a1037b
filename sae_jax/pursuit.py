"""Matching pursuit: atom after atom, the one that explains most of what is left.

From r_0 = x, step t takes the atom (dictionary row) d with the largest d . r_t / ||d||,
with the coefficient c = d . r_t / ||d||^2, and leaves r_{t+1} = r_t - c d, which is
orthogonal to d and no longer than r_t.

Each step multiplies all rows with the whole dictionary, and keeps of it one number and
one place a row: products exist for some rows of one step at a time. Gradients flow
through coefficients and atoms, not through the choice. They are written by hand: going
back through the steps, each residual is found again from the one after it, so that
nothing [K, B, D] is kept either. The gradient of the dictionary is a sum over picks.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sae_jax import codes, largest, mesh
from sae_jax.mesh import DATA, FEATURE, FEATURES, ROWS, WHOLE
from sae_jax.piecewise import by_rows

ROWS_AT_ONCE = 256  # their products stay in the cache of a CPU

# A pick no longer than so many rounding errors of the row is none. Else what rounding
# leaves of a row that is fully explained goes on to find atoms.
ROUNDING = 8


class Path(NamedTuple):
    """What each step took of each row.

    Attributes:
      coefficients: of the atom; 0 where a row takes none.
      picks: which atom, or -1 for none.
      first: the step that took this atom for the first time, most often the same one.
    """

    coefficients: Float[Array, "B K"]
    picks: Int[Array, "B K"]
    first: Int[Array, "B K"]


class Stop(NamedTuple):
    """When a row takes no more atoms, beside when none points along what is left.

    Attributes:
      below: length under which what is left counts as explained, after the first step.
      on_repeat: once it took an atom for the second time.
    """

    below: float = 0.0
    on_repeat: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def pursue(
    x: Float[Array, "B D"],
    atoms: Float[Array, "F D"],
    count: Array | float,
    count_max: int,
    stop: Stop,
    dtype: Any,
) -> Path:
    """The first `count` steps; a traced count has a static ceiling.

    Atoms are rounded to `dtype`, as where they are decoded; all else stays wide.
    """
    return _pursue(x, atoms, count, count_max, stop, dtype)[0]


def _pursue(x, atoms, count, count_max, stop, dtype):
    """The path, and what is left of each row."""
    wide = jnp.promote_types(jnp.float32, dtype)

    def part(x, atoms, count):
        atoms = atoms.astype(dtype)
        length = jnp.linalg.norm(atoms.astype(wide), axis=1)
        scale = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
        walk = partial(_walk, atoms, scale, count, count_max, stop)
        at_once = x.shape[0] if mesh.inside(FEATURE) else ROWS_AT_ONCE
        return by_rows(walk, at_once, x.astype(wide))

    found = mesh.on_each(part, (ROWS, FEATURES, WHOLE), ROWS)
    return found(x, atoms, jnp.asarray(count))


def _walk(atoms, scale, count, count_max, stop, x):
    """The steps of some rows, until all of them have stopped."""
    n_rows, steps = x.shape[0], jnp.arange(count_max)
    least = ROUNDING * jnp.finfo(x.dtype).eps * jnp.linalg.norm(x, axis=1)

    def goes_on(carry):
        t, active, *_ = carry
        return (t < jnp.minimum(count, count_max)) & active.any()

    def step(carry):
        t, active, residual, path = carry
        pick = _best(residual, atoms, scale)
        atom = _rows(atoms, pick, x.dtype)
        square, along = jnp.square(atom).sum(1), (residual * atom).sum(1)
        active &= along > least * jnp.sqrt(square)  # 0 > 0 for an atom of zeros
        coefficient = jnp.where(active, along / jnp.where(active, square, 1), 0)
        residual = residual - coefficient[:, None] * atom
        pick = jnp.where(active, pick, -1)
        same = (path.picks == pick[:, None]) & active[:, None]
        again = same.any(1)
        path = Path(
            path.coefficients.at[:, t].set(coefficient),
            path.picks.at[:, t].set(pick),
            path.first.at[:, t].set(jnp.where(again, same.argmax(1), t)),
        )
        if stop.below:
            active &= jnp.linalg.norm(residual, axis=1) >= stop.below
        if stop.on_repeat:
            active &= ~again
        return t + 1, active, residual, path

    nothing = jnp.zeros((n_rows, count_max), x.dtype)
    path = Path(
        nothing,
        jnp.full(nothing.shape, -1, steps.dtype),
        jnp.broadcast_to(steps, nothing.shape),
    )
    start = jnp.zeros((), steps.dtype), jnp.ones(n_rows, bool), x, path
    _, _, residual, path = jax.lax.while_loop(goes_on, step, start)
    return path, residual


def _best(residual, atoms, scale):
    """For each row the atom that points most along it; of equal ones the first."""
    product = jnp.matmul(
        residual.astype(atoms.dtype), atoms.T, preferred_element_type=residual.dtype
    )
    # Else the maxima of blocks are fused with the product, which slows it down.
    scores = jax.lax.optimization_barrier(product * scale)
    values, indices = largest.of_part(scores, 1)
    _, indices = largest.merged(values, indices, 1, atoms.shape[0], FEATURE)
    return indices[:, 0]


def _rows(atoms, picks, wide):
    """The atoms of picks, whichever device has them; any for a pick of -1."""
    picks, mine = mesh.own(picks, atoms.shape[0], FEATURE)
    found = jnp.where(jnp.asarray(mine)[..., None], atoms[picks].astype(wide), 0)
    return mesh.total(found, FEATURE)


def _pursue_forward(x, atoms, count, count_max, stop, dtype):
    path, residual = _pursue(x, atoms, count, count_max, stop, dtype)
    # An array of no size remembers the type of x.
    return path, (path, residual, atoms, x[:0])


def _pursue_backward(count_max, stop, dtype, saved, g):
    path, residual, atoms, like_x = saved

    def part(coefficients, picks, residual, atoms, g):
        n_atoms = atoms.shape[0]
        rounded = atoms.astype(dtype)

        def back(carry, slot):
            """From r_{t+1} and the gradient of it to r_t, past c = d . r / ||d||^2."""
            residual, d_residual, d_atoms = carry
            c, pick, g = slot
            atom = _rows(rounded, pick, residual.dtype)
            residual = residual + c[:, None] * atom
            used = c > 0
            d_c = jnp.where(used, g - (d_residual * atom).sum(1), 0)
            d_along = d_c / jnp.where(used, jnp.square(atom).sum(1), 1)
            d_atom = (
                d_along[:, None] * residual
                - (2 * d_along * c)[:, None] * atom
                - c[:, None] * d_residual
            )
            place, mine = mesh.own(pick, n_atoms, FEATURE)
            d_atom = jnp.where((used & mine)[:, None], d_atom, 0)
            d_atoms = d_atoms.at[place].add(d_atom)
            return (residual, d_residual + d_along[:, None] * atom, d_atoms), None

        start = residual, jnp.zeros_like(residual), jnp.zeros(atoms.shape, g.dtype)
        slots = coefficients.T, picks.T, g.T
        (_, d_x, d_atoms), _ = jax.lax.scan(back, start, slots, reverse=True)
        return d_x, mesh.total(d_atoms, DATA)

    taken = path.coefficients, path.picks, residual, atoms, g.coefficients
    spread = ROWS, ROWS, ROWS, FEATURES, ROWS
    d_x, d_atoms = mesh.on_each(part, spread, (ROWS, FEATURES))(*taken)
    return d_x.astype(like_x.dtype), d_atoms.astype(atoms.dtype), None


pursue.defvjp(_pursue_forward, _pursue_backward)


def merged(path: Path, n_features: int) -> codes.Sparse:
    """The codes of a path: what was taken twice is added up, slots unused are others.

    Those get features that the row has not taken, so that each stands there once.
    """
    n_rows, k = path.picks.shape
    rows, slots = jnp.arange(n_rows)[:, None], jnp.arange(k)
    values = (
        jnp.zeros_like(path.coefficients).at[rows, path.first].add(path.coefficients)
    )
    used = (path.picks >= 0) & (path.first == slots)
    low = jnp.where(used, jnp.minimum(path.picks, k), k)  # of the first k features
    taken = jnp.zeros((n_rows, k + 1), bool).at[rows, low].set(True)[:, :k]
    others = jnp.sort(jnp.where(taken, k, slots), axis=1)
    which = jnp.cumsum(~used, axis=1) - 1
    other = jnp.take_along_axis(others, jnp.maximum(which, 0), axis=1)
    indices = jnp.where(used, path.picks, other)
    return codes.Sparse(values, indices, n_features)
