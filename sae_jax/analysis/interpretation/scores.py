"""How true an explanation is: what a judge expects, against what the feature did.

    detection   does the feature fire in this window?            per window
    fuzzing     are the marked tokens those that it fires on?     per window
    simulation  how strongly does it fire on each token?          per token

The first two are numbers of `Truth`: the area under the ROC curve (the chance that a
right example gets a larger probability than a wrong one, ties counted as half) and
balanced accuracy at .5. Simulation is Pearson's correlation over all tokens of the
tested windows (Bills et al. 2023).

Answers that a judge could not give (None) are left out and counted. `shuffled` gives
what the same judge makes of explanations of other features on the same windows, and
stands beside every score: a judge that says yes to common tokens is found out by it.

Differs from the paper's code: wrong marks stand in windows in which the feature fires,
on tokens where it does not reach the threshold, as many as the right windows have on
average; the code takes windows of both kinds, and its marks are correlated across
examples.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_jax.analysis.interpretation.token_rules import Explanation
from sae_jax.analysis.interpretation.windows import Examples, Windows, marked
from sae_jax.analysis.ranking import auroc

THRESHOLD = 0.3  # of the feature's highest: tokens above are marked (the paper's code)


@runtime_checkable
class Judge(Protocol):
    """What says from an explanation alone what to expect of text.

    Probabilities, or None where there is no answer.
    """

    def detect(
        self, explanation: Explanation, tokens: Int[np.ndarray, "n L"]
    ) -> Sequence[float | None]:
        """How likely the feature fires in each window."""

    def fuzz(
        self,
        explanation: Explanation,
        tokens: Int[np.ndarray, "n L"],
        marks: Bool[np.ndarray, "n L"],
    ) -> Sequence[float | None]:
        """How likely the marked tokens are those that it fires on."""

    def simulate(
        self, explanation: Explanation, tokens: Int[np.ndarray, "n L"]
    ) -> Float[np.ndarray, "n L"]:
        """How strongly it is expected to fire on each token, up to a factor."""


class Truth(NamedTuple):
    """How well right examples were told from wrong ones; NaN where one kind is missing.

    Attributes:
      auroc: area under the ROC curve.
      accuracy: mean of the shares of right and of wrong examples judged so at .5.
      n_right: right examples that were answered.
      n_wrong: wrong examples that were answered.
      n_failed: examples without an answer.
    """

    auroc: float
    accuracy: float
    n_right: int
    n_wrong: int
    n_failed: int


class Scores(NamedTuple):
    """What an explanation is worth."""

    detection: Truth
    fuzzing: Truth
    simulation: float


def truth(right: Sequence[float | None], wrong: Sequence[float | None]) -> Truth:
    """The numbers of `Truth` from probabilities."""
    yes = np.array([p for p in right if p is not None], np.float64)
    no = np.array([p for p in wrong if p is not None], np.float64)
    failed = len(right) + len(wrong) - len(yes) - len(no)
    if not len(yes) or not len(no):
        return Truth(math.nan, math.nan, len(yes), len(no), failed)
    accuracy = ((yes >= 0.5).mean() + (no < 0.5).mean()) / 2
    return Truth(auroc(yes, no), float(accuracy), len(yes), len(no), failed)


def score(judge: Judge, explanation: Explanation, examples: Examples) -> Scores:
    """All three scores of an explanation of a feature."""
    on, off = examples.on, examples.off
    detection = truth(
        judge.detect(explanation, on.tokens), judge.detect(explanation, off.tokens)
    )
    right, wrong = marks(examples)
    fuzzing = truth(
        judge.fuzz(explanation, right.tokens, right.values > 0),
        judge.fuzz(explanation, wrong.tokens, wrong.values > 0),
    )
    tokens = np.concatenate([on.tokens, off.tokens])
    values = np.concatenate([on.values, off.values])
    return Scores(
        detection, fuzzing, correlation(judge.simulate(explanation, tokens), values)
    )


def shuffled(
    judge: Judge,
    explanations: Sequence[Explanation],
    examples: Sequence[Examples],
    *,
    seed: int = 0,
) -> list[Scores]:
    """The scores where each feature gets the explanation of another one."""
    if len(explanations) < 2:
        return []
    order = np.random.default_rng(seed).permutation(len(explanations))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)  # one circle: nobody keeps the own one
    return [score(judge, explanations[other[i]], one) for i, one in enumerate(examples)]


def marks(examples: Examples) -> tuple[Windows, Windows]:
    """Windows with right marks and windows with wrong ones: values 1 where marked.

    Every second tested window in which the feature reaches the threshold has right
    marks, the others wrong ones, if they have room for them.
    """
    threshold = THRESHOLD * examples.highest
    where = marked(examples.on, threshold)
    reaching = np.flatnonzero(where.any(1))
    right, candidates = reaching[::2], reaching[1::2]
    n = math.ceil(where[right].sum(1).mean()) if len(right) else 0
    rng = np.random.default_rng(examples.feature)
    wrong, false = [], []
    for i in candidates:
        free = np.flatnonzero(~where[i])
        if len(free) >= n:
            row = np.zeros(where.shape[1])
            row[rng.choice(free, n, replace=False)] = 1
            wrong.append(i)
            false.append(row)
    tokens = examples.on.tokens
    return (
        Windows(tokens[right], where[right].astype(np.float64)),
        Windows(
            tokens[np.array(wrong, int)],
            np.array(false).reshape(len(wrong), where.shape[1]),
        ),
    )


def correlation(
    expected: Float[np.ndarray, "n L"], values: Float[np.ndarray, "n L"]
) -> float:
    """Pearson's, over all tokens; 0 where nothing is expected to differ."""
    a, b = expected - expected.mean(), values - values.mean()
    size = math.sqrt((a * a).sum() * (b * b).sum()) if a.size else 0.0
    return float((a * b).sum() / size) if size > 0 else 0.0
