"""Scores of a reconstruction: what each row contributes, and what becomes of it.

Over the N rows x_i that count, of width D, with e_i = ||x_i - x_hat_i||^2,
m the mean of all rows, s_i = ||x_i - m||^2, and F features:

    l0                  mean_i of the number of active features
    l1                  mean_i of sum_j |f_ij| ||d_j||
    description_length  l0 (7 + log2 F), the bits that a row's code takes
    mse                 sum_i e_i / (N D)
    nmse                sum_i e_i / sum_i s_i, the fraction of variance unexplained
    explained_variance  1 - nmse
    explained_variance_per_row   mean_i of 1 - e_i / s_i: every row counts alike
    cosine              mean_i of cos(x_i, x_hat_i), 0 where one of them is zero
    relative_reconstruction_bias   sum_i ||x_hat_i||^2 / sum_i x_hat_i . x_i, the g
                        that minimises sum_i ||x_hat_i / g - x_i||^2: below 1 shrinks
    dead                number of features that no row activates
    dense               number of features that more than a tenth of the rows activate
    norm_ratio          median_i of ||f_i|| / ||z_i||
    norm_ratio_centred  median_i of ||c_i|| / ||z_i - b_dec||
    over_activation     share of rows with ||f_i|| > ||z_i||; ties are on neither side
    under_activation    share of rows with ||f_i|| < ||z_i||
    afa_error           mean_i of | ||f_i|| - ||z_i|| | / ||z_i||
    epsilon_lbo         median_i of the function of that name

Rows of norm 0 have no part in what divides by it. A transcoder's target stands for
x_i. Norms and l1 look at the treated space, the others at the activations' own units:
z_i is the treated row. c_i is the code with the norms of its decoder rows, f_ij times
||d_j||; f_i has ||b_dec|| as one entry more. So f_i goes with z_i as it is (the
authors' evaluation), and c_i with z_i - b_dec, which the features alone have to make:
the pair that Top-AFA matches.

Others mean other things by these names. SAELens logs `explained_variance` as here and
the mean of ratios as `explained_variance_legacy`, in training with the mean of each
batch for m; between its pull requests 443 and 665 its evaluation put nearly ||x_i||^2
for s_i, which a large mean makes look good, as does the loss in the code of Gao et al.
2024 (arXiv:2406.04093). `frac_variance_explained` of dictionary_learning takes the
variance of the residual, which forgives a constant error. The `l1` of SAELens, SAEBench
and dictionary_learning leaves ||d_j|| out, so that longer decoder rows lower it.
Rajamanoharan et al. 2024 (arXiv:2404.16014, equation 10) define the bias over all rows,
as here; SAEBench and dictionary_learning average it over batches.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax import codes
from sae_jax.model import SAE
from sae_jax.quasi_orthogonality import (
    description_length,
    epsilon_lbo,
    scaled_l1,
    scaled_norm,
)
from sae_jax.variables import Variables

DENSE = 0.1  # a feature that is active on a larger share of the rows is dense
BINS_PER_DECADE = 4


class Evaluation(NamedTuple):
    """What came out.

    Attributes:
      scores: numbers by name; see the top of this file.
      norm_z: norm of each row in the treated space.
      norm_f: norm of its code, with decoder norms and bias.
      epsilon_lbo: the least eps that allows the two, infinite where norm_f is 0.
      relative_error: the squared error of each row over norm_z^2, both in the treated
        space; not centred, as in the authors' figures, which call it normalised MSE.
      density: the share of rows on which each feature is active.
    """

    scores: dict[str, float]
    norm_z: Float[np.ndarray, " R"]
    norm_f: Float[np.ndarray, " R"]
    epsilon_lbo: Float[np.ndarray, " R"]
    relative_error: Float[np.ndarray, " R"]
    density: Float[np.ndarray, " F"]


class PerRow(NamedTuple):
    """What one row contributes, `[B]` each; `square` is ||x_hat||^2, `dot` x_hat . x.

    `error_z` is the squared error in the treated space.
    """

    l0: Array | np.ndarray
    l1: Array | np.ndarray
    error: Array | np.ndarray
    spread: Array | np.ndarray
    cosine: Array | np.ndarray
    square: Array | np.ndarray
    dot: Array | np.ndarray
    error_z: Array | np.ndarray
    norm_z: Array | np.ndarray
    norm_f: Array | np.ndarray
    centred_z: Array | np.ndarray
    centred_f: Array | np.ndarray
    epsilon_lbo: Array | np.ndarray


@partial(jax.jit, static_argnums=0)
def measure(
    sae: SAE,
    variables: Variables,
    x: Float[Array, "B D_in"],
    target: Float[Array, "B D_out"] | None,
    mask: Bool[Array, " B"],
    mean: Float[Array, " D_out"],
    grad_x: Float[Array, "B D_in"] | None = None,
) -> tuple[Float[Array, "B D_out"], PerRow, Int[Array, " F"]]:
    """One pass: `x_hat`, what each row contributes, and how often features fired."""
    out = sae.forward(variables, x, target=target, grad_x=grad_x, mask=mask)
    assert out.target is not None  # a transcoder was given one
    aim = x if target is None else target
    z, z_hat = out.target, out.x_hats[-1]
    wide, x_hat = aim.astype(sae.param_dtype), out.undo(z_hat)
    _, _, W_dec, b_dec = out.weights
    norm_z, norm_f = jnp.linalg.norm(z, axis=1), scaled_norm(out.codes, W_dec, b_dec)
    square, dot = jnp.square(x_hat).sum(1), (wide * x_hat).sum(1)
    lengths = jnp.linalg.norm(wide, axis=1) * jnp.sqrt(square)
    rows = PerRow(
        l0=codes.l0(out.codes),
        l1=scaled_l1(out.codes, W_dec),
        error=jnp.square(wide - x_hat).sum(1),
        spread=jnp.square(wide - mean).sum(1),
        cosine=dot / jnp.where(lengths > 0, lengths, 1),
        square=square,
        dot=dot,
        error_z=jnp.square(z - z_hat).sum(1),
        norm_z=norm_z,
        norm_f=norm_f,
        centred_z=jnp.linalg.norm(z - b_dec, axis=1),
        centred_f=scaled_norm(out.codes, W_dec),
        epsilon_lbo=epsilon_lbo(norm_z, norm_f, sae.n_features),
    )
    return x_hat.astype(aim.dtype), rows, codes.counts(out.codes, mask)


def evaluation(rows: PerRow, fired: Int[np.ndarray, " F"], width: int) -> Evaluation:
    """The scores of rows of this width, summed in float64."""
    rows = PerRow(*(np.asarray(column).astype(np.float64) for column in rows))
    n_rows, n_features = len(rows.l0), len(fired)
    error = float(rows.error.sum())
    z, f = np.asarray(rows.norm_z), np.asarray(rows.norm_f)
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = np.where(rows.spread > 0, 1 - rows.error / rows.spread, np.nan)
        ratios, centred = f / z, rows.centred_f / rows.centred_z
        relative_error = np.asarray(rows.error_z) / z**2
    # A row of zeros, as a dead layer makes them, has no ratio.
    ratios, centred = ratios[z > 0], centred[rows.centred_z > 0]
    # 0 / 0 where row and code are both empty.
    epsilon = np.where(f == 0, np.inf, rows.epsilon_lbo)
    unexplained = ratio(error, float(rows.spread.sum()))
    density, l0 = fired / n_rows, float(rows.l0.mean())
    scores = {
        "l0": l0,
        "l1": rows.l1.mean(),
        "description_length": description_length(l0, n_features),
        "mse": error / (n_rows * width),
        "nmse": unexplained,
        "explained_variance": 1 - unexplained,
        "explained_variance_per_row": explained.mean(),
        "cosine": rows.cosine.mean(),
        "relative_reconstruction_bias": ratio(
            float(rows.square.sum()), float(rows.dot.sum())
        ),
        "dead": (fired == 0).sum(),
        "dense": (density > DENSE).sum(),
        "norm_ratio": np.median(ratios) if ratios.size else math.nan,
        "norm_ratio_centred": np.median(centred) if centred.size else math.nan,
        "over_activation": (f > z).mean(),
        "under_activation": (f < z).mean(),
        "afa_error": np.abs(ratios - 1).mean() if ratios.size else math.nan,
        "epsilon_lbo": np.median(epsilon),
    }
    scores = {name: float(value) for name, value in scores.items()}
    return Evaluation(scores, z, f, epsilon, relative_error, density)


class DensityHistogram(NamedTuple):
    """How many features are active how often.

    Attributes:
      edges: of the bins, as log10 of the share of rows; the last one is 0.
      counts: features in each bin, a row for each SAE.
      dead: features of each SAE that no row activates, which are in no bin.
    """

    edges: Float[np.ndarray, " K+1"]
    counts: Int[np.ndarray, "S K"]
    dead: Int[np.ndarray, " S"]


def density_histogram(densities: Sequence[Float[np.ndarray, " _"]]) -> DensityHistogram:
    """Histograms over log10 of `Evaluation.density`, four bins to the decade.

    All share their bins: from the rarest feature, but one decade at least, to those
    that are always active, which the last bin includes.
    """
    alive = [density[density > 0] for density in densities]
    least = min([0.1, *(shares.min() for shares in alive if shares.size)])
    lowest = math.floor(BINS_PER_DECADE * math.log10(least))
    edges = np.arange(lowest, 1) / BINS_PER_DECADE
    counts = [np.histogram(np.log10(shares), edges)[0] for shares in alive]
    dead = [int((density == 0).sum()) for density in densities]
    return DensityHistogram(
        edges,
        np.array(counts, np.int64).reshape(len(alive), len(edges) - 1),
        np.array(dead, np.int64),
    )


def ratio(numerator: float, denominator: float) -> float:
    """The quotient; NaN where there is nothing to divide by."""
    return numerator / denominator if denominator else math.nan
