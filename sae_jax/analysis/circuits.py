r"""Which heads do a task, by the codes that only prompts with the task bring forth.

O'Neill, Bui 2024, arXiv:2405.12522: prompts on which a model can do a task (positive)
and others of the same form on which it cannot (negative); one sparse autoencoder of the
outputs of all heads makes an integer of each; heads whose integers differ between the
two kinds are in the circuit, and so are pairs of heads by pairs of integers.

How vectors are made, what an integer is and how heads are scored could not be found.
What stands here is ours:

    vector  output of a head, the mean over positions or the last, each coordinate
            standardised over all heads and prompts
    code    argmax_j f_j, and NONE, a symbol of its own, where all f are 0
    node    |C+ \ C-| / |C+ u C-|, C the set of codes of a head over prompts
    edge    |P+ \ P-| / |P+ u P-|, P the set of pairs of codes of two heads

A head is chosen where its score, or its share in a softmax over all heads, is at least
a threshold. Unions of few prompts are small and ties common: areas under the ROC curve
count them as half. Beside every score stands what prompts give whose kind is drawn by
lot (`shuffled`).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_jax.analysis.ranking import auroc, f1

NONE = -1
THRESHOLD = 0.25  # kinds that share no code, of as many each, have a score of a half


class Scores(NamedTuple):
    """Of each head, and of each pair of heads (symmetric, 0 on the diagonal)."""

    nodes: Float[np.ndarray, " H"]
    edges: Float[np.ndarray, "H H"]


class Found(NamedTuple):
    """How well scores know a circuit; NaN where nothing, or all, belongs to it."""

    node_auc: float
    edge_auc: float
    node_f1: float


def standardised(vectors: Float[np.ndarray, "N H d"]) -> Float[np.ndarray, "NH d"]:
    """All vectors as rows, each coordinate of mean 0 and variance 1."""
    rows = vectors.reshape(-1, vectors.shape[-1]).astype(np.float64)
    spread = rows.std(0)
    rows = (rows - rows.mean(0)) / np.where(spread > 0, spread, 1)
    return rows.astype(np.float32)


def discrete(codes: Float[np.ndarray, "*n F"]) -> Int[np.ndarray, "*n"]:
    """The strongest feature of each row, or NONE."""
    codes = np.asarray(codes)
    return np.where((codes > 0).any(-1), codes.argmax(-1), NONE)


def overlap(positive: set, negative: set) -> float:
    """The share of all symbols that only the first has; 0 where there are none."""
    union = positive | negative
    return len(positive - negative) / len(union) if union else 0.0


def scores(
    positive: Int[np.ndarray, "P H"], negative: Int[np.ndarray, "N H"]
) -> Scores:
    """The scores of heads and of pairs, from the codes of both kinds of prompts."""
    n = positive.shape[1]
    both = [part.T.tolist() for part in (positive, negative)]
    nodes = np.array([overlap({*both[0][h]}, {*both[1][h]}) for h in range(n)])
    edges = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1, n):
            pairs = [{*zip(part[i], part[j], strict=True)} for part in both]
            edges[i, j] = edges[j, i] = overlap(*pairs)
    return Scores(nodes, edges)


def chosen(
    nodes: Float[np.ndarray, " H"], threshold: float, *, softmax: bool = False
) -> Bool[np.ndarray, " H"]:
    """The heads in the circuit; with `softmax` the threshold is for shares of all."""
    if softmax:
        weights = np.exp(nodes - nodes.max())
        nodes = weights / weights.sum()
    return nodes >= threshold


def found(
    scored: Scores,
    circuit: Bool[np.ndarray, " H"],
    *,
    threshold: float = THRESHOLD,
    softmax: bool = False,
) -> Found:
    """Scores held against a known circuit; an edge is in it where both heads are."""
    first, second = np.triu_indices(len(circuit), 1)
    edges, inside = scored.edges[first, second], circuit[first] & circuit[second]
    return Found(
        _auc(scored.nodes, circuit),
        _auc(edges, inside),
        f1(chosen(scored.nodes, threshold, softmax=softmax), circuit),
    )


def _auc(values: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> float:
    if right.all() or not right.any():
        return math.nan
    return auroc(values[right], values[~right])


def shuffled(
    positive: Int[np.ndarray, "P H"],
    negative: Int[np.ndarray, "N H"],
    circuit: Bool[np.ndarray, " H"],
    *,
    threshold: float = THRESHOLD,
    softmax: bool = False,
    times: int = 10,
    seed: int = 0,
) -> Found:
    """`found` where it is drawn which prompts are positive; the mean of some draws."""
    rng, both = np.random.default_rng(seed), np.concatenate([positive, negative])
    rows = []
    for _ in range(times):
        mixed = rng.permutation(both)
        halves = mixed[: len(positive)], mixed[len(positive) :]
        scored = scores(*halves)
        rows.append(found(scored, circuit, threshold=threshold, softmax=softmax))
    return Found(*(float(value) for value in np.mean(rows, axis=0)))
