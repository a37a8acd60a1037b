"""Scores of a reconstruction, gathered batch by batch.

    mean = Mean()
    for x in batches(): mean.add(x)
    measurement = Measurement(sae, variables, mean.finish())
    for x in batches(): measurement.add(x)
    scores = measurement.finish().scores

Over the N rows x_i that count, of width D, with e_i = ||x_i - x_hat_i||^2,
m the mean of all rows, and s_i = ||x_i - m||^2:

    l0                  mean_i of the number of active features
    mse                 sum_i e_i / (N D)
    nmse                sum_i e_i / sum_i s_i, the fraction of variance unexplained
    explained_variance  mean_i of 1 - e_i / s_i: every row counts alike
    cosine              mean_i of cos(x_i, x_hat_i), 0 where one of them is zero
    dead                number of features that no row activates
    norm_ratio          median_i of ||f_i|| / ||z_i||
    epsilon_lbo         median_i of the `quasi_orthogonality` of the same name

A transcoder's target stands for x_i. The last two look at the treated space, the others
at the activations' own units: z_i is the treated row, not centred, and ||f_i|| counts
decoder norms and b_dec (`scaled_norm`), so that both measure the same vector.

Others mean other things by these names. SAELens logs 1 - nmse as `explained_variance`
and ours as `explained_variance_legacy`, both with the mean of each batch for m.
`frac_variance_explained` of dictionary_learning takes the variance of the residual,
which forgives a constant error. The loss in the code of Gao et al. 2024
(arXiv:2406.04093) puts ||x_i||^2 for s_i, which a large mean makes look good.

m must be known before the rows are measured: a mean of ratios cannot be put right
afterwards. So rows are read twice, and a large mean cancels nothing. Seven numbers per
row are kept on the host and summed there in float64, whatever batches they came in.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sae_jax import checks, codes
from sae_jax.model import SAE
from sae_jax.quasi_orthogonality import epsilon_lbo, scaled_norm
from sae_jax.variables import Variables


class Evaluation(NamedTuple):
    """What came out.

    Attributes:
      scores: numbers by name; see the top of this file.
      norm_z: norm of each row in the treated space, `[R]`.
      norm_f: norm of its code, with decoder norms and bias, `[R]`.
      epsilon_lbo: the least eps that allows the two, infinite where norm_f is 0, `[R]`.
      density: the share of rows on which each feature is active, `[F]`.
    """

    scores: dict[str, float]
    norm_z: np.ndarray
    norm_f: np.ndarray
    epsilon_lbo: np.ndarray
    density: np.ndarray


class PerRow(NamedTuple):
    """What one row contributes, `[B]` each."""

    l0: Array | np.ndarray
    error: Array | np.ndarray
    spread: Array | np.ndarray
    cosine: Array | np.ndarray
    norm_z: Array | np.ndarray
    norm_f: Array | np.ndarray
    epsilon_lbo: Array | np.ndarray


class Mean:
    """The mean of rows that come in batches, summed in float64."""

    def __init__(self) -> None:
        self._total: np.ndarray | float = 0.0
        self._n_rows = 0

    def add(
        self,
        x: Float[Array | np.ndarray, "B D"],
        *,
        mask: Bool[Array | np.ndarray, " B"] | None = None,
    ) -> None:
        """Takes in the rows where `mask` is true."""
        rows = np.asarray(x).astype(np.float64)
        rows = rows if mask is None else rows[np.asarray(mask)]
        self._total = self._total + rows.sum(0)
        self._n_rows += len(rows)

    def finish(self) -> Float[np.ndarray, " D"]:
        """The mean of all rows so far."""
        _require_rows(self._n_rows)
        return np.asarray(self._total) / self._n_rows


class Measurement:
    """Measures an SAE on rows that come in batches; `mean` is the mean of them all.

    For a transcoder it is the mean of the targets.
    """

    def __init__(
        self, sae: SAE, variables: Variables, mean: Float[Array | np.ndarray, " D_out"]
    ):
        if mean.shape != (sae.width_out,):
            raise ValueError(
                f"mean has shape {tuple(mean.shape)}, this SAE reconstructs rows of "
                f"width {sae.width_out}; give the mean of those."
            )
        self.sae, self.variables = sae, variables
        self._mean = jnp.asarray(mean, sae.param_dtype)
        self._rows: list[PerRow] = []
        self._fired = np.zeros(sae.n_features, np.int64)

    def add(
        self,
        x: Float[Array | np.ndarray, "B D_in"],
        *,
        target: Float[Array | np.ndarray, "B D_out"] | None = None,
        mask: Bool[Array | np.ndarray, " B"] | None = None,
    ) -> Float[Array, "B D_out"]:
        """Takes in the rows where `mask` is true; gives the `x_hat` of `SAE.apply`.

        Rows that do not count have some finite `x_hat`.
        """
        if self.sae.is_transcoder and target is None:
            raise ValueError(
                f"A transcoder is measured against a target [rows, {self.sae.d_out}]."
            )
        checks.rows("x", x, self.sae.d_in, mask=mask)
        checks.mask(mask, x)
        checks.beside("target", target, self.sae.width_out, x, mask=mask)
        valid = np.ones(len(x), bool) if mask is None else np.asarray(mask)
        x_hat, rows, fired = _measure(
            self.sae, self.variables, x, target, valid, self._mean
        )
        self._rows.append(PerRow(*(np.asarray(column)[valid] for column in rows)))
        self._fired += np.asarray(fired)
        return x_hat

    def finish(self) -> Evaluation:
        """The scores of all rows so far."""
        n_rows = sum(len(rows.l0) for rows in self._rows)
        _require_rows(n_rows)
        columns = zip(*self._rows, strict=True)
        rows = PerRow(*(np.concatenate(c).astype(np.float64) for c in columns))
        density = self._fired / n_rows
        error, spread = float(rows.error.sum()), float(rows.spread.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = np.where(rows.spread > 0, 1 - rows.error / rows.spread, np.nan)
            ratios = rows.norm_f / rows.norm_z
        # 0 / 0 where row and code are both empty.
        epsilon = np.where(rows.norm_f == 0, np.inf, rows.epsilon_lbo)
        scores = {
            "l0": rows.l0.mean(),
            "mse": error / (n_rows * self.sae.width_out),
            "nmse": ratio(error, spread),
            "explained_variance": explained.mean(),
            "cosine": rows.cosine.mean(),
            "dead": (self._fired == 0).sum(),
            "norm_ratio": np.median(ratios),
            "epsilon_lbo": np.median(epsilon),
        }
        scores = {name: float(value) for name, value in scores.items()}
        return Evaluation(
            scores, np.asarray(rows.norm_z), np.asarray(rows.norm_f), epsilon, density
        )


@partial(jax.jit, static_argnums=0)
def _measure(
    sae: SAE,
    variables: Variables,
    x: Float[Array, "B D_in"],
    target: Float[Array, "B D_out"] | None,
    mask: Bool[Array, " B"],
    mean: Float[Array, " D_out"],
) -> tuple[Float[Array, "B D_out"], PerRow, Array]:
    """One pass: `x_hat`, what each row contributes, and how often features fired."""
    out = sae.forward(variables, x, target=target, mask=mask)
    assert out.target is not None  # a transcoder was given one
    aim = x if target is None else target
    wide, x_hat = aim.astype(sae.param_dtype), out.undo(out.x_hats[-1])
    # No larger than the pre-activations, which are there anyhow.
    dense = codes.to_dense(out.codes)
    norm_z = jnp.linalg.norm(out.target, axis=1)
    norm_f = scaled_norm(dense, out.weights.W_dec, out.weights.b_dec)
    lengths = jnp.linalg.norm(wide, axis=1) * jnp.linalg.norm(x_hat, axis=1)
    rows = PerRow(
        l0=codes.l0(out.codes),
        error=jnp.square(wide - x_hat).sum(1),
        spread=jnp.square(wide - mean).sum(1),
        cosine=(wide * x_hat).sum(1) / jnp.where(lengths > 0, lengths, 1),
        norm_z=norm_z,
        norm_f=norm_f,
        epsilon_lbo=epsilon_lbo(norm_z, norm_f, sae.n_features),
    )
    fired = ((dense != 0) & mask[:, None]).sum(0)
    return x_hat.astype(aim.dtype), rows, fired


def ratio(numerator: float, denominator: float) -> float:
    """The quotient; NaN where there is nothing to divide by."""
    return numerator / denominator if denominator else math.nan


def _require_rows(n_rows: int) -> None:
    if n_rows == 0:
        raise ValueError(
            "No rows were added, or all of them are masked; add at least one first."
        )
