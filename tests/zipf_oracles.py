"""Slow versions of how features are counted, ranked and given rows; see oracles.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Hp = dict[str, Any]


def shares(n: int, hp: Hp) -> list[float]:
    weights = [1 / (rank + hp["q"]) ** hp["alpha"] for rank in range(1, n + 1)]
    return [weight / sum(weights) for weight in weights]


def budgets(n_features: int, n_rows: int, hp: Hp) -> list[int]:
    """Rows of each rank: c, by which shares are multiplied, is found by halving."""
    total, law = hp["k"] * n_rows, shares(n_features, hp)
    low, high = 0.0, 2 * total / min(law)
    for _ in range(200):
        c = (low + high) / 2
        if sum(min(c * w, n_rows) for w in law) < total:
            low = c
        else:
            high = c
    return [min(max(round(low * w), 1), n_rows) for w in law]


def by_rank(firings: Sequence[float]) -> list[int]:
    """Features, those that fire most first; of equal ones, the first."""
    return sorted(range(len(firings)), key=lambda i: (-firings[i], i))


def feature_choice(pre: Array, hp: Hp, firings: Sequence[float]) -> Array:
    codes = np.zeros_like(pre)
    given = budgets(pre.shape[1], len(pre), hp)
    for count, i in zip(given, by_rank(firings), strict=True):
        best = sorted(range(len(pre)), key=lambda b: (-pre[b, i], b))[:count]
        for b in best:
            codes[b, i] = max(pre[b, i], 0)
    return codes


def running_counts(batches: Sequence[Array], decay: float) -> list[float]:
    """Each batch counts by its age."""
    counts = [0.0] * batches[0].shape[1]
    for age, codes in enumerate(reversed(batches)):
        for i, column in enumerate(codes.T):
            counts[i] += (1 - decay) * decay**age * sum(v > 0 for v in column)
    return counts


def underused(firings: Sequence[float], hp: Hp) -> list[bool]:
    law, found = shares(len(firings), hp), [False] * len(firings)
    for share, i in zip(law, by_rank(firings), strict=True):
        expected = min(share * sum(firings), sum(firings) / len(firings))
        found[i] = firings[i] < hp["underused_below"] * expected
    return found
