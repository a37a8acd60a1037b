"""How well numbers tell right from wrong."""

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata


def auroc(right: Float[np.ndarray, " n"], wrong: Float[np.ndarray, " m"]) -> float:
    """The chance that a right one is above a wrong one, ties counted as half."""
    ranks = rankdata(np.concatenate([right, wrong]))[: len(right)]
    n, m = len(right), len(wrong)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def f1(chosen: Bool[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> float:
    """The harmonic mean of precision and recall; 0 where nothing is right or chosen."""
    total = chosen.sum() + right.sum()
    return float(2 * (chosen & right).sum() / total) if total else 0.0
