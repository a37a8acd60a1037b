"""Least squares of rows that come in batches, and how much it explains of other rows.

    sums = Sums()
    for x, y in some(): sums.add(x, y)
    line = sums.solve()
    explained = Explained()
    for x, y in others(): explained.add(y, line(x))
    explained.r2()

Everything is summed on the host in float64, whatever batches it came in. Memory is that
of the products `x'x` and `x'y`, however many rows there are.

An R2 of the rows that were fitted says nothing: with as many rows as numbers in a row
it is 1 for any `y`. So fewer than `LEAST` rows a number are refused, and what fits and
what scores are two objects.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RCOND = 1e-9  # of singular values, as in the code of Engels et al. 2024
LEAST = 2  # rows for each number of `x`; chosen, untested


class Line(NamedTuple):
    """`y = x @ W + b`."""

    W: Float[np.ndarray, "D K"]
    b: Float[np.ndarray, " K"]

    def __call__(self, x: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B K"]:
        """What it predicts, in float64."""
        return x.astype(np.float64) @ self.W + self.b


class Sums:
    """The normal equations `x'x W = x'y` of all rows so far."""

    def __init__(self) -> None:
        self.n_rows = 0
        self._x: np.ndarray | float = 0.0
        self._y: np.ndarray | float = 0.0
        self._xx: np.ndarray | float = 0.0
        self._xy: np.ndarray | float = 0.0

    def add(self, x: Float[np.ndarray, "B D"], y: Float[np.ndarray, "B K"]) -> None:
        """Takes in rows and what is to be predicted of them."""
        x, y = x.astype(np.float64), y.astype(np.float64)
        self.n_rows += len(x)
        self._x, self._y = self._x + x.sum(0), self._y + y.sum(0)
        self._xx, self._xy = self._xx + x.T @ x, self._xy + x.T @ y

    def solve(self, *, intercept: bool = False, rcond: float = RCOND) -> Line:
        """The line of least squared error, and of those the shortest.

        Directions in which `x` hardly varies are left out, as by `numpy.linalg.lstsq`:
        those whose singular value is below `rcond` times the largest. The normal
        equations hold its square, so that below 1e-7 or so (the root of float64's
        rounding, times the width) nothing is known of it, and that is left out as well.
        """
        xx, xy = np.asarray(self._xx), np.asarray(self._xy)
        x, y = (np.asarray(sums) / max(self.n_rows, 1) for sums in (self._x, self._y))
        width = xx.shape[0] if xx.ndim else 0
        if self.n_rows < max(LEAST * width, 1):
            raise ValueError(
                f"{self.n_rows:,} rows to fit a map of rows of {width:,} numbers on; "
                f"give at least {LEAST * width:,}: more contexts, or longer ones."
            )
        if intercept:
            xx = xx - self.n_rows * np.outer(x, x)
            xy = xy - self.n_rows * np.outer(x, y)
        values, directions = np.linalg.eigh(xx)
        least = max(rcond**2, width * np.finfo(np.float64).eps) * values.max(initial=0)
        kept = directions[:, values > least]
        W = kept @ ((kept.T @ xy) / values[values > least, None])
        return Line(W, y - x @ W if intercept else np.zeros_like(y))


class Explained:
    """How well rows are predicted that nothing was fitted on."""

    def __init__(self) -> None:
        self.n_rows = 0
        self._origin: np.ndarray | None = None
        self._sum: np.ndarray | float = 0.0
        self._square: np.ndarray | float = 0.0
        self._wrong: np.ndarray | float = 0.0

    def add(self, y: Float[np.ndarray, "B K"], y_hat: Float[np.ndarray, "B K"]) -> None:
        """Takes in rows and their prediction."""
        if not len(y):
            return
        y = y.astype(np.float64)
        if self._origin is None:  # so that a large mean cancels nothing
            self._origin = y.mean(0)
        about = y - self._origin
        self.n_rows += len(y)
        self._sum = self._sum + about.sum(0)
        self._square = self._square + np.square(about).sum(0)
        self._wrong = self._wrong + np.square(y - y_hat).sum(0)

    @property
    def spread(self) -> Float[np.ndarray, " K"]:
        """The squared distances from the mean; 0 for a column that is constant."""
        if self._origin is None:
            raise ValueError("No rows were added that could be scored.")
        found = self._square - np.square(self._sum) / self.n_rows
        return np.maximum(found, 0)  # rounding could be below

    def r2(self) -> float:
        """`1 - squared error / spread` of each column, mean over those that vary."""
        spread = self.spread
        varies = spread > 0
        if not varies.any():
            return float("nan")
        return float((1 - np.asarray(self._wrong)[varies] / spread[varies]).mean())

    def unexplained(self) -> float:
        """The summed squared error over the summed spread of all columns."""
        total = float(self.spread.sum())
        return float(np.sum(self._wrong)) / total if total else float("nan")
