"""A label for every feature of an SAE, without asking anybody, and its scores."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sae_jax.analysis.interpretation.scores import Scores, score, shuffled
from sae_jax.analysis.interpretation.token_rules import RuleJudge, TokenRules
from sae_jax.analysis.interpretation.windows import Sampler
from sae_jax.evaluation.firings import Firings

TRUE = 0.8  # an area under the ROC curve that a reader may rely on; chosen, untested


class Labels(NamedTuple):
    """One entry for each feature; NaN where there is too little text to say.

    Attributes:
      text: the rule in words; empty if the feature never fires.
      f1: of the rule, on the half of the text that it was found in.
      detection: area under the ROC curve, on the other half.
      fuzzing: the same for marked tokens.
      detection_shuffled: detection with another feature's label.
      fuzzing_shuffled: fuzzing with another feature's label.
    """

    text: list[str]
    f1: Float[np.ndarray, " F"]
    detection: Float[np.ndarray, " F"]
    fuzzing: Float[np.ndarray, " F"]
    detection_shuffled: Float[np.ndarray, " F"]
    fuzzing_shuffled: Float[np.ndarray, " F"]


def label(
    firings: Firings, token_texts: Sequence[str], *, length: int = 32, seed: int = 0
) -> Labels:
    """Labels all features by rules of tokens; see `windows` and `token_rules`."""
    sampler = Sampler(firings, length=length, seed=seed)
    explain, judge = TokenRules(sampler, token_texts), RuleJudge()
    alive = np.flatnonzero(np.diff(firings.starts)).tolist()
    # Rules look at all firings; no windows need to be shown.
    examples = [sampler(feature, n_shown=0) for feature in alive]
    explanations = [explain(one) for one in examples]
    found = Labels(
        [""] * firings.n_features,
        *(np.full(firings.n_features, math.nan) for _ in Labels._fields[1:]),
    )
    for feature, explanation in zip(alive, explanations, strict=True):
        found.text[feature] = explanation.text
        if explanation.rule is not None:
            found.f1[feature] = explanation.rule.f1
    own = [score(judge, *pair) for pair in zip(explanations, examples, strict=True)]
    others = shuffled(judge, explanations, examples, seed=seed)
    _fill(found.detection, found.fuzzing, alive, own)
    if others:
        _fill(found.detection_shuffled, found.fuzzing_shuffled, alive, others)
    return found


def _fill(
    detection: Float[np.ndarray, " F"],
    fuzzing: Float[np.ndarray, " F"],
    features: list[int],
    scores: list[Scores],
) -> None:
    detection[features] = [one.detection.auroc for one in scores]
    fuzzing[features] = [one.fuzzing.auroc for one in scores]


def summary(found: Labels) -> str:
    """What the labels of an SAE are worth, in a few lines."""

    def line(name: str, own: np.ndarray, others: np.ndarray) -> str:
        told = np.isfinite(own)
        if not told.any():
            return f"{name}: too little text to say"
        return (
            f"{name}: median area under the ROC curve {np.median(own[told]):.2f} "
            f"(labels of other features {_median(others):.2f}), at least {TRUE} for "
            f"{(own[told] >= TRUE).mean():.0%} of {told.sum():,} features"
        )

    return "\n".join(
        [
            line("detection", found.detection, found.detection_shuffled),
            line("fuzzing", found.fuzzing, found.fuzzing_shuffled),
        ]
    )


def _median(values: np.ndarray) -> float:
    told = values[np.isfinite(values)]
    return float(np.median(told)) if len(told) else math.nan
