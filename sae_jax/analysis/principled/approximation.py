"""Test 1, approximation: are reconstructions enough, and is nothing outside needed?

Makelov, Lange, Nanda 2024, arXiv:2405.08366. With LD the mean logit difference between
right and wrong answer, and rows at all places of a cross-section replaced together by

    clean      a, as they are
    mean       their mean over prompts, and so nothing of this prompt
    recon      a_hat, reconstructions
    rest       mean + (a - a_hat), all that is not in them

    sufficiency              LD_recon / LD_clean
    sufficiency_over_mean    |LD_recon - LD_mean| / |LD_clean - LD_mean|
    necessity                (LD_clean - LD_rest) / (LD_clean - LD_mean)
    necessity_distance       1 - |LD_rest - LD_mean| / |LD_clean - LD_mean|

All are 1 at best. The second form of sufficiency is that of the authors' code. The
first of necessity is above 1 where the rest misleads the model more than a mean row
does; the second then falls below 1.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from sae_jax.analysis.places import Place, predictions
from sae_jax.analysis.prompts import Prompts
from sae_jax.evaluation.measures import ratio
from sae_jax.lm.source import Source

Rows = Mapping[Place, Float[np.ndarray, "N D"]]


def contrast(
    lm: Source,
    prompts: Prompts,
    rows: Rows | None = None,
) -> float:
    """The mean logit difference, over the prompts that have one."""
    found = predictions(lm, prompts, rows).difference
    return float(found[prompts.answer != prompts.wrong].mean())


def approximation(
    lm: Source,
    prompts: Prompts,
    clean: Rows,
    x_hat: Rows,
    mean: Mapping[Place, Float[np.ndarray, " D"]],
) -> dict[str, float]:
    """The scores of reconstructions of the clean rows, and the differences behind."""
    ablated = {p: np.broadcast_to(mean[p], x.shape) for p, x in clean.items()}
    rest = {p: mean[p] + (x - x_hat[p]) for p, x in clean.items()}
    ld_clean, ld_mean = contrast(lm, prompts), contrast(lm, prompts, ablated)
    ld_recon, ld_rest = contrast(lm, prompts, x_hat), contrast(lm, prompts, rest)
    return {
        "ld_clean": ld_clean,
        "ld_mean": ld_mean,
        "ld_recon": ld_recon,
        "ld_rest": ld_rest,
        **scores(ld_clean, ld_mean, ld_recon, ld_rest),
    }


def scores(
    ld_clean: float, ld_mean: float, ld_recon: float, ld_rest: float
) -> dict[str, float]:
    """All four scores of logit differences."""
    drop = abs(ld_clean - ld_mean)
    return {
        "sufficiency": ratio(ld_recon, ld_clean),
        "sufficiency_over_mean": ratio(abs(ld_recon - ld_mean), drop),
        "necessity": ratio(ld_clean - ld_rest, ld_clean - ld_mean),
        "necessity_distance": 1 - ratio(abs(ld_rest - ld_mean), drop),
    }
