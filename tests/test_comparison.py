"""Comparing rules: tests by hand, tables where the outcome is planted, the paper's own.

SAE_JAX_PAPER_CSV names the folder of the authors' recordings.
"""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import _claims as claims
from experiments import _comparison
from sae_jax.evaluation import comparison
from sae_jax.evaluation.comparison import at_l0, holm, welch
from sae_jax.report import comparison as report

NAN = math.nan


def row(rule, knob, nmse, l0=None, site="here", seed=0, n_features=1024):
    return {
        "name": f"{rule}-{knob:g}-{site}-{seed}",
        "rule": rule,
        "knob": knob,
        "site": site,
        "seed": seed,
        "n_features": n_features,
        "l0": knob if l0 is None else l0,
        "nmse": nmse,
        "loss_recovered": 1 - nmse,
    }


def planted(worse=1.0, rise=1.0, seeds=(0, 1, 2), site="here"):
    """TopK and BatchTopK on NMSE = 8 / L0; Top-AFA on `worse` times that line."""
    rows = []
    for seed in seeds:
        luck = 1 + 0.01 * (seed - 1)  # the mean over three seeds is 1
        for k in (10, 20, 40):
            rows += [row("topk", k, luck * 8 / k, site=site, seed=seed)]
            rows += [row("batch_topk", k, luck * 8 / k, site=site, seed=seed)]
        for i, coef in enumerate((0.25, 0.5)):
            l0 = 30 + i * rise
            nmse = luck * worse * 8 / l0
            rows += [row("top_afa", coef, nmse, l0, site=site, seed=seed)]
    return rows


def history(rows, n=6):
    """Training errors that swing around the held-out ones, and end at them."""
    return {
        one["name"]: [
            {"l0": one["l0"], "loss_mse": one["nmse"] * (1 + 0.01 * (-1) ** t * t / n)}
            for t in reversed(range(n))
        ]
        for one in rows
    }


def verdicts(rows):
    finals = _comparison.last_values(rows, history(rows), 5)
    settings = comparison.settings(rows)
    runs = claims.between_runs(rows, finals)
    seeds = claims.between_seeds(settings, finals)
    return [one.verdict for one in claims.claims(settings, runs, seeds, finals)]


# Statistics.


def test_welch_by_hand():
    """Variances 1 and 20/3 of three and four values; 1/3 + 5/3 = 2."""
    test = welch(np.array([1.0, 2, 3]), np.array([2.0, 4, 6, 8]))
    assert (test.means, test.counts) == ((2, 5), (3, 4))
    # Each of the numbers below is rounded a few times.
    np.testing.assert_allclose(test.t, -3 / math.sqrt(2), rtol=1e-14)
    np.testing.assert_allclose(test.df, 4 / (1 / 18 + 25 / 27), rtol=1e-14)
    np.testing.assert_allclose(test.effect, -3 / math.sqrt(23 / 6), rtol=1e-14)


def test_p_by_hand():
    """At two degrees of freedom, p = 1 - |t| / sqrt(t^2 + 2)."""
    test = welch(np.array([0.0, 2]), np.array([3.0, 5]))
    assert test.df == 2
    np.testing.assert_allclose(test.p, 1 - math.sqrt(4.5 / 6.5), rtol=1e-12)


def test_welch_is_that_of_scipy():
    rng = np.random.default_rng(0)
    for n, m in ((2, 3), (3, 3), (20, 100)):
        a, b = rng.normal(0, 1, n), rng.normal(0.5, 3, m)
        ours, theirs = welch(a, b), stats.ttest_ind(a, b, equal_var=False)
        expected = theirs.statistic, theirs.df, theirs.pvalue
        np.testing.assert_allclose((ours.t, ours.df, ours.p), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0], [2.0, 3.0]),
        ([], [2.0, 3.0]),
        ([0.1, 0.1, 0.1], [0.3, 0.3, 0.3]),  # var() of these is not zero
        ([1.0, NAN], [2.0, 3.0]),
        ([1.0, math.inf], [2.0, 3.0]),
    ],
)
def test_where_there_is_no_answer_none_is_given(a, b):
    for test in (welch(np.array(a), np.array(b)), welch(np.array(b), np.array(a))):
        assert np.isnan([test.t, test.df, test.p, test.effect]).all()


def test_one_sample_that_does_not_vary_is_no_hindrance():
    test = welch(np.array([1.0, 1.0]), np.array([2.0, 4.0]))
    assert (test.t, test.df) == (-2, 1)
    np.testing.assert_allclose(test.p, 1 - 2 * math.atan(2) / math.pi, rtol=1e-12)


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])
    np.testing.assert_array_equal(holm(np.array([NAN, 0.5, 0.25])), [NAN, 0.5, 0.5])
    np.testing.assert_array_equal(holm(np.array([0.75, 0.875])), [1, 1])
    assert holm(np.array([])).shape == (0,)


def test_between_points_lines_are_straight_in_logarithms():
    l0, nmse = np.array([40.0, 10.0, NAN, 5.0]), np.array([0.2, 0.8, 1.0, NAN])
    np.testing.assert_allclose(at_l0(l0, nmse, 20.0), 0.4, rtol=1e-14)
    np.testing.assert_allclose(at_l0(l0, nmse, 40.0), 0.2, rtol=1e-14)
    for outside in (9.99, 40.01, 0.0, NAN):
        assert math.isnan(at_l0(l0, nmse, outside))
    assert math.isnan(at_l0(np.array([NAN]), np.array([1.0]), 1.0))


def test_settings_gather_seeds_and_keep_what_is_missing():
    rows = [row("topk", 8, 0.5, seed=3), row("topk", 9, 0.4)]
    rows += [{**row("topk", 8, 0.5, seed=4), "nmse": None}]
    first, second = comparison.settings(rows)
    assert (first.knob, first.seeds, second.seeds) == (8, (3, 4), (0,))
    np.testing.assert_array_equal(first.nmse, [0.5, NAN])


def test_what_diverged_is_never_the_best():
    one, two = comparison.settings([row("topk", 8, NAN), row("topk", 9, 0.4)])
    assert comparison.best([one, two], lambda s: float(s.nmse.mean())) is two
    assert comparison.best([one], lambda s: float(s.nmse.mean())) is None


def test_a_contest_is_chosen_by_one_score_and_tested_over_another():
    rows = [row("mine", k, 1 / k, seed=s) for k in (1, 2) for s in (0, 1)]
    rows += [row("other", 4, 0.5 + 0.1 * s, seed=s) for s in (0, 1)]
    rows += [row("third", 4, 2.0)]  # the best, by this score, but not asked for
    rows += [row("mine", 1, 0.5, site="there"), row("other", 1, NAN, site="there")]
    (contest,) = comparison.contests(
        comparison.settings(rows),
        "mine",
        ("other",),
        choose=lambda one: -float(one.nmse.mean()),
        sample=lambda one: one.nmse,
    )
    assert (contest.first.knob, contest.second.knob) == (1, 4)
    np.testing.assert_allclose(contest.test.means, (1, 0.55))
    assert contest.p_holm == contest.test.p > 0


def test_seeds_are_chosen_in_training_and_tested_on_held_out_rows():
    rows = planted()
    finals = {r["name"]: np.array([1 / r["knob"], r["knob"]]) for r in rows}
    finals |= {n: np.array([0.0]) for n in finals if n.startswith("topk-20-")}
    settings = comparison.settings(rows)
    (contest,) = claims.between_seeds(settings, finals)
    assert (contest.first.knob, contest.second.knob) == (0.5, 20)
    np.testing.assert_allclose(contest.test.means, (8 / 31, 0.4))


def test_p_is_corrected_for_the_number_of_sites():
    rows = planted(0.5, site="a") + planted(2.0, site="b") + planted(site="c")
    settings, sites = comparison.settings(rows), ("a", "b", "c")
    finals = _comparison.last_values(rows, history(rows), 3)
    contests = claims.between_seeds(settings, finals)
    assert tuple(c.first.site for c in contests) == sites
    p = np.array([c.test.p for c in contests])
    np.testing.assert_array_equal([c.p_holm for c in contests], holm(p))
    assert (holm(p) > p).any()


# Tables.


def test_a_table_in_the_papers_form():
    rows = [row("topk", 8, v, seed=s) for s, v in enumerate((0.25, 0.35))]
    rows += [row("topk", 16, v, seed=s) for s, v in enumerate((0.0011, 0.0013))]
    rows += [row("batch_topk", 8, NAN), row("own", 0.0078125, 1.5, l0=31.25)]
    text = report.tables(
        comparison.settings(rows), fixed=("topk", "batch_topk"), adaptive="own"
    )
    assert text.splitlines() == [
        "topk | batch_topk",
        "knob  here",
        "8     .3000±.0707   | nan",
        "16    1.20e-3±1e-4* | -",
        "bits  272           | -",
        "",
        "own: L0, NMSE",
        "knob       here",
        "0.0078125  31.2, 1.5000*",
        "bits       531",
    ]


def test_a_table_of_many_sites_goes_on_below():
    rows = [r for i in range(7) for r in planted(site=f"resid_pre.{i}")]
    settings = comparison.settings(rows)
    text = report.tables(settings, fixed=("topk", "batch_topk"), adaptive="top_afa")
    assert max(map(len, text.splitlines())) <= 100
    assert all(text.count(f"resid_pre.{i}") == 2 for i in range(7))
    assert text.count("*") == 7 * 3


def test_the_table_of_tests():
    first, second, *_ = comparison.settings(
        [
            *(row("own", 0.5, v, seed=s) for s, v in enumerate((0.2, 0.4))),
            row("topk", 8, 0.5),
        ]
    )
    test = comparison.Welch((0.3, 0.5), (2, 1), -2.5, 3.25, 1.5e-9, -1.0)
    lines = report.contests_table(
        [comparison.Contest(first, second, test)]
    ).splitlines()
    assert lines == [
        "site  best            mean  n  effect      t    df        p  p Holm",
        "here  own 0.5        .3000  2   -1.00  -2.50  3.25  1.5e-09       -",
        "      topk 8 seed 0  .5000  1",
    ]


def test_rows_of_settings():
    settings = comparison.settings(planted())
    found = report.settings_rows(settings)
    assert len(found) == len(settings) == 8
    assert [(r["rule"], r["knob"]) for r in found if r["best"]] == [
        ("topk", 40),
        ("batch_topk", 40),
        ("top_afa", 0.5),
    ]
    np.testing.assert_allclose(found[0]["nmse_mean"], 0.8)
    np.testing.assert_allclose(found[0]["nmse_sd"], 0.008)
    assert found[0]["bits"] == 170
    (single,) = report.settings_rows(comparison.settings([row("topk", 8, 0.5)]))
    assert math.isnan(single["nmse_sd"])


# Figures.


def drawn(axes):
    """The points of each line that has a marker, without bars."""
    return [
        np.array(bars.lines[0].get_data()).round(6).T.tolist()
        for bars in axes.containers
    ]


def test_a_frontier_for_each_site():
    rows = planted(site="a") + planted(0.5, site="b")
    figure = report.frontiers_figure(rows)
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title() for axes in above] == ["a", "b"]
    assert drawn(above[0])[0] == [[10, 0.8], [20, 0.4], [40, 0.2]]
    assert drawn(above[1])[2] == [[30, 0.133333], [31, 0.129032]]
    assert drawn(below[0])[0] == [[10, 0.2], [20, 0.6], [40, 0.8]]
    assert [axes.get_xscale() for axes in figure.axes] == ["log"] * 4
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"] + [
        "linear"
    ] * 2


def test_a_figure_of_runs_that_all_diverged():
    figure = report.frontiers_figure([row("topk", 8, NAN)])
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["no data"] * 2


def test_beside_other_dictionaries_stands_the_share_of_features():
    own = [{**r, "mse": r["nmse"] / 2} for r in planted(seeds=(1,))]
    other = [{**row("topk", k, 0.1, n_features=64), "mse": 1 / k} for k in (8, 16)]
    left, right = report.beside_figure(own, other, names=("ours", "theirs")).axes
    # 10 / 1024 and so on, rounded by `drawn`.
    assert drawn(left)[0] == [[0.009766, 0.4], [0.019531, 0.2], [0.039062, 0.1]]
    assert drawn(right) == [[[0.125, 0.125], [0.25, 0.0625]]]
    assert left.get_title() == "ours, F = 1,024"
    assert right.get_title() == "theirs, F = 64"
    assert "L0 / F" in left.get_xlabel()
    assert left.get_xlim() == right.get_xlim()
    assert left.get_ylim() == right.get_ylim()
    faces = [
        axes.containers[0].lines[0].get_markerfacecolor() for axes in (left, right)
    ]
    assert faces[0] != faces[1] == "white"


# The claims.


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # Lower than the best k (0.2) and on every line; L0 rises; 2 points against 3.
        ({"worse": 0.5}, ["holds"] * 6),
        (
            {"worse": 2.0, "rise": -1},
            ["does not hold"] * 4 + ["holds", "does not hold"],
        ),
        # Off by a little: less NMSE at the same L0, but at fewer features than k = 40.
        ({"worse": 0.9}, ["does not hold"] * 3 + ["holds"] * 3),
        (
            {"worse": 0.5, "seeds": (0,)},
            ["holds", "holds", "not tested"] + ["holds"] * 3,
        ),
    ],
)
def test_planted_outcomes_are_seen(change, expected):
    assert verdicts(planted(**change)) == expected


def test_sites_that_disagree_are_mixed():
    rows = planted(0.5, site="a") + planted(2.0, rise=-1, site="b")
    assert verdicts(rows) == ["mixed"] * 4 + ["holds", "mixed"]


def test_a_knob_that_matters_more_than_k():
    rows = [r for r in planted() if r["knob"] != 0.5]
    rows += [row("top_afa", 0.5, 80.0, l0=31, seed=s) for s in (0, 1, 2)]
    settings = comparison.settings(rows)
    claim = claims.no_k_to_tune(settings)
    assert claim.verdict == "does not hold"
    # 80 / (8 / 30) over one doubling against 0.8 / 0.2 over two.
    assert "by a factor of 300 for each doubling of the coefficient" in claim.seen[0]
    assert "by 2 for each doubling of k of topk" in claim.seen[0]


def test_a_coefficient_of_zero_has_no_factor():
    rows = [r for r in planted() if r["knob"] != 0.5]
    rows += [row("top_afa", 0.0, 80.0, l0=31, seed=s) for s in (0, 1, 2)]
    assert claims.no_k_to_tune(comparison.settings(rows)).verdict == "not tested"


def test_what_lies_outside_of_the_line_is_not_compared():
    rows = [*planted(), row("top_afa", 2, 0.001, l0=41.0)]
    claim = claims.lower_at_the_same_l0(comparison.settings(rows))
    assert "1 to 1 times its NMSE at the same L0" in claim.seen[0]
    assert "(1 outside of its L0)" in claim.seen[0]


def test_a_diverged_seed_takes_its_setting_out():
    rows = planted(0.5)
    for one in rows:
        if one["name"] == "top_afa-0.5-here-1":
            one.update(nmse=NAN, l0=NAN)
    claim = claims.l0_rises(comparison.settings(rows))
    assert claim.verdict == "not tested"
    assert claim.seen == [
        "here: L0 30.0 over coefficients 0.25 to 0.25; 0 of 0 steps rise."
    ]
    finals = _comparison.last_values(rows, history(rows), 5)
    (contest,) = claims.between_seeds(comparison.settings(rows), finals)
    assert contest.first.knob == 0.25
    assert verdicts([row("topk", 8, NAN), row("top_afa", 1, NAN)]) == ["not tested"] * 6


def test_the_papers_test_takes_the_last_value_and_the_last_lines():
    rows = [row("top_afa", 1, 0.5), row("topk", 8, 0.5), row("topk", 9, 0.5)]
    ends = {"top_afa-1-here-0": (9, 1, 3), "topk-8-here-0": (9, 6, 4)}
    ends["topk-9-here-0"] = (9, 0, 5)
    lines = {
        name: [{"l0": 1.0, "loss_mse": v} for v in values]
        for name, values in ends.items()
    }
    finals = _comparison.last_values(rows, lines, 2)
    (contest,) = claims.between_runs(rows, finals)
    assert contest.second.knob == 8
    assert contest.test.means == (2, 5)
    assert contest.test.counts == (2, 2)
    with pytest.raises(ValueError, match="n_lines=0"):
        _comparison.last_values(rows, lines, 0)


# All of it.


def paper_files(folder: Path, names: list[str]) -> Path:
    with (folder / "frontier_gpt2_layer6.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Name", "l0_norm", "l2_loss", "afa_coeff"])
        writer.writerows([name, 100 + i, 0.1, 0.25] for i, name in enumerate(names))
    return folder


def test_what_is_left_in_the_folder(tmp_path):
    rows = planted(0.5) + planted(2.0, site="there")
    rows[0]["nmse"] = NAN
    names = [
        "blocks.6.hook_resid_pre_12288_batchtopk_64_0.0",
        "blocks.6.hook_resid_pre_12288_topafa_0_0.25",
    ]
    text = _comparison.compare(
        rows, history(rows), tmp_path, n_lines=4, paper=paper_files(tmp_path, names)
    )
    assert (tmp_path / "comparison.txt").read_text() == f"{text}\n"
    assert max(map(len, text.splitlines())) <= 100
    assert "last logged values (4)" in text
    assert "share the same batches in the same order" in " ".join(text.split())
    assert "no finite score: topk 10 at here." in text
    with (tmp_path / "comparison.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 16
    for name in ("comparison.png", "paper.png"):
        assert 5000 < (tmp_path / "figures" / name).stat().st_size < 60_000


def test_the_papers_points_are_read_by_name(tmp_path):
    names = [
        "blocks.6.hook_resid_pre_12288_batchtopk_64_0.0",
        "blocks.6.hook_resid_pre_12288_topafa_0_0.25",
    ]
    budget, own = _comparison.read_paper(paper_files(tmp_path, names))
    assert (budget["rule"], budget["knob"], budget["l0"]) == ("batch_topk", 64, 100)
    assert (own["rule"], own["knob"], own["site"]) == ("top_afa", 0.25, "layer 6")
    assert (own["n_features"], own["mse"]) == (12_288, 0.1)
    with pytest.raises(ValueError, match="'mine' is no name of a run"):
        _comparison.read_paper(paper_files(tmp_path, ["mine"]))
    with pytest.raises(ValueError, match="has no frontier_gpt2_layer"):
        _comparison.read_paper(tmp_path / "elsewhere")


def test_the_papers_own_points_give_the_papers_tables():
    folder = os.environ.get("SAE_JAX_PAPER_CSV")
    if not folder:
        pytest.skip("SAE_JAX_PAPER_CSV does not name the authors' recordings")
    rows = _comparison.read_paper(Path(folder))
    rows = [{**one, "nmse": one["mse"]} for one in rows]
    assert len(rows) == 3 * 23
    text = report.tables(
        comparison.settings(rows), fixed=claims.OTHERS, adaptive=claims.TOP_AFA
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "32 .0649 | .0628 .0743 | .0726 .0824 | .0807" in lines
    assert "bits 21,069 | 21,079 60,875 | 60,875 21,065 | 21,079" in lines
    # At layer 7 Top-AFA loses by the last value; at 6 and 8 it wins.
    lines_of = {
        one["name"]: [{"l0": one["l0"], "loss_mse": one["mse"]}] for one in rows
    }
    finals = _comparison.last_values(rows, lines_of, 100)
    settings = comparison.settings(rows)
    runs = claims.between_runs(rows, finals)
    last, steps, _, rises, *_ = claims.claims(settings, runs, [], finals)
    assert last.verdict == "mixed"
    assert [line.endswith(": lower.") for line in last.seen] == [True, False, True]
    assert steps.verdict == "not tested"
    assert rises.verdict == "holds"
