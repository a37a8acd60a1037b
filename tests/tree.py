"""Rows with a hierarchy in them, of known truth.

The tree benchmark of Costa et al. 2025, arXiv:2506.03093: 20 features in R^20, of which
three parents have three children each and eight stand alone. A row has exactly one of
the 11 top nodes; one that is a parent may have one of its children with it.
"""

import jax
import jax.numpy as jnp
import numpy as np

PARENTS, CHILDREN, ALONE = 3, 3, 8
TOPS = PARENTS + ALONE
N = TOPS + PARENTS * CHILDREN  # features, and the width of rows
P_PARENT, P_ALONE = 0.2, 0.05  # 3 * 0.2 + 8 * 0.05 = 1
P_CHILD = 0.2  # of each child, given its parent; none with 0.4
MEAN_L0 = 1 + PARENTS * P_PARENT * CHILDREN * P_CHILD


def directions(cosine: float, seed: int) -> np.ndarray:
    """Unit rows; siblings have this cosine, parents and children are orthogonal.

    The first three are the parents, 3 to 10 stand alone, then come the children, those
    of the first parent first. The top nodes are siblings of one another.
    """
    found = np.linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))[0]
    for family in (slice(0, TOPS), *map(children, range(PARENTS))):
        found[family] = mixed(found[family], cosine)
    return found


def codes(key: jax.Array, rows: int) -> jax.Array:
    """How much of each feature is in rows `[rows, 20]` that are drawn."""
    of_top, of_child, of_size = jax.random.split(key, 3)
    p = jnp.array([P_PARENT] * PARENTS + [P_ALONE] * ALONE)
    top = jax.random.choice(of_top, TOPS, (rows,), p=p)
    p = jnp.array([P_CHILD] * CHILDREN + [1 - CHILDREN * P_CHILD])
    child = jax.random.choice(of_child, CHILDREN + 1, (rows,), p=p)
    both = (top < PARENTS) & (child < CHILDREN)
    below = jnp.where(both, TOPS + CHILDREN * top + child, -1)  # no feature
    on = jax.nn.one_hot(top, N) + jax.nn.one_hot(below, N)
    return on * (1.5 + 0.25 * jax.random.normal(of_size, on.shape))


def children(parent: int) -> slice:
    """Where the children of a parent stand."""
    start = TOPS + CHILDREN * parent
    return slice(start, start + CHILDREN)


def mixed(rows: np.ndarray, cosine: float) -> np.ndarray:
    """Unit rows with this cosine between any two, from orthonormal ones.

    Each gets a of the sum of all m: then two have the product 2a + m a^2, and each the
    square 1 + 2a + m a^2. The authors write it (1 - eps) q_i + eps/(m-1) * the others,
    with a table of eps for each cosine.
    """
    m = len(rows)
    a = (np.sqrt(1 + m * cosine / (1 - cosine)) - 1) / m
    rows = rows + a * rows.sum(0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
