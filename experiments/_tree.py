"""Activations with a hierarchy in them, of known truth. Not an experiment.

The tree benchmark of Costa et al. 2025, arXiv:2506.03093: 20 features in R^20, of which
three parents have three children each and eight stand alone. A row has exactly one of
the 11 top nodes; one that is a parent may have one of its children with it.
"""

from typing import NamedTuple

import numpy as np

PARENTS, CHILDREN, ALONE = 3, 3, 8
TOPS = PARENTS + ALONE
N = TOPS + PARENTS * CHILDREN  # features, and the width of rows
P_PARENT, P_ALONE = 0.2, 0.05  # 3 * 0.2 + 8 * 0.05 = 1
P_CHILD = 0.2  # of each child, given its parent; none with 0.4
MEAN_L0 = 1 + PARENTS * P_PARENT * CHILDREN * P_CHILD


class Tree(NamedTuple):
    """Rows `[B, 20]`, unit directions `[20, 20]`, codes: x = codes @ directions.

    Features 0 to 2 are the parents, 3 to 10 stand alone, then come the children, those
    of the first parent first.
    """

    x: np.ndarray
    directions: np.ndarray
    codes: np.ndarray


def tree(rows: int, *, cosine: float = 0.0, seed: int = 0) -> Tree:
    """Draws rows; siblings have this cosine, parents and children are orthogonal.

    The top nodes are siblings of one another.
    """
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(N, N)))[0]
    for family in (slice(0, TOPS), *map(children, range(PARENTS))):
        directions[family] = mixed(directions[family], cosine)
    p = [P_PARENT] * PARENTS + [P_ALONE] * ALONE
    top = rng.choice(TOPS, size=rows, p=p)
    child = rng.choice(
        CHILDREN + 1, size=rows, p=[P_CHILD] * CHILDREN + [1 - CHILDREN * P_CHILD]
    )
    on = np.zeros((rows, N))
    on[np.arange(rows), top] = 1
    both = np.flatnonzero((top < PARENTS) & (child < CHILDREN))
    on[both, TOPS + CHILDREN * top[both] + child[both]] = 1
    codes = on * (1.5 + 0.25 * rng.normal(size=on.shape))
    return Tree((codes @ directions).astype(np.float32), directions, codes)


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
