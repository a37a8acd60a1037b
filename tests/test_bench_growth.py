"""The growth of a step's time: what the experiment leaves, its points, and the fit."""

import json
import math

import numpy as np
import pytest

from experiments import _growth, bench_growth
from experiments._bench_timing import FLOOR, OURS, Timed
from sae_jax import settings

POINT = "rule B D F k ms ms_min ms_max floor_ms ratio".split()
SLOPE = "rule axis points slope slope_error floor_slope floor_slope_error".split()
TINY = dict(
    rules="topk",
    batches="16,32",
    features="16,64",
    budgets="2,3",
    width="8",
    batch="16",
    n_features="16",
    k="2",
    rounds="2",
)
MIDDLE = {"B": 8, "F": 100, "k": 4}
REPORT = {
    "machine": {"cpu": "abacus", "device": "cpu", "threads": 1, "date": "today"},
    "versions": {"jax": "0"},
}


def configured(**given: str) -> bench_growth.Config:
    config, faults = settings.build(bench_growth.Config(), {**TINY, **given})
    assert faults == []
    return config


def test_it_leaves_points_slopes_and_a_figure(tmp_path, capsys):
    report = bench_growth.run(configured(out=str(tmp_path)))
    assert json.loads((tmp_path / "bench_growth.json").read_text()) == {
        **report,
        "settings": settings.to_dict(configured(out=str(tmp_path))),
    }
    assert [(p["B"], p["F"], p["k"]) for p in report["points"]] == [
        *((16, 16, 2), (16, 16, 3), (16, 64, 2), (32, 16, 2)),
    ]
    for p in report["points"]:
        assert list(p) == POINT
        assert (p["rule"], p["D"]) == ("topk", 8)
        assert 0 < p["ms_min"] <= p["ms"] <= p["ms_max"]
        assert p["floor_ms"] > 0
        assert p["ratio"] > 0
    times = {(p["B"], p["F"], p["k"]): p["ms"] for p in report["points"]}
    ends = {"B": (32, 16, 2), "F": (16, 64, 2), "k": (16, 16, 3)}
    assert [row["axis"] for row in report["slopes"]] == list(ends)
    for row, growth in zip(report["slopes"], (2, 4, 3 / 2), strict=True):
        assert list(row) == SLOPE
        assert row["points"] == 2
        assert row["slope_error"] is row["floor_slope_error"] is None
        longer = times[ends[row["axis"]]] / times[16, 16, 2]
        assert row["slope"] == pytest.approx(math.log(longer, growth))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 + 1 + 3
    assert len({len(text) for text in said[4:]}) == 1, "the table is aligned"
    assert (tmp_path / "bench_growth.png").stat().st_size > 5000


def test_a_point_says_what_was_measured():
    seconds = {OURS: [0.2, 0.1, 0.4], FLOOR: [0.1, 0.1, 0.05]}
    timed = Timed(seconds, {}, {}, 1.0, {}, "cpu")
    found = bench_growth.point({"rule": "r", "B": 1, "D": 2, "F": 3, "k": 4}, timed)
    assert found == dict(
        zip(POINT, ["r", 1, 2, 3, 4, 200, 100, 400, 100, 2], strict=True)
    )


# Points


def test_one_size_changes_at_a_time_and_no_point_is_timed_twice():
    config = bench_growth.Config()
    cases = bench_growth.cases(config)
    assert len(set(cases)) == len(cases)
    assert [case.size for case in cases] == sorted(case.size for case in cases)
    points = [case.columns for case in cases]
    on_axes = {
        (rule, axis): [
            p[axis]
            for p in _growth.along(points, axis, config.middle)
            if p["rule"] == rule
        ]
        for rule in ("topk", "batch_topk", "top_afa")
        for axis in _growth.AXES
    }
    for (rule, axis), sizes in on_axes.items():
        without = rule == "top_afa"
        assert (
            sizes
            == {
                "B": [256, 512, 1024, 2048, 4096],
                "F": [3072, 6144, 12288, 24576, 49152],
                "k": [] if without else [8, 16, 32, 64, 128, 256],
            }[axis]
        )
    assert len(cases) == 3 * (5 + 5 - 1) + 2 * (6 - 1)


def test_a_rule_without_a_budget_has_no_place_along_k():
    config = configured(rules="topk,top_afa", batches="", features="")
    found = [(case.bound.rule.name, case.k) for case in bench_growth.cases(config)]
    assert found == [("topk", 2), ("topk", 3)]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"batches": "16,0"}, "--batches must be at least 1"),
        ({"n_features": "0"}, "--n_features must be at least 1"),
        ({"rounds": "0"}, "--rounds: nothing would be timed"),
        ({"batches": "", "features": "", "budgets": ""}, "--rules: nothing would be"),
        ({"rules": ""}, "--rules: nothing would be timed"),
        ({"rules": "topk,topk(k=3)"}, "--rules: each can be given once"),
        ({"budgets": "2,17"}, "--rules: topk: k=17 must be above 0 and at most"),
    ],
)
def test_what_cannot_be_timed_is_said(given, fault):
    _, faults = settings.build(bench_growth.Config(), {**TINY, **given})
    assert any(text.startswith(fault) for text in faults), faults


# Slopes


def test_the_slope_of_a_power_law_is_its_exponent():
    sizes = np.array([8.0, 16, 100, 3000])
    for exponent in (0.0, 0.7, 1.0, -2.0):
        slope, error = _growth.fit(sizes, 3.5 * sizes**exponent)
        assert slope == pytest.approx(exponent, abs=1e-12)
        assert error == pytest.approx(0, abs=1e-12)


def test_the_error_is_that_of_a_line_through_scattered_points():
    # By hand: u = -1, 0, 1 and v = 0, 3, 0 about their means have no slope; residuals
    # -1, 2, -1 with one degree of freedom: sqrt(6 / 1 / 2).
    slope, error = _growth.fit(np.exp([1.0, 2, 3]), np.exp([0.0, 3, 0]))
    assert slope == pytest.approx(0, abs=1e-12)
    assert error == pytest.approx(math.sqrt(3))
    slope, error = _growth.fit(np.array([1.0, 4]), np.array([5.0, 10]))
    assert slope == pytest.approx(0.5)
    assert error is None


def measured(rule: str, B: int, F: int, k: int | None) -> dict:
    """A point of a made-up machine: time of B^1 F^0.8 k^0.3, product of B^1 F^1."""
    ms = B * F**0.8 * (k or 1) ** 0.3
    floor = B * F / 100
    values = [rule, B, 7, F, k, ms, 0.9 * ms, 1.2 * ms, floor, ms / floor]
    return dict(zip(POINT, values, strict=True))


@pytest.fixture
def points():
    """Two rules on all axes, not in order, and a point that is on none of them."""
    sizes = [(8, 100), (4, 100), (16, 100), (8, 400), (8, 200)]
    budgeted = [measured("topk", *size, 4) for size in sizes]
    budgeted += [measured("topk", 8, 100, k) for k in (16, 8)]
    elsewhere = [{**measured("topk", 16, 400, 4), "ms": 1e9}]
    return budgeted + elsewhere + [measured("top_afa", *size, None) for size in sizes]


def test_each_rule_grows_along_each_axis_by_itself(points):
    rows = _growth.slopes(points, MIDDLE)
    assert [(row["rule"], row["axis"], row["points"]) for row in rows] == [
        *(("topk", "B", 3), ("topk", "F", 3), ("topk", "k", 3)),
        *(("top_afa", "B", 3), ("top_afa", "F", 3)),
    ]
    exponents = {"B": (1, 1), "F": (0.8, 1), "k": (0.3, 0)}
    for row in rows:
        assert list(row) == SLOPE
        found = (row["slope"], row["floor_slope"])
        assert found == pytest.approx(exponents[row["axis"]], abs=1e-12)
        errors = (row["slope_error"], row["floor_slope_error"])
        assert errors == pytest.approx((0, 0), abs=1e-12)
    text = _growth.table(rows).splitlines()
    assert text[2].split() == "topk F 3 0.80 ± 0.00 1.00 ± 0.00".split()


def test_an_axis_with_one_size_has_no_slope(points):
    alone = [p for p in points if p["F"] == 100]
    assert {row["axis"] for row in _growth.slopes(alone, MIDDLE)} == {"B", "k"}


def test_the_figure_has_a_panel_per_axis_with_slopes(points):
    figure = _growth.growth_figure(REPORT | {"points": points}, MIDDLE)
    entries = [
        [text.get_text() for text in axes.get_legend().get_texts()]
        for axes in figure.axes
    ]
    topk = [f"topk  {slope} ± 0.00" for slope in ("1.00", "0.80", "0.30")]
    top_afa = [f"top_afa  {slope} ± 0.00" for slope in ("1.00", "0.80")]
    floor = [f"{FLOOR}  {slope} ± 0.00" for slope in ("1.00", "1.00", "0.00")]
    assert entries == [
        [topk[0], top_afa[0], floor[0]],
        [topk[1], top_afa[1], floor[1]],
        [topk[2], floor[2]],
    ]
    for axes in figure.axes:
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_ylim() == figure.axes[0].get_ylim()


def test_a_panel_without_points_says_so(points):
    unbudgeted = [p for p in points if p["rule"] == "top_afa"]
    figure = _growth.growth_figure(REPORT | {"points": unbudgeted}, MIDDLE)
    assert [text.get_text() for text in figure.axes[2].texts] == ["no data"]
