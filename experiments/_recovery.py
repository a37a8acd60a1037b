"""How much of a planted truth an SAE has found, on rows whose true codes are known.

True feature i and learned feature j are partners in the one-to-one matching of the
largest summed cosine (Hungarian algorithm); where the SAE has fewer features, or rows
of zeros, true ones stay without a partner.

    matched_cosine  mean over true features of the cosine with the partner, 0 without
    mmcs            mean over true features of the best cosine with any learned one
    frr80, frr90    the share of them whose best cosine is above .8, above .9
    precision       of the rows in which the partner fires, in how many i is on
    recall          of the rows in which i is on, in how many the partner fires
    f1              their harmonic mean
    l0_correlation  of the rows' numbers of active features, learned and true (Pearson);
                    none where one of them is constant

The last but one three are means over true features that are ever on, each of which
counts alike; they are 0 without a partner, and precision is 0 where it never fires.

A feature fires where its code is not 0. Where codes may be negative, a direction and
its opposite are one feature: rows are turned so that their mean code is not negative.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sae_jax.evaluation import agreement

FOUND = (0.8, 0.9)

Matrix = Float[np.ndarray, "_ _"]


class Firing(NamedTuple):
    """Means over features."""

    precision: float
    recall: float
    f1: float


def recovered(
    directions: Matrix, codes: Matrix, W_dec: Matrix, learned: Matrix
) -> dict[str, Any]:
    """All scores by name: of true `directions [N D]` and `codes [B N]`, and the SAE's.

    Args:
      directions: the true features.
      codes: how strongly they are on in each row.
      W_dec: decoder rows, `[F D]`.
      learned: the SAE's codes of the same rows, `[B F]`.
    """
    correlation = l0_correlation(learned, codes)
    kept = np.linalg.norm(W_dec, axis=1) > 0
    W_dec, learned = turned(W_dec[kept], learned[:, kept])
    if not kept.any():
        nothing = dict.fromkeys(("matched_cosine", "mmcs", "frr80", "frr90"), 0.0)
        none = Firing(0.0, 0.0, 0.0)
        return nothing | none._asdict() | {"l0_correlation": correlation}
    pairs = agreement.one_to_one(directions, W_dec)
    of_truth = agreement.best_matches(directions, W_dec)
    found = of_truth.shares_above(FOUND)
    fires = np.zeros(codes.shape, bool)
    fires[:, pairs.rows] = learned[:, pairs.partners] != 0
    return {
        "matched_cosine": float(pairs.cosines.sum() / len(directions)),
        "mmcs": of_truth.mean(),
        "frr80": found[0.8],
        "frr90": found[0.9],
        **firing(codes != 0, fires)._asdict(),
        "l0_correlation": correlation,
    }


def turned(W_dec: Matrix, codes: Matrix) -> tuple[Matrix, Matrix]:
    """The same reconstruction from features whose mean code is not negative."""
    sign = np.where(codes.sum(0) < 0, -1, 1).astype(W_dec.dtype)
    return W_dec * sign[:, None], codes * sign


def firing(on: Bool[np.ndarray, "B N"], fires: Bool[np.ndarray, "B N"]) -> Firing:
    """How well column j of `fires` tells where column j of `on` is true."""
    both, truly, said = (rows.sum(0) for rows in (on & fires, on, fires))
    seen = truly > 0
    both, truly, said = both[seen], truly[seen], said[seen]
    return Firing(
        float((both / np.maximum(said, 1)).mean()),
        float((both / truly).mean()),
        float((2 * both / (truly + said)).mean()),
    )


def nmse(x: Matrix, x_hat: Matrix) -> float:
    """The share of the rows' spread around their mean that is not reconstructed."""
    return float(np.square(x - x_hat).sum() / np.square(x - x.mean(0)).sum())


def l0_correlation(learned: Matrix, codes: Matrix) -> float | None:
    """Whether rows of more true features have more active ones."""
    a, b = ((array != 0).sum(1).astype(float) for array in (learned, codes))
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
