"""Two ways in which dictionaries miss attributes that matter.

Makelov, Lange, Nanda 2024, arXiv:2405.08366, describe both; the numbers are ours.

*Occlusion*: an attribute is hidden by a stronger one. Beside how far an attribute moves
the rows,

    share   sum_v p(v) ||u[a, v]||^2 / variance of the rows

stands how well the best feature tells its values (the mean over values of the highest
F1). An attribute of small share and low F1 may be occluded, or may simply be hard;
`scaled` makes rows in which it is stronger or weaker and all else the same. Where the
F1 of dictionaries that are trained on such rows rises with the strength, it was hidden.

*Over-splitting*: one value has many features, each of which fires on a part of it.
Counted are features that fire on a value almost alone (precision of at least .9), in at
least 1 % of its prompts, though the best of them may fire in all; beside them how many
are needed, the most frequent first, each for the prompts that those before left out,
until 90 % of the value's prompts have one.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sae_jax.analysis.principled.supervised import Supervised, Values

PRECISE, LEAST, COVERED = 0.9, 0.01, 0.9


class Split(NamedTuple):
    """How one value is told.

    Attributes:
      n_precise: features that fire on it almost alone.
      largest: the share of its prompts in which the most frequent of them fires.
      needed: how many of them until `COVERED` of its prompts have one; -1: too few.
      covered: the share of its prompts in which at least one fires.
    """

    n_precise: int
    largest: float
    needed: int
    covered: float


def shares(
    dictionary: Supervised, rows: Float[np.ndarray, "N D"], values: Values
) -> dict[str, float]:
    """The share of the rows' variance that each attribute moves."""
    variance = np.square(rows - rows.mean(0)).sum(1).mean()
    return {
        name: float(
            np.square(dictionary.of(name)[values[name]]).sum(1).mean() / variance
        )
        for name in dictionary.sizes
    }


def scaled(
    dictionary: Supervised,
    rows: Float[np.ndarray, "N D"],
    values: Values,
    attribute: str,
    factor: float,
) -> Float[np.ndarray, "N D"]:
    """The rows with one attribute's features `factor` times as long."""
    return rows + (factor - 1) * dictionary.of(attribute)[values[attribute]]


def told(of_values: Mapping[str, Float[np.ndarray, "F V"]]) -> dict[str, float]:
    """The highest F1 of any feature for a value, mean over each attribute's values."""
    return {name: float(scores.max(0).mean()) for name, scores in of_values.items()}


def split(active: Bool[np.ndarray, "N F"], holds: Bool[np.ndarray, " N"]) -> Split:
    """How the prompts in which a value holds are shared among precise features."""
    n = int(holds.sum())
    if not n:
        return Split(0, 0.0, -1, 0.0)
    on, fired = active[holds], active.sum(0)
    both = on.sum(0)
    precise = (
        (both >= PRECISE * np.maximum(fired, 1)) & (both >= LEAST * n) & (both > 0)
    )
    mine = on[:, precise]
    left, needed = np.ones(n, bool), 0
    while left.any() and (n - left.sum()) < COVERED * n:
        more = mine[left].sum(0)
        if not more.size or not more.max():
            break
        left &= ~mine[:, more.argmax()]
        needed += 1
    enough = n - left.sum() >= COVERED * n
    largest = both[precise].max() / n if precise.any() else 0.0
    return Split(
        int(precise.sum()),
        float(largest),
        needed if enough else -1,
        float(mine.any(1).mean()),
    )
