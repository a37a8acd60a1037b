"""Comparing sparsity rules over settings and seeds: what differs, and how surely.

A setting is one rule with one knob at one site, trained with some seeds. At each site
the best setting of one rule stands against the best of others. What no p-value of this
file knows:

* The best were chosen among many, and p treats them as if they had been fixed before.
  Choosing by other rows than those that are tested (training against held-out ones)
  takes the luck of the rows out of it, not that of the seeds.
* Seeds that share their batches differ in their starts alone: the spread over them is
  smaller than that over repetitions with other data.
* Successive values of one training run are autocorrelated, so their number is no
  sample size. A test over them says whether two curves lie apart where they end.

There is no paired test. Batches that are the same for all seeds do not vary, so pairs
would share the start of a seed alone, at the price of half the degrees of freedom. Over
steps, both runs see the same batches, which an unpaired test counts as noise of both.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special


class Setting(NamedTuple):
    """One rule with one knob at one site; NaN where a score was not measured.

    Attributes:
      names: its SAEs, one a seed.
      l0: active features per row of each of them.
      nmse: normalised error of each of them.
    """

    rule: str
    knob: float
    site: str
    n_features: int
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    l0: Float[np.ndarray, " S"]
    nmse: Float[np.ndarray, " S"]


class Welch(NamedTuple):
    """Welch's t-test of two samples; NaN where there is no answer.

    Attributes:
      means: of both samples.
      counts: of both samples.
      t: the statistic; negative if the first mean is the smaller one.
      df: degrees of freedom (Welch and Satterthwaite).
      p: two-sided.
      effect: difference of the means over the root of the mean variance (Cohen's d).
    """

    means: tuple[float, float]
    counts: tuple[int, int]
    t: float
    df: float
    p: float
    effect: float


class Contest(NamedTuple):
    """The best setting of a rule against the best of others, at one site.

    `p_holm` is p after Holm's correction for the number of sites.
    """

    first: Setting
    second: Setting
    test: Welch
    p_holm: float = math.nan


def settings(rows: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """The settings that rows of results belong to, in order; a row is an SAE."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = row["rule"], float(row["knob"]), row["site"], row["n_features"]
        groups.setdefault(key, []).append(row)
    return [
        Setting(
            rule=rule,
            knob=knob,
            site=site,
            n_features=int(n_features),
            names=tuple(row["name"] for row in group),
            seeds=tuple(int(row["seed"]) for row in group),
            l0=np.array([row.get("l0") for row in group], float),
            nmse=np.array([row.get("nmse") for row in group], float),
        )
        for (rule, knob, site, n_features), group in groups.items()
    ]


def best(
    candidates: Sequence[Setting], score: Callable[[Setting], float]
) -> Setting | None:
    """The setting of the least score; one that is not finite is never the best."""
    finite = [one for one in candidates if math.isfinite(score(one))]
    return min(finite, key=score) if finite else None


def contests(
    candidates: Sequence[Setting],
    rule: str,
    others: Sequence[str],
    *,
    choose: Callable[[Setting], float],
    sample: Callable[[Setting], Float[np.ndarray, " N"]],
) -> list[Contest]:
    """Per site the best of `rule` against the best of `others`, Holm over the sites.

    Args:
      candidates: all settings.
      rule: the rule whose best is the first of each contest.
      others: the rules whose best is the second.
      choose: what makes a setting the best: least is best.
      sample: the values of a setting that the test compares.

    Returns:
      One contest per site. A site where one side has no finite setting has none.
    """
    found = []
    for site in dict.fromkeys(one.site for one in candidates):
        here = [one for one in candidates if one.site == site]
        first = best([one for one in here if one.rule == rule], choose)
        second = best([one for one in here if one.rule in others], choose)
        if first is not None and second is not None:
            found.append(Contest(first, second, welch(sample(first), sample(second))))
    corrected = holm(np.array([contest.test.p for contest in found]))
    return [
        contest._replace(p_holm=float(p))
        for contest, p in zip(found, corrected, strict=True)
    ]


def welch(a: Float[np.ndarray, " A"], b: Float[np.ndarray, " B"]) -> Welch:
    """Welch's t-test, two-sided, for samples whose variances need not agree.

        v = s^2 / n,  t = (mean_a - mean_b) / sqrt(v_a + v_b)
        df = (v_a + v_b)^2 / (v_a^2 / (n_a - 1) + v_b^2 / (n_b - 1))

    NaN for t, df, p and effect if a sample has fewer than two values, if neither
    varies, or if a value is not finite: a diverged run has no mean to compare.
    """
    means, counts = (_mean(a), _mean(b)), (len(a), len(b))
    no_answer = Welch(means, counts, *[math.nan] * 4)
    if min(counts) < 2 or not np.isfinite([*a, *b]).all():
        return no_answer
    if np.ptp(a) == 0 == np.ptp(b):
        return no_answer
    variances = np.array([a.var(ddof=1), b.var(ddof=1)])
    parts = variances / counts
    t = (means[0] - means[1]) / math.sqrt(parts.sum())
    df = parts.sum() ** 2 / (parts**2 / (np.array(counts) - 1)).sum()
    p = 2 * special.stdtr(df, -abs(t))  # the lower tail of Student's t
    effect = (means[0] - means[1]) / math.sqrt(variances.mean())
    return Welch(means, counts, t, float(df), float(p), effect)


def holm(p: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """p-values after Holm's step-down correction (Holm 1979), in the order given.

    The i-th smallest of m becomes `max over j <= i of (m - j + 1) p_j`, at most 1. NaN
    stays NaN and does not count among the m.
    """
    order = np.argsort(p)  # NaN comes last
    factors = np.isfinite(p).sum() - np.arange(len(p))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return corrected


def at_l0(
    l0: Float[np.ndarray, " N"], nmse: Float[np.ndarray, " N"], wanted: float
) -> float:
    """NMSE at a wanted L0, on straight lines between the points in log-log axes.

    NaN outside of the points. Where the curve bends down, as it does towards many
    features, the line lies below it and the true value is larger, if anything; where it
    bends up, as it can towards few, smaller.
    """
    usable = np.isfinite(l0) & np.isfinite(nmse) & (l0 > 0) & (nmse > 0)
    if not usable.any() or not wanted > 0:
        return math.nan
    x, y = np.log(l0[usable]), np.log(nmse[usable])
    order = np.argsort(x)
    x, y = x[order], y[order]
    return float(np.exp(np.interp(np.log(wanted), x, y, left=np.nan, right=np.nan)))


def _mean(values: Float[np.ndarray, " N"]) -> float:
    return float(values.mean()) if len(values) else math.nan
