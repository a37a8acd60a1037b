"""What a reader wants to know of every feature, as arrays.

How often and how strongly it fires on held-out text, on which examples, on rows that
activate too much or too little, next to which other features, and which tokens it makes
more or less likely. All from one `Firings`, the decoder and one more pass of the model.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from sae_jax import coherence
from sae_jax.evaluation.direct_effect import direct_effects
from sae_jax.evaluation.firings import LIMIT, Firings, record
from sae_jax.evaluation.heldout import HeldOut
from sae_jax.lm.source import Source
from sae_jax.model import SAE
from sae_jax.variables import Variables

BINS = 20
QUARTERS = ("top quarter", "second quarter", "third quarter", "bottom quarter")
STRONGEST, PER_QUARTER = 8, 2
GROUPS = (("strongest", STRONGEST), *((name, PER_QUARTER) for name in QUARTERS))
N_EXAMPLES = sum(n for _, n in GROUPS)
NEAREST = 5


class Catalogue(NamedTuple):
    """What is known of F features. |f_j| is f_j, but where codes are signed.

    Attributes:
      firings: where they fired.
      density: share of the used rows on which the feature is active.
      strength: mean of |f_j| * ||d_j|| over those rows, in the treated space; 0 where
        there are none.
      highest: the largest |f_j|.
      norm_ratio: mean of ||f|| / ||z|| over those rows, NaN if dead. Above 1, it fires
        on rows whose codes are too long for them (see `measures`).
      histogram: of |f_j| over (0, highest], in equal bins.
      examples: rows of `firings` to show, in the columns of `groups`; -1 where there
        are no more.
      groups: label and number of columns of each kind of example. `strongest` are the
        peaks of different contexts, as far as there are so many. The quarters are those
        of its firings, by rank; from each a few are drawn that are not shown already.
      nearest: the features with the largest |cos| of decoder rows; see `coherence`.
      nearest_cosine: their cosines: near 1 a duplicate, near -1 an opposite.
      raised: the tokens whose logits it raises most, -1 if dead. None where the
        site is none of the residual stream (see `direct_effect`).
      raised_by: by how much, NaN if dead.
      lowered: the tokens whose logits it lowers most.
      lowered_by: by how much, below 0.
    """

    firings: Firings
    density: Float[np.ndarray, " F"]
    strength: Float[np.ndarray, " F"]
    highest: Float[np.ndarray, " F"]
    norm_ratio: Float[np.ndarray, " F"]
    histogram: Int[np.ndarray, "F bins"]
    examples: Int32[np.ndarray, "F examples"]
    groups: tuple[tuple[str, int], ...]
    nearest: Int32[np.ndarray, "F near"]
    nearest_cosine: Float32[np.ndarray, "F near"]
    raised: Int32[np.ndarray, "F tokens"] | None
    raised_by: Float32[np.ndarray, "F tokens"] | None
    lowered: Int32[np.ndarray, "F tokens"] | None
    lowered_by: Float32[np.ndarray, "F tokens"] | None


def catalogue(
    lm: Source,
    sae: SAE,
    variables: Variables,
    site: str,
    heldout: HeldOut,
    *,
    target_site: str | None = None,
    contexts_per_pass: int = 16,
    seed: int = 0,
    limit: int = LIMIT,
) -> Catalogue:
    """The catalogue of an SAE; `seed` draws the examples, the rest as in `record`."""
    firings = record(
        lm,
        sae,
        variables,
        site,
        heldout,
        target_site=target_site,
        contexts_per_pass=contexts_per_pass,
        limit=limit,
    )
    active = activity(firings, seed=seed)
    W_dec = sae.weights(variables).W_dec
    lengths = np.linalg.norm(np.asarray(W_dec, np.float64), axis=1)
    near = coherence.nearest(W_dec, n=NEAREST)
    effects = direct_effects(
        lm,
        sae,
        variables,
        target_site or site,
        active.mean,
        heldout,
        contexts_per_pass=contexts_per_pass,
    )
    return Catalogue(
        firings,
        active.density,
        active.mean * lengths,
        active.highest,
        active.norm_ratio,
        active.histogram,
        active.examples,
        GROUPS,
        near.indices.astype(np.int32),
        near.cosines.astype(np.float32),
        *(effects or [None] * 4),
    )


class Activity(NamedTuple):
    """What the firings alone tell; as in `Catalogue`, and `mean`, that of |f_j|."""

    density: Float[np.ndarray, " F"]
    mean: Float[np.ndarray, " F"]
    highest: Float[np.ndarray, " F"]
    norm_ratio: Float[np.ndarray, " F"]
    histogram: Int[np.ndarray, "F bins"]
    examples: Int32[np.ndarray, "F examples"]


def activity(firings: Firings, *, seed: int = 0) -> Activity:
    """Looks at the features one by one; `seed` draws the examples of the quarters."""
    n_features, context = firings.n_features, firings.tokens.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):  # rows of zeros
        ratios = firings.norm_f.astype(np.float64) / firings.norm_z
    found = Activity(
        np.diff(firings.starts) / firings.use.sum(),
        np.zeros(n_features),
        np.zeros(n_features),
        np.full(n_features, np.nan),
        np.zeros((n_features, BINS), np.int32),
        np.full((n_features, N_EXAMPLES), -1, np.int32),
    )
    for feature in np.flatnonzero(found.density).tolist():
        rows, values = firings.of(feature)
        sizes = np.abs(values).astype(np.float64)
        highest = sizes.max()
        bins = np.ceil(sizes * BINS / highest).astype(int) - 1
        rng = np.random.default_rng((seed, feature))
        found.mean[feature] = sizes.mean()
        found.highest[feature] = highest
        found.norm_ratio[feature] = ratios[rows].mean()
        found.histogram[feature] = np.bincount(bins, minlength=BINS)
        found.examples[feature] = choose(rows, sizes, context, rng)
    return found


def choose(
    rows: Int32[np.ndarray, " E"],
    sizes: Float[np.ndarray, " E"],
    context: int,
    rng: np.random.Generator,
) -> Int32[np.ndarray, " examples"]:
    """The rows to show of a feature that fired on `rows`, as `GROUPS` says."""
    ranked = rows[np.argsort(-sizes, kind="stable")]
    peaks = np.sort(np.unique(ranked // context, return_index=True)[1])[:STRONGEST]
    free = np.ones(len(rows), bool)
    free[peaks] = False
    # Fewer contexts than examples: the strongest of the rest as well.
    rest = np.flatnonzero(free[: 2 * STRONGEST])[: STRONGEST - len(peaks)]
    free[rest] = False
    shown = np.full(N_EXAMPLES, -1, np.int32)
    shown[: len(peaks) + len(rest)] = ranked[np.sort(np.concatenate([peaks, rest]))]
    for quarter in range(len(QUARTERS)):
        low, high = (len(rows) * q // len(QUARTERS) for q in (quarter, quarter + 1))
        pool = low + np.flatnonzero(free[low:high])
        drawn = rng.choice(pool, min(PER_QUARTER, len(pool)), replace=False)
        column = STRONGEST + quarter * PER_QUARTER
        shown[column : column + len(drawn)] = ranked[np.sort(drawn)]
    return shown
