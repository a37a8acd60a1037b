"""Top-AFA against TopK and BatchTopK: the claims of the paper, put to a run's numbers.

Lee et al. 2025 (arXiv:2503.24277) compare single runs by their training error, its last
value and its last 100 logged lines. That is done here in the same way, and beside it
what their test cannot say: the spread over seeds, on held-out rows. "Training error" is
the squared error of the treated rows, their normalised MSE where rows are standardised.

`finals` holds the last logged training errors of each SAE, by its name.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from sae_jax.evaluation import comparison
from sae_jax.evaluation.comparison import Contest, Setting
from sae_jax.report.comparison import label, short

TOP_AFA, OTHERS = "top_afa", ("topk", "batch_topk")
LEVEL = 0.05  # of p after Holm's correction
BEST = "The best Top-AFA has less error than the best TopK or BatchTopK"


class Claim(NamedTuple):
    """A claim of the paper, whether it holds here, and what was seen."""

    says: str
    verdict: str
    seen: list[str]


def between_runs(
    rows: Sequence[Mapping[str, Any]], finals: Mapping[str, np.ndarray]
) -> list[Contest]:
    """The paper's: the best runs by their last value, tested over their last values."""
    return comparison.contests(
        [one for row in rows for one in comparison.settings([row])],
        TOP_AFA,
        OTHERS,
        choose=lambda run: float(finals[run.names[0]][-1]),
        sample=lambda run: finals[run.names[0]],
    )


def between_seeds(
    settings: Sequence[Setting], finals: Mapping[str, np.ndarray]
) -> list[Contest]:
    """The best settings by training error, tested over held-out NMSE of their seeds."""
    return comparison.contests(
        settings,
        TOP_AFA,
        OTHERS,
        choose=lambda one: float(np.mean([finals[name].mean() for name in one.names])),
        sample=lambda one: one.nmse,
    )


def claims(
    settings: Sequence[Setting],
    runs: Sequence[Contest],
    seeds: Sequence[Contest],
    finals: Mapping[str, np.ndarray],
) -> list[Claim]:
    """What the paper says, and what these numbers say of it."""
    return [
        best_ends_lower(runs, finals),
        best_wins(runs, "the last training errors of one run, as the paper does"),
        best_wins(seeds, "the held-out NMSE of all seeds"),
        l0_rises(settings),
        no_k_to_tune(settings),
        lower_at_the_same_l0(settings),
    ]


def best_ends_lower(runs: Sequence[Contest], finals: Mapping[str, np.ndarray]) -> Claim:
    """The last value of the best run of either side."""
    outcomes, seen = [], []
    for first, second, *_ in runs:
        a, b = (float(finals[side.names[0]][-1]) for side in (first, second))
        outcomes.append(a < b)
        seen.append(f"{first.site}: {against(first, a, second, b)}.")
    return Claim(f"{BEST}, by the last value of one run.", verdict(outcomes), seen)


def best_wins(contests: Sequence[Contest], what: str) -> Claim:
    """Where there is a p: lower, and with a p below `LEVEL`."""
    outcomes, seen = [], []
    for first, second, test, p in contests:
        a, b = test.means
        ends = f"{first.site}: {against(first, a, second, b)}"
        if np.isfinite(p):
            outcomes.append(a < b and p < LEVEL)
            seen.append(f"{ends}, p = {p:.2g} after Holm's correction.")
        else:
            seen.append(f"{ends}; no p, so this is not counted.")
    return Claim(
        f"{BEST}, by a test (p < {LEVEL}) over {what}.", verdict(outcomes), seen
    )


def against(first: Setting, a: float, second: Setting, b: float) -> str:
    """Two settings, their values, and which is the lower one."""
    order = "lower" if a < b else "not lower"
    return f"{label(first)} {short(a)}, {label(second)} {short(b)}: {order}"


def l0_rises(settings: Sequence[Setting]) -> Claim:
    """Each step from one coefficient to the next counts, at each site."""
    outcomes, seen = [], []
    for site, group in by_site(settings, TOP_AFA).items():
        l0 = [float(one.l0.mean()) for one in group]
        steps = [b > a for a, b in pairwise(l0)]
        outcomes += steps
        listed = ", ".join(f"{x:.1f}" for x in l0)
        seen.append(
            f"{site}: L0 {listed} over coefficients {group[0].knob:g} to "
            f"{group[-1].knob:g}; {sum(steps)} of {len(steps)} steps rise."
        )
    return Claim("L0 of Top-AFA rises with its coefficient.", verdict(outcomes), seen)


def no_k_to_tune(settings: Sequence[Setting]) -> Claim:
    """How fast mean NMSE changes with the knob, of Top-AFA against each other rule.

    For each factor of two of the knob, since the ranges that are tried differ.
    """
    outcomes, seen = [], []
    own = by_site(settings, TOP_AFA)
    for rule in OTHERS:
        for site, group in by_site(settings, rule).items():
            if len(group) < 2 or len(own.get(site, [])) < 2:
                continue
            if min(own[site][0].knob, group[0].knob) <= 0:
                continue  # no factor leads from 0 to anything
            ours, theirs = per_doubling(own[site]), per_doubling(group)
            outcomes.append(ours < theirs)
            seen.append(
                f"{site}: from the least to the largest, NMSE changes by a factor of "
                f"{ours:.3g} for each doubling of the coefficient, and by {theirs:.3g} "
                f"for each doubling of k of {rule}."
            )
    return Claim(
        "NMSE changes less with the coefficient than with k, for each doubling. (A "
        "doubling of k is one of L0; one of the coefficient may hardly move it.)",
        verdict(outcomes),
        seen,
    )


def lower_at_the_same_l0(settings: Sequence[Setting]) -> Claim:
    """Every coefficient against each other rule, interpolated to its L0."""
    outcomes, seen = [], []
    own = by_site(settings, TOP_AFA)
    for rule in OTHERS:
        for site, group in by_site(settings, rule).items():
            curve = [np.array([s.l0.mean(), s.nmse.mean()]) for s in group]
            l0, nmse = np.stack(curve, axis=1)
            ratios = np.array(
                [
                    one.nmse.mean() / comparison.at_l0(l0, nmse, float(one.l0.mean()))
                    for one in own.get(site, [])
                ]
            )
            inside = ratios[np.isfinite(ratios)]
            outcomes += [bool(ratio < 1) for ratio in inside]
            text = f"{site}, against {rule}: "
            if inside.size:
                text += (
                    f"{inside.min():.3g} to {inside.max():.3g} times its NMSE at the "
                    f"same L0, less at {np.sum(inside < 1)} of {inside.size}"
                )
            else:
                text += "no coefficient can be compared"
            if left := len(ratios) - inside.size:
                text += f" ({left} outside of its L0)"
            seen.append(f"{text}.")
    return Claim(
        "At the same L0 Top-AFA has less NMSE than TopK and BatchTopK. (Theirs is "
        "taken from straight lines between the k that are tried, in log-log axes.)",
        verdict(outcomes),
        seen,
    )


def by_site(settings: Sequence[Setting], rule: str) -> dict[str, list[Setting]]:
    """The settings of a rule at each site, by knob; diverged ones are left out."""
    found: dict[str, list[Setting]] = {}
    for one in sorted(settings, key=lambda one: one.knob):
        if one.rule == rule:
            group = found.setdefault(one.site, [])
            if np.isfinite([*one.l0, *one.nmse]).all():
                group.append(one)
    return {site: group for site, group in found.items() if group}


def per_doubling(group: Sequence[Setting]) -> float:
    """The largest mean NMSE over the least, spread over the doublings of the knob."""
    means = [float(one.nmse.mean()) for one in group]
    doublings = math.log2(group[-1].knob / group[0].knob)
    return (max(means) / min(means)) ** (1 / doublings)


def verdict(outcomes: Iterable[bool]) -> str:
    """Of comparisons that the claim says are all true."""
    found = list(outcomes)
    if not found:
        return "not tested"
    return "holds" if all(found) else "mixed" if any(found) else "does not hold"
