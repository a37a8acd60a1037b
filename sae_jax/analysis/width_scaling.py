"""How the error of SAEs falls with their width, as a whole and token by token.

Engels, Riggs, Tegmark 2024, arXiv:2410.14670. At one sparsity, over widths W,

    FVU = c + a W^-m

c being what would remain at any width; and of a token, the squared error at a larger
width is predicted linearly from those at all smaller ones.

Ours: the law is the least squares of FVU itself, with c, a, m at least 0. Per token the
squared norm is predicted, as everywhere in the authors' code, with an intercept, and
from all smaller widths together.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num
from scipy.optimize import OptimizeWarning, curve_fit

from sae_jax.analysis.least_squares import Explained, Sums

FEWEST = 4  # widths, for three numbers
FLAT = 1e-3  # share of the error, or exponent, that is no fall; chosen, untested


class Law(NamedTuple):
    """`FVU = c + a W^-m`, and one standard error of c and of m.

    The errors are those of a fit to few points that need not scatter by chance; with
    four widths one degree of freedom is left.
    """

    c: float
    a: float
    m: float
    c_error: float
    m_error: float

    def __call__(self, widths: Num[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The law at some widths."""
        return self.c + self.a * np.asarray(widths, np.float64) ** -self.m


def width_law(widths: Sequence[int], fvus: Sequence[float]) -> Law:
    """The law that fits best; `ValueError` where the points do not tell one."""
    W, y = np.asarray(widths, np.float64), np.asarray(fvus, np.float64)
    if len(set(widths)) < FEWEST:
        raise ValueError(
            f"{len(set(widths))} widths; c + a W^-m has three numbers, and fewer than "
            f"{FEWEST} widths show nothing of it."
        )
    if not np.isfinite(y).all():
        raise ValueError("an error is not finite: an SAE diverged.")
    unit, scale = W.min(), max(np.abs(y).max(), np.finfo(float).tiny)

    def law(w: np.ndarray, c: float, b: float, m: float) -> np.ndarray:
        return c + b * w**-m

    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizeWarning)  # no covariance
        try:
            found, covariance = curve_fit(
                law,
                W / unit,
                y / scale,
                p0=(0.5 * y.min() / scale, 0.5, 0.5),
                bounds=(0, np.inf),
                maxfev=20_000,
            )
        except (RuntimeError, OptimizeWarning) as error:
            raise ValueError(f"no law c + a W^-m was found: {error}") from None
    c, b, m = map(float, found)
    narrowest, second = sorted(set(W / unit))[:2]
    if b * (1 - (W.max() / unit) ** -m) < FLAT or m < FLAT:
        raise ValueError(
            "the error does not fall with the width; there is no exponent."
        )
    if (second / narrowest) ** -m < FLAT:
        raise ValueError("the error falls once, after the narrowest, and then no more.")
    errors = np.sqrt(np.diag(covariance)).tolist()
    if not np.isfinite(errors).all():
        raise ValueError("the points do not settle the three numbers of the law.")
    a = float(b * scale * unit**m)
    return Law(float(c * scale), a, m, float(errors[0] * scale), errors[2])


class Predicted(NamedTuple):
    """How well the errors at a larger width follow from those at smaller ones."""

    r2: float
    by_chance: float


def predict_larger(
    smaller: Float[np.ndarray, "R n"],
    larger: Float[np.ndarray, " R"],
    fitted: Bool[np.ndarray, " R"],
    *,
    seed: int = 0,
) -> Predicted:
    """Held-out R2 of a row's error from its errors at smaller widths.

    `fitted` says which rows are fitted, the others are scored. By chance: the rows of
    `smaller` permuted.
    """
    rng, found = np.random.default_rng(seed), []
    parts = [(smaller[on], larger[on, None]) for on in (fitted, ~fitted)]
    for permuted in (False, True):
        (x, y), (x_new, y_new) = parts
        if permuted:
            x, x_new = rng.permutation(x), rng.permutation(x_new)
        sums, explained = Sums(), Explained()
        sums.add(x, y)
        explained.add(y_new, sums.solve(intercept=True)(x_new))
        found.append(explained.r2())
    return Predicted(*found)
