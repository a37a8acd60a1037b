"""Test 3, interpretability: which property of the prompt a feature tells.

Makelov, Lange, Nanda 2024, arXiv:2405.08366. Of feature j, active in some prompts, and
a property P of prompts,

    F1 = 2 |active and P| / (|active| + |P|)        0 where both are empty

Properties are single values of attributes, their intersections with the values of an
attribute that has two, and unions of values of one attribute, which grow greedily, up
to 10 values (30 for SAEs of text), as long as F1 rises. A feature is said to mean the
property of the highest F1. One that always fires has 2 p / (1 + p), p the share of P.

Differs: the paper takes the maximum over properties on the prompts that it reports.
Here the property is chosen on some prompts and its F1 counted on others, since the
maximum over so many properties is high by chance alone; `shuffled` says how high.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from sae_jax.analysis.principled.supervised import Values, indicators

MOST_IN_UNION, MOST_IN_UNION_OF_TEXT = 10, 30
MOST_CROSSED = 2  # values of an attribute that others are crossed with

Active = Bool[np.ndarray, "N F"]


class Property(NamedTuple):
    """Some values of each attribute that is named; all of them must hold."""

    values: tuple[tuple[str, tuple[int, ...]], ...]

    def holds(self, values: Values) -> Bool[np.ndarray, " N"]:
        """In which prompts it does."""
        each = [np.isin(values[name], among) for name, among in self.values]
        return np.logical_and.reduce(each)

    def text(self, choices: Mapping[str, Sequence[str]]) -> str:
        """As words."""
        return " and ".join(
            f"{name} is " + " or ".join(repr(choices[name][v]) for v in among)
            for name, among in self.values
        )


class Meaning(NamedTuple):
    """What features mean.

    Attributes:
      chosen: the property of each feature; None of one that never fired.
      f1: of each feature on other prompts.
      of_values: F1 of each feature for each single value there, by attribute.
    """

    chosen: list[Property | None]
    f1: Float[np.ndarray, " F"]
    of_values: dict[str, Float[np.ndarray, "F V"]]


def f1(
    both: ArrayLike, active: ArrayLike, holds: ArrayLike
) -> Float[np.ndarray, "..."]:
    """F1 of counts; 0 where nothing is active and nothing holds."""
    total = np.add(active, holds)
    twice, total = np.broadcast_arrays(np.multiply(2.0, both), total)
    return np.divide(twice, total, out=np.zeros(total.shape), where=total > 0)


def of_values(
    active: Active, values: Values, sizes: Mapping[str, int]
) -> dict[str, Float[np.ndarray, "F V"]]:
    """F1 of each feature for each single value, by attribute."""
    fired = active.astype(np.float64)
    found = {}
    for name, size in sizes.items():
        on = indicators(values, {name: size})
        found[name] = f1(fired.T @ on, fired.sum(0)[:, None], on.sum(0))
    return found


def meaning(
    active: Active,
    values: Values,
    other_active: Bool[np.ndarray, "M F"],
    other_values: Mapping[str, Int[np.ndarray, " M"]],
    sizes: Mapping[str, int],
    *,
    most: int = MOST_IN_UNION,
) -> Meaning:
    """Chooses a property for each feature, and counts its F1 on other prompts."""
    best = np.zeros(active.shape[1])
    chosen: list[Property | None] = [None] * len(best)
    candidates = [_intersections(active, values, sizes)]
    candidates += [_unions(active, values, name, sizes[name], most) for name in sizes]
    for score, named in candidates:
        for j in np.flatnonzero(score > best):
            best[j], chosen[j] = score[j], named[j]
    found = np.zeros(len(best))
    for said in {p for p in chosen if p is not None}:
        holds = said.holds(other_values)
        mine = [j for j, p in enumerate(chosen) if p == said]
        fired = other_active[:, mine]
        both = (fired & holds[:, None]).sum(0)
        found[mine] = f1(both, fired.sum(0), holds.sum())
    return Meaning(chosen, found, of_values(other_active, other_values, sizes))


def shuffled(values: Values, *, seed: int = 0) -> dict[str, Int[np.ndarray, " N"]]:
    """The same labels on other prompts, all attributes of one together."""
    n = len(next(iter(values.values())))
    order = np.random.default_rng(seed).permutation(n)
    return {name: labels[order] for name, labels in values.items()}


def _intersections(
    active: Active, values: Values, sizes: Mapping[str, int]
) -> tuple[np.ndarray, list[Property | None]]:
    """The best crossing of a value with one of an attribute of few values."""
    fired = active.astype(np.float64)
    n_fired = fired.sum(0)
    best = np.zeros(len(n_fired))
    named: list[Property | None] = [None] * len(best)
    for first, second in combinations(sizes, 2):
        if min(sizes[first], sizes[second]) > MOST_CROSSED:
            continue
        for v in range(sizes[first]):
            for w in range(sizes[second]):
                said = Property(((first, (v,)), (second, (w,))))
                holds = said.holds(values)
                score = f1(holds @ fired, n_fired, holds.sum())
                for j in np.flatnonzero(score > best):
                    best[j], named[j] = score[j], said
    return best, named


def _unions(
    active: Active, values: Values, name: str, size: int, most: int
) -> tuple[np.ndarray, list[Property | None]]:
    """The best union of values of one attribute, grown value by value."""
    fired, on = active.astype(np.float64), indicators(values, {name: size})
    both, n_fired, n_on = fired.T @ on, fired.sum(0)[:, None], on.sum(0)
    every = np.arange(len(both))
    taken = np.zeros(both.shape, bool)
    best = np.zeros(len(both))
    # All values together would be no property.
    for _ in range(min(most, size - 1)):
        more = (taken * both).sum(1)[:, None] + both
        score = f1(more, n_fired, (taken * n_on).sum(1)[:, None] + n_on)
        score[taken] = -1
        value = score.argmax(1)
        rises = score[every, value] > best
        if not rises.any():
            break
        best[rises] = score[every, value][rises]
        taken[every[rises], value[rises]] = True
    named: list[Property | None] = [
        Property(((name, tuple(np.flatnonzero(row).tolist())),)) if row.any() else None
        for row in taken
    ]
    return best, named
