"""Agreement: whether two dictionaries hold the same directions.

For dictionaries A [F, D] and B [G, D] with rows a_i and b_j, two ways to pair them:

    best_matches   each a_i with the b_j of the largest cos(a_i, b_j)
    one_to_one     the pairs with the largest summed cosine in which no row occurs twice
                   (Hungarian algorithm), min(F, G) of them

The mean over best matches is the mean max cosine similarity, MMCS (Sharkey et al.
2022). It is not symmetric: if A is a part of B, MMCS(A, B) is 1 and MMCS(B, A) is less;
and any number of rows of A may have the same match, so an A of copies of one row of B
scores 1. One-to-one matching forbids that. It is what Paulo and Belrose 2025
(arXiv:2501.16615) and Song et al. 2025 (arXiv:2505.20254) compare seeds by; its cost
grows with F^3.

Cosines are signed: a code is not negative, so a direction and its opposite are two
different features. So they are in the code of Song et al.; the mean correlation
coefficient that it descends from takes absolute ones. Paulo and Belrose look at the
encoders as well; here decoders alone are compared. One-to-one matching leaves the
surplus of the larger dictionary out; Song et al. want equal sizes.
"""

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from sae_jax import checks
from sae_jax.coherence import BLOCK, cosines, pad_rows, unit_rows

THRESHOLDS = (0.7, 0.9)
MOST_FEATURES = 8192  # one_to_one: 0.5 GiB of cosines in float64

Rows: TypeAlias = Float[Array | np.ndarray, "_ _"]


class Matches(NamedTuple):
    """Pairs: row `rows[n]` of A with row `partners[n]` of B, and their cosine."""

    rows: Int[np.ndarray, " N"]
    partners: Int[np.ndarray, " N"]
    cosines: Float[np.ndarray, " N"]

    def mean(self) -> float:
        """The mean cosine: MMCS if these are best matches."""
        return float(self.cosines.mean(dtype=np.float64))

    def shares_above(
        self, thresholds: Sequence[float] = THRESHOLDS
    ) -> dict[float, float]:
        """The share of the pairs with a cosine above each threshold."""
        return {t: float((self.cosines > t).mean()) for t in thresholds}


class Stability(NamedTuple):
    """Means over pairs of dictionaries of `Matches.mean` and `Matches.shares_above`."""

    mean: float
    shares: dict[float, float]


class Recovery(NamedTuple):
    """What of a planted truth a dictionary holds.

    Attributes:
      mmcs: mean over the true features of the best cosine in the dictionary.
      found: the share of the true features whose best cosine is above each threshold.
      spurious: the share of the dictionary's features whose best cosine with a true one
        is not. Two that found the same true feature are both none of these.
    """

    mmcs: float
    found: dict[float, float]
    spurious: dict[float, float]


def best_matches(A: Rows, B: Rows, *, block: int = BLOCK) -> Matches:
    """For each row of A the row of B with the largest cosine; of equal ones, the first.

    Never holds more than `block` by `block` cosines.
    """
    unit_a, unit_b = _directions(A, B)
    if block < 1:
        raise ValueError(f"block={block}; tiles have at least one row.")
    n_a, n_b = len(unit_a), len(unit_b)
    height, width = min(block, n_a), min(block, n_b)
    unit_a, unit_b = pad_rows(unit_a, height), pad_rows(unit_b, width)
    partners, best = np.zeros(len(unit_a), int), np.full(len(unit_a), -np.inf)
    for top in range(0, n_a, height):
        here = slice(top, top + height)
        for left in range(0, n_b, width):
            found = _best(unit_a[here], unit_b[left : left + width], n_b - left)
            at, cos = (np.asarray(values) for values in found)
            better = cos > best[here]
            best[here] = np.where(better, cos, best[here])
            partners[here] = np.where(better, left + at, partners[here])
    return Matches(np.arange(n_a), partners[:n_a], best[:n_a])


@jax.jit
def _best(a, b, n_valid):
    """The first of the largest cosines of each row of `a` in the valid rows of `b`."""
    cos = jnp.where(jnp.arange(len(b)) < n_valid, cosines(a, b), -jnp.inf)
    best, at = jax.lax.top_k(cos, 1)  # half the time of argmax on a CPU
    return at[:, 0], best[:, 0]


def one_to_one(A: Rows, B: Rows) -> Matches:
    """The pairs with the largest summed cosine, each row in one pair at most.

    Rows of the larger dictionary that are left over have no pair and no part in means
    and shares.
    """
    largest = max(len(A), len(B))
    if largest > MOST_FEATURES:
        raise ValueError(
            f"One-to-one matching of {len(A)} and {len(B)} features needs all cosines "
            f"at once, and time that grows with the cube; it is refused above "
            f"{MOST_FEATURES}. Take best_matches, or a random part of the features."
        )
    unit_a, unit_b = _directions(A, B)
    cos = np.asarray(jax.jit(cosines)(unit_a, unit_b))
    rows, partners = linear_sum_assignment(cos, maximize=True)
    return Matches(rows, partners, cos[rows, partners])


def stability(
    dictionaries: Sequence[Rows],
    *,
    match: Callable[[Rows, Rows], Matches] = best_matches,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Stability:
    """How alike the dictionaries of several seeds are: means over all ordered pairs.

    Both orders, since best matches are not symmetric.
    """
    if len(dictionaries) < 2:
        raise ValueError(f"{len(dictionaries)} dictionaries; give two seeds or more.")
    pairs = [match(A, B) for A, B in permutations(dictionaries, 2)]
    shares = [matches.shares_above(thresholds) for matches in pairs]
    return Stability(
        float(np.mean([matches.mean() for matches in pairs])),
        {t: float(np.mean([share[t] for share in shares])) for t in thresholds},
    )


def recovery(
    W_dec: Rows, truth: Rows, *, thresholds: Sequence[float] = THRESHOLDS
) -> Recovery:
    """Compares a dictionary with the directions that its data were planted with."""
    of_truth, of_learned = best_matches(truth, W_dec), best_matches(W_dec, truth)
    matched = of_learned.shares_above(thresholds)
    return Recovery(
        of_truth.mean(),
        of_truth.shares_above(thresholds),
        {t: 1 - share for t, share in matched.items()},
    )


def _directions(A: Rows, B: Rows) -> tuple[Float[Array, "F D"], Float[Array, "G D"]]:
    """Both dictionaries at unit norm."""
    faults = []
    if A.shape[1] != B.shape[1]:
        faults.append(
            f"The dictionaries have widths {A.shape[1]} and {B.shape[1]}; give two of "
            f"the same space."
        )
    units = []
    for name, W in (("first", A), ("second", B)):
        checks.rows(f"The {name} dictionary", W, W.shape[1])
        unit, kept = unit_rows(W)
        units.append(unit)
        if len(kept) < len(W):
            faults.append(
                f"{len(W) - len(kept)} of {len(W)} rows of the {name} dictionary are "
                f"zero and have no direction; leave them out."
            )
    checks.raise_all(faults)
    return units[0], units[1]
