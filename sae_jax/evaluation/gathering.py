"""Rows are measured batch by batch, in any number of processes.

    mean = Mean()
    for x in batches(): mean.add(x)
    measurement = Measurement(sae, variables, mean.finish())
    for x in batches(): measurement.add(x)
    scores = measurement.finish().scores

The mean must be known before the rows are measured: a mean of ratios cannot be put
right afterwards. So rows are read twice, and a large mean cancels nothing. Thirteen
numbers per row are kept on the host and summed there in float64, whatever batches they
came in: medians need them all. `merge` adds what was gathered elsewhere; `Mean` and
`Gathered` are NumPy alone, so that they can be sent.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax import checks
from sae_jax.evaluation.measures import Evaluation, PerRow, evaluation, measure
from sae_jax.model import SAE
from sae_jax.variables import Variables


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

    def merge(self, other: "Mean") -> None:
        """Takes in the rows of another."""
        self._total = self._total + other._total
        self._n_rows += other._n_rows

    def finish(self) -> Float[np.ndarray, " D"]:
        """The mean of all rows so far."""
        _require_rows(self._n_rows)
        return np.asarray(self._total) / self._n_rows


class Gathered(NamedTuple):
    """What rows have contributed, and how often each feature fired on them."""

    rows: PerRow
    fired: Int[np.ndarray, " F"]


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
        grad_x: Float[Array | np.ndarray, "B D_in"] | None = None,
        mask: Bool[Array | np.ndarray, " B"] | None = None,
    ) -> Float[Array, "B D_out"]:
        """Takes in the rows where `mask` is true; gives the `x_hat` of `SAE.apply`.

        Rows that do not count have some finite `x_hat`. Rows may lie on several
        devices of one process.
        """
        if self.sae.is_transcoder and target is None:
            raise ValueError(
                f"A transcoder is measured against a target [rows, {self.sae.d_out}]."
            )
        checks.rows("x", x, self.sae.d_in, mask=mask)
        checks.mask(mask, x)
        checks.beside("target", target, self.sae.width_out, x, mask=mask)
        checks.beside("grad_x", grad_x, self.sae.d_in, x, mask=mask)
        valid = np.ones(len(x), bool) if mask is None else np.asarray(mask)
        x_hat, rows, fired = measure(
            self.sae, self.variables, x, target, valid, self._mean, grad_x
        )
        self._rows.append(PerRow(*(np.asarray(column)[valid] for column in rows)))
        self._fired += np.asarray(fired)
        return x_hat

    @property
    def gathered(self) -> Gathered:
        """What all rows so far have contributed."""
        _require_rows(sum(len(rows.l0) for rows in self._rows))
        columns = zip(*self._rows, strict=True)
        return Gathered(PerRow(*map(np.concatenate, columns)), self._fired.copy())

    def merge(self, other: Gathered) -> None:
        """Takes in what the same SAE, about the same mean, gathered of other rows."""
        if other.fired.shape != self._fired.shape:
            raise ValueError(
                f"What is merged counts {len(other.fired)} features, this SAE has "
                f"{len(self._fired)}; merge measurements of one and the same SAE."
            )
        self._rows.append(other.rows)
        self._fired += other.fired

    def finish(self) -> Evaluation:
        """The scores of all rows so far."""
        return evaluation(*self.gathered, self.sae.width_out)


def _require_rows(n_rows: int) -> None:
    if n_rows == 0:
        raise ValueError(
            "No rows were added, or all of them are masked; add at least one first."
        )
