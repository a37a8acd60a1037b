"""What an audit says of dictionaries: how orthogonal one is, how far two agree."""

import itertools
from collections.abc import Mapping

import numpy as np

from sae_jax import coherence
from sae_jax.evaluation import agreement
from sae_jax.trained import TrainedSAE

ALL_PAIRS_UP_TO = 65_536  # features, in about a minute at width 768
PAIRS = 2_000_000  # of larger ones; they miss the maximum, so none is given


def coherence_scores(one: TrainedSAE) -> dict[str, float]:
    """How near to orthogonal the decoder's directions are."""
    W_dec, scores = directions(one), {}
    if len(W_dec) < 2:
        return {}
    if len(W_dec) <= ALL_PAIRS_UP_TO:
        found = coherence.exact(W_dec, quantiles=(0.99,))
        scores["coherence_maximum"] = found.maximum
    else:
        found = coherence.sampled(W_dec, n_pairs=PAIRS, seed=0, quantiles=(0.99,))
    scores |= {"coherence_mean": found.mean, "coherence_99": found.quantiles[0.99]}
    return scores


def directions(one: TrainedSAE) -> np.ndarray:
    """The decoder rows that have a direction: those of zeros and NaN have none."""
    W_dec = np.asarray(one.sae.weights(one.variables).W_dec)
    norms = np.linalg.norm(W_dec, axis=1)
    return W_dec[np.isfinite(norms) & (norms > 0)]


def agreements(saes: Mapping[str, TrainedSAE]) -> str:
    """How far the dictionaries of SAEs that write to one site agree, two by two.

    Beside it what random directions would have, and whether both had the same start:
    an SAE that was trained for a short time agrees with everything from its start.
    """
    aims = {
        name: one.about["target"] or one.about["site"] for name, one in saes.items()
    }
    pairs = [(a, b) for a, b in itertools.permutations(saes, 2) if aims[a] == aims[b]]
    lines = ["Of the directions of the first, the largest cosine with the second's:"]
    rng = np.random.default_rng(0)
    for a, b in pairs:
        A, B = directions(saes[a]), directions(saes[b])
        found = agreement.best_matches(A, B)
        by_chance = agreement.best_matches(rng.normal(size=A.shape), B).mean()
        above = found.shares_above()
        shares = ", ".join(f"{share:.1%} above {t}" for t, share in above.items())
        start = ", same start" if _same_start(saes[a], saes[b]) else ""
        lines.append(
            f"{a} in {b}: mean {found.mean():.3f} (random directions "
            f"{by_chance:.3f}{start}), {shares}"
        )
    return "\n".join(lines) if pairs else ""


def _same_start(one: TrainedSAE, other: TrainedSAE) -> bool:
    seeds = {sae.about.get("seed") for sae in (one, other)}
    sizes = {(sae.sae.d_in, sae.sae.n_features) for sae in (one, other)}
    return seeds != {None} and len(seeds) == len(sizes) == 1
