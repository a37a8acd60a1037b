"""Test 2, sparse control: an attribute is edited by exchanging few features.

Makelov, Lange, Nanda 2024, arXiv:2405.08366. Of a row a_s and its counterfactual a_t,
which differs in one attribute, with strengths f_s and f_t (in the activations' units),

    edited = a_s + sum_{j chosen} (f_t[j] - f_s[j]) d_j

for at most k chosen features, each the one that brings the edited row nearest to a_t,
given those before. A removal and an addition of one feature are one exchange, and a
feature is chosen once. It is chosen only if the distance falls, so that with fewer
than k of use there are fewer. With k = 0 nothing is edited.

    agreement   how often the model, patched with edited rows, predicts what it
                predicts when patched with a_t itself
    weight      f_s[j] d_j . (a_hat_s - b) / ||a_hat_s - b||^2, b the dictionary's bias,
                summed over chosen features that were active in a_s: the share of the
                reconstruction that is taken away. All features together have 1.

The edited row keeps what the dictionary does not explain of a_s.

Differs: greedy as in the authors' code, but for the stop where nothing helps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_jax.analysis.principled.supervised import Decomposed

NONE = -1


class Edited(NamedTuple):
    """What was exchanged.

    Attributes:
      chosen: the features in order; -1 where none helps any more.
      distance: ||edited - a_t|| after 0, 1, ... of them.
    """

    chosen: Int[np.ndarray, "N K"]
    distance: Float[np.ndarray, "N K+1"]


def greedy(
    a_s: Float[np.ndarray, "N D"],
    a_t: Float[np.ndarray, "N D"],
    source: Decomposed,
    target: Decomposed,
    k: int,
) -> Edited:
    """The features to exchange, one after another."""
    directions = source.directions
    change = target.strengths - source.strengths
    squares = np.square(directions).sum(1) * np.square(change)
    rest = a_s.astype(np.float64) - a_t
    free = change != 0
    chosen = np.full((len(rest), k), NONE)
    distance = [np.linalg.norm(rest, axis=1)]
    every = np.arange(len(rest))
    for step in range(k):
        # ||rest + c||^2 - ||rest||^2, of every contribution c that is not used yet.
        gain = np.where(free, 2 * change * (rest @ directions.T) + squares, np.inf)
        best = gain.argmin(1)
        helps = gain[every, best] < 0
        chosen[helps, step] = best[helps]
        free[every, best] = False
        moved = change[every, best, None] * directions[best]
        rest = rest + np.where(helps[:, None], moved, 0)
        distance.append(np.linalg.norm(rest, axis=1))
    return Edited(chosen, np.stack(distance, 1))


def exchanged(
    a_s: Float[np.ndarray, "N D"],
    source: Decomposed,
    target: Decomposed,
    chosen: Int[np.ndarray, "N K"],
) -> Float[np.ndarray, "N D"]:
    """The rows with these features of the target in place of those of the source."""
    change = target.strengths - source.strengths
    return a_s + (change * _mask(chosen, change.shape)) @ source.directions


def removed_weight(
    source: Decomposed, chosen: Int[np.ndarray, "N K"]
) -> Float[np.ndarray, " N"]:
    """The share of the reconstruction that chosen features had."""
    return (weights(source) * _mask(chosen, source.strengths.shape)).sum(1)


def weights(source: Decomposed) -> Float[np.ndarray, "N F"]:
    """The share of each feature in the reconstruction; they sum to 1."""
    along = source.x_hat - source.bias
    squares = np.square(along).sum(1, keepdims=True)
    shares = source.strengths * (along @ source.directions.T)
    return np.divide(shares, squares, out=np.zeros_like(shares), where=squares > 0)


def highest(
    source: Decomposed,
    target: Decomposed,
    of_source: Float[np.ndarray, "N F"],
    of_target: Float[np.ndarray, "N F"],
    k: int,
) -> Float[np.ndarray, "N D"]:
    """What to add: k active features of the target less k of the source.

    Of each those with the highest scores; how well they tell the attribute's value.
    """

    def top(row: Decomposed, scores: np.ndarray) -> np.ndarray:
        shown = np.where(row.strengths != 0, scores, -np.inf)
        k_here = min(k, shown.shape[1])
        chosen = np.argpartition(-shown, k_here - 1, axis=1)[:, :k_here]
        mask = _mask(chosen, shown.shape) & np.isfinite(shown)
        return (row.strengths * mask) @ row.directions

    return top(target, of_target) - top(source, of_source)


def _mask(chosen: Int[np.ndarray, "N K"], shape: Sequence[int]) -> np.ndarray:
    mask = np.zeros((shape[0], shape[1] + 1), bool)  # the last column is for NONE
    mask[np.arange(len(mask))[:, None], chosen] = True
    return mask[:, :-1]
