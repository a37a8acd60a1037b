"""The dark matter of SAEs: which part of their error is linear in what they read.

Engels, Riggs, Tegmark 2024, arXiv:2410.14670. With the error e = x - x_hat of a row,

    W = argmin sum ||e - x W||^2       without intercept, over rows that are not scored
    linear error = x W,  nonlinear error = e - x W

and on other rows, with FVU(x, y) = sum ||x - y||^2 / sum ||x - mean x||^2,

    fvu                 FVU(x, x_hat)
    fvu_nonlinear       FVU(x, x_hat + x W)
    linear_share        1 - fvu_nonlinear / fvu
    normalised_mse      mean of ||e||^2 / ||x||^2
    error_vector_r2     R2 of x W for e, mean over coordinates
    error_norm_r2       R2 of a prediction of ||e||^2 that is linear in x
    ..._by_chance       the same with the rows of x permuted, in fitting and scoring

and of a language model in which a part of the error is put back,

    loss_spliced        x_hat at the site, the whole error missing
    loss_with_linear    x_hat + x W: the nonlinear error missing
    loss_with_nonlinear x_hat + (e - x W) = x - x W: the linear error missing
    linear_share_of_loss   of loss_spliced - loss_clean, what the linear error brings
                        back: (loss_spliced - loss_with_linear) over it
    kl_..., linear_share_of_kl   the same of the divergence from the clean model

All of it in the activations' own units, whatever the SAE's treatment.

Differs: fitted on the first half of the contexts and scored on the second, not on
random tokens of all: neighbours in a context are alike. (The authors' figure of the
FVU applies W to the rows that it was fitted on, as well.) Normal equations in place of
a least-squares solver. A row of norm 0 has no part in normalised_mse. The paper has no
intercept: there what is constant, such as the mean of ||e||^2, counts as linear as far
as x has a large mean. With `intercept=True` it always does.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sae_jax.analysis.least_squares import Explained, Line, Sums
from sae_jax.evaluation.heldout import Evaluator, HeldOut
from sae_jax.evaluation.measures import ratio
from sae_jax.model import SAE
from sae_jax.variables import Variables

Reconstruct: TypeAlias = Callable[
    [Float[Array, "B D"], Bool[Array | np.ndarray, " B"]], Float[Array, "B D"]
]


class Parts(NamedTuple):
    """What was fitted: the lines that predict e and ||e||^2, from x and by chance."""

    line: Line
    by_chance: Line

    def linear(self, x: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B D"]:
        """The linear error of rows."""
        return self.line(x)[:, :-1]


class DarkMatter(NamedTuple):
    """What came out.

    Attributes:
      scores: numbers by name; see the top of this file.
      squared_error: ||e||^2 of each scored row.
      predicted: what is linearly predicted for it.
      parts: what was fitted on the other rows.
    """

    scores: dict[str, float]
    squared_error: Float[np.ndarray, " R"]
    predicted: Float[np.ndarray, " R"]
    parts: Parts


class Fit:
    """Takes the rows that the linear error is fitted on; `seed` permutes them."""

    def __init__(self, *, intercept: bool = False, seed: int = 0):
        self._intercept, self._rng = intercept, np.random.default_rng((seed, 0))
        self._sums, self._by_chance = Sums(), Sums()

    def add(self, x: Float[np.ndarray, "B D"], x_hat: Float[np.ndarray, "B D"]) -> None:
        """Takes in rows and their reconstructions; rows are permuted among these."""
        y = _targets(x, x_hat)
        self._sums.add(x, y)
        self._by_chance.add(self._rng.permutation(x), y)

    def finish(self) -> Parts:
        """The lines."""
        found = (sums.solve(intercept=self._intercept) for sums in self._both)
        return Parts(*found)

    @property
    def _both(self) -> tuple[Sums, Sums]:
        return self._sums, self._by_chance


class Score:
    """Takes other rows, and says how far their error is what was fitted."""

    def __init__(self, parts: Parts, *, seed: int = 0):
        self.parts, self._rng = parts, np.random.default_rng((seed, 1))
        names = "fvu nonlinear vector norm vector_by_chance norm_by_chance".split()
        self._of = {name: Explained() for name in names}
        self._squared: list[np.ndarray] = []
        self._predicted: list[np.ndarray] = []
        self._relative: list[np.ndarray] = []

    def add(self, x: Float[np.ndarray, "B D"], x_hat: Float[np.ndarray, "B D"]) -> None:
        """Takes in rows and their reconstructions."""
        y, found = _targets(x, x_hat), self.parts.line(x)
        chance = self.parts.by_chance(self._rng.permutation(x))
        self._of["fvu"].add(x, x_hat)
        self._of["nonlinear"].add(x, x_hat + found[:, :-1])
        for name, y_hat in (("", found), ("_by_chance", chance)):
            self._of[f"vector{name}"].add(y[:, :-1], y_hat[:, :-1])
            self._of[f"norm{name}"].add(y[:, -1:], y_hat[:, -1:])
        self._squared.append(y[:, -1])
        self._predicted.append(found[:, -1])
        squares = np.square(x.astype(np.float64)).sum(1)
        self._relative.append(y[squares > 0, -1] / squares[squares > 0])

    def finish(self) -> DarkMatter:
        """The scores of all rows so far."""
        of, relative = self._of, np.concatenate(self._relative)
        fvu, nonlinear = (of[n].unexplained() for n in ("fvu", "nonlinear"))
        scores = {
            "fvu": fvu,
            "fvu_nonlinear": nonlinear,
            "linear_share": 1 - ratio(nonlinear, fvu),
            "normalised_mse": float(relative.mean()) if relative.size else math.nan,
        }
        for name in ("vector", "norm"):
            scores[f"error_{name}_r2"] = of[name].r2()
            scores[f"error_{name}_r2_by_chance"] = of[f"{name}_by_chance"].r2()
        squared, predicted = map(np.concatenate, (self._squared, self._predicted))
        return DarkMatter(scores, squared, predicted, self.parts)


def dark_matter(
    evaluator: Evaluator,
    sae: SAE,
    variables: Variables,
    site: str,
    *,
    reconstruct: Reconstruct | None = None,
    intercept: bool = False,
    seed: int = 0,
) -> DarkMatter:
    """The linear and the nonlinear error of an SAE at a site.

    `reconstruct` makes `x_hat` of rows, in their own units, in another way than the
    SAE does, such as by `gradient_pursuit.reconstruct`.

    Costs the model four passes over half of the contexts and one over the others, the
    SAE one over all.
    """
    require_autoencoder(sae)
    first, second = evaluator.heldout.halves()
    if not (first.use.any() and second.use.any()):
        raise ValueError(
            f"{len(evaluator.heldout.tokens)} contexts make no two halves, one to fit "
            f"the linear error on and one to score it; give more."
        )
    reconstruct = reconstruct or partial(_x_hat, sae, variables)
    n = evaluator.contexts_per_pass
    fit = Fit(intercept=intercept, seed=seed)
    for part in first.passes(n):
        x = evaluator.lm.run(part.tokens, read=(site,)).values[site]
        x, use = _wide(sae, x.reshape(-1, x.shape[-1])), part.use.reshape(-1)
        x_hat = reconstruct(x, use)
        fit.add(np.asarray(x)[use], np.asarray(x_hat)[use])
    score = Score(fit.finish(), seed=seed)

    def put_back(rows: dict[str, Array], part: HeldOut) -> dict[str, Array]:
        x, use = _wide(sae, rows[site]), part.use.reshape(-1)
        x_hat = reconstruct(x, use)
        score.add(np.asarray(x)[use], np.asarray(x_hat)[use])
        linear = jnp.asarray(score.parts.linear(np.asarray(x)), x.dtype)
        return {
            "spliced": x_hat,
            "with_linear": x_hat + linear,
            "with_nonlinear": x - linear,
        }

    scorer = Evaluator(evaluator.lm, second, contexts_per_pass=n)
    losses = scorer.splice(site, put_back)
    for name, clean in (("loss", losses["loss_clean"]), ("kl", 0.0)):
        whole, rest = losses[f"{name}_spliced"], losses[f"{name}_with_linear"]
        losses[f"linear_share_of_{name}"] = ratio(whole - rest, whole - clean)
    found = score.finish()
    return found._replace(scores=found.scores | losses)


def of_rows(
    x: Float[np.ndarray, "R D"],
    x_hat: Float[np.ndarray, "R D"],
    fitted: Bool[np.ndarray, " R"],
    *,
    intercept: bool = False,
    seed: int = 0,
) -> DarkMatter:
    """The same of rows in memory, without a language model; the others are scored."""
    fit = Fit(intercept=intercept, seed=seed)
    fit.add(x[fitted], x_hat[fitted])
    score = Score(fit.finish(), seed=seed)
    score.add(x[~fitted], x_hat[~fitted])
    return score.finish()


def require_autoencoder(sae: SAE) -> None:
    """Refuses a transcoder, whose error is in another space than what it reads."""
    if sae.is_transcoder:
        raise ValueError(
            f"{sae!r} is a transcoder: its error is no part of the rows that it reads, "
            f"so that no part of it is linear in what was to be reconstructed."
        )


def _targets(
    x: Float[np.ndarray, "B D"], x_hat: Float[np.ndarray, "B D"]
) -> Float[np.ndarray, "B D+1"]:
    """The error of rows and its squared norm, float64."""
    error = x.astype(np.float64) - x_hat
    return np.concatenate([error, np.square(error).sum(1, keepdims=True)], 1)


def _wide(sae: SAE, rows: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """In the type of the SAE's sums: no error should be one of rounding."""
    return rows.astype(sae.param_dtype)


@partial(jax.jit, static_argnums=0)
def _x_hat(
    sae: SAE, variables: Variables, x: Float[Array, "B D"], use: Bool[Array, " B"]
) -> Float[Array, "B D"]:
    """The SAE's own reconstruction, in the units of the rows."""
    out = sae.forward(variables, x, mask=use)
    return out.undo(out.x_hats[-1])
