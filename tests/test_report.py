"""The report: what a reader is shown is what was measured."""

import csv
import io
import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from sae_jax.evaluation import Evaluation
from sae_jax.report import (
    csv_text,
    curves,
    density,
    frontier,
    table,
    zf,
)
from sae_jax.report.drawing import COLOURS
from sae_jax.report.figures import (
    curves_figure,
    density_figure,
    frontier_figure,
    zf_figure,
)

MEASURED = {
    "name": "mine k=32",
    "rule": "mine",
    "spec": "mine(k=32)",
    "knob": 32.0,
    "site": "resid_post.2",
    "seed": 0,
    "l0": 31.96,
    "nmse": 0.12345,
    "kl_spliced": 0.8,
    "loss_recovered": 0.98765,
    "dead": 12.0,
    "n_features": 768,
    "epsilon_lbo": 1.23e-5,
    "norm_ratio": 1.0625,
}


def row(**changes):
    return {**MEASURED, **changes}


def evaluation(z, f, n_features=8, active=None):
    z, f = np.asarray(z, float), np.asarray(f, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        epsilon = np.abs(z**2 - f**2) / ((n_features - 1) * f**2)
    shares = np.full(n_features, 0.5) if active is None else np.asarray(active, float)
    error = np.abs(z - f) / 10
    return Evaluation({}, z, f, epsilon, error, shares)


def realistic(n_rules=2, n_settings=2):
    """Rows, history and evaluations of a small sweep."""
    rng = np.random.default_rng(0)
    rows, history, evaluations = [], {}, {}
    for i in range(n_rules):
        for k in 2 ** np.arange(4, 4 + n_settings):
            name, nmse = f"rule{i} k={k}", 0.9 / k**0.3
            rows.append(row(name=name, rule=f"rule{i}", knob=float(k), l0=k, nmse=nmse))
            history[name] = [
                {"step": s, "nmse": nmse + 1 / s, "l0": k + 500 / s}
                for s in range(10, 2000, 10)
            ]
            z = 40 * np.exp(0.3 * rng.normal(size=4000))
            f = z * (0.8 + 0.2 * i) * np.exp(0.1 * rng.normal(size=4000))
            active = np.exp(rng.normal(-5, 1, 768)).clip(0, 1)
            evaluations[name] = evaluation(z, f, 768, active)
    return rows, history, evaluations


def texts(figure):
    """Everything written in the panels and legends of a figure."""
    found = [t.get_text() for axes in figure.axes for t in axes.texts]
    for legend in figure.legends:
        found += [legend.get_title().get_text()]
        found += [t.get_text() for t in legend.get_texts()]
    return found


# The table.


def test_a_table_is_aligned_and_rounded():
    worse = row(name="other", l0=768.0, nmse=1.0, loss_recovered=-0.5, dead=768)
    assert table([MEASURED, worse]).splitlines() == [
        "name             L0    NMSE      KL  loss recovered          dead  eps-LBO"
        "  norm ratio",
        "           features            nats               %      features   median"
        "      median",
        "-" * 86,
        "mine k=32      32.0  0.1235  0.8000            98.8     12 (1.6%)   1.2e-5"
        "       1.062",
        "other         768.0  1.0000  0.8000           -50.0  768 (100.0%)   1.2e-5"
        "       1.062",
    ]


def test_what_was_not_measured_differs_from_what_is_not_finite():
    scores = [name for name, value in MEASURED.items() if isinstance(value, float)]
    scores.remove("knob")
    absent = {name: v for name, v in MEASURED.items() if name not in scores}
    none, nan, inf = (
        {**absent, **dict.fromkeys(scores, value)} for value in (None, np.nan, np.inf)
    )
    last = [table([rows]).splitlines()[-1].split()[2:] for rows in (none, nan, inf)]
    assert last == [["-"] * 7, ["nan"] * 7, ["inf"] * 7]
    assert table([absent]) == table([none])
    assert table([row(n_features=None)]).splitlines()[-1].split()[6] == "12"


def test_long_names_go_on_below_and_the_table_stays_in_a_terminal():
    name = "a_rule(coef=0.03125, floor=-6) resid_post.11 F=12288 seed=1 " + "x" * 40
    lines = table([row(name=name), MEASURED]).splitlines()
    assert max(map(len, lines)) == 100
    assert lines[3].endswith("1.062")
    assert lines[-1].startswith("mine k=32")
    shown = "".join(line[:32] for line in lines[3:-1])
    for part in name.split()[:-1]:
        assert part in shown
    assert "".join(shown.split()).count("x") >= 40


def test_no_results_give_a_head_alone():
    assert table([]).splitlines()[0].startswith("name")
    assert len(table([]).splitlines()) == 3


def test_csv_holds_every_field_in_full():
    rows = [row(name='a "quoted", name', l0=1 / 3), {"name": "b", "extra": None}]
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert list(read[0]) == [*MEASURED, "extra"]
    assert read[0]["name"] == 'a "quoted", name'
    assert float(read[0]["l0"]) == 1 / 3
    assert read[0]["extra"] == read[1]["extra"] == read[1]["nmse"] == ""


# Curves.


def test_curves_hold_the_history_with_gaps_where_there_is_no_value():
    history = {
        "a k=1": [
            {"step": 1, "nmse": 0.5, "l0": 3.0},
            {"step": 2, "nmse": np.nan, "l0": 0.0},  # 0 has no place on a log axis
            {"step": 4, "nmse": 0.25},
        ],
        "b": [{"step": 4, "nmse": 0.75, "l0": 2}],
    }
    left, right = curves_figure(history).axes
    assert (left.get_yscale(), right.get_yscale()) == ("log", "log")
    assert (left.get_xscale(), left.get_ylabel()) == ("linear", "NMSE")
    a, b = left.lines
    np.testing.assert_array_equal(a.get_xdata(), [1, 2, 4])
    np.testing.assert_array_equal(a.get_ydata(), [0.5, np.nan, 0.25])
    np.testing.assert_array_equal(b.get_ydata(), [0.75])
    assert (a.get_marker(), b.get_marker()) == ("", "o")  # one point makes no line
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [3, np.nan, np.nan])


def test_few_saes_have_a_legend_each_and_many_one_per_rule():
    _, history, _ = realistic(2, 4)
    few = curves_figure(history)
    assert texts(few) == ["", *history]
    drawn = [(to_hex(x.get_color()), x.get_linestyle()) for x in few.axes[0].lines]
    assert len(set(drawn)) == 8
    many = curves_figure({**history, "third": history["rule0 k=16"]})
    assert texts(many) == ["", "rule0", "rule1", "third"]
    drawn = [to_hex(x.get_color()) for x in many.axes[0].lines]
    assert drawn == [c.lower() for c in np.repeat(COLOURS[:3], [4, 4, 1])]


def test_ticks_of_a_log_axis_are_numbers_that_one_reads():
    for low, high, most in [(14.8, 16.6, 6), (20, 70, 6), (1, 200, 8), (1e-6, 1, 8)]:
        lines = [{"step": 1, "l0": low}, {"step": 2, "l0": high}]
        axis = curves_figure({"a": lines}).axes[1].yaxis
        inside = [t for t in axis.get_majorticklocs() if low <= t <= high]
        assert 2 <= len(inside) <= most, (low, high, inside)


# The frontier.


def test_a_frontier_point_is_the_mean_over_seeds_with_bars_to_the_ends():
    rows = [
        row(spec="k64", knob=64.0, l0=60.0, nmse=0.1, loss_recovered=0.99),
        row(spec="k32", seed=0, l0=30.0, nmse=0.2, loss_recovered=0.9),
        row(spec="k32", seed=1, l0=34.0, nmse=0.4, loss_recovered=0.8),
        row(spec="k32", seed=2, l0=35.0, nmse=0.3, loss_recovered=0.7),
        row(spec="k16", knob=16.0, l0=np.nan),  # has no place
        row(spec="k8", knob=8.0, l0=8.0, nmse=0.5, loss_recovered=None),
    ]
    left, right = frontier_figure(rows).axes
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert (right.get_xscale(), right.get_yscale()) == ("log", "linear")
    (line,) = left.lines
    np.testing.assert_array_equal(line.get_xdata(), [8, 33, 60])  # in order of L0
    # 0.2 + 0.3 + 0.4 rounds: the tolerance is for that.
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.3, 0.1], rtol=1e-15)
    across, up = (bars.get_segments() for bars in left.collections)
    np.testing.assert_allclose(across[1], [(30, 0.3), (35, 0.3)], rtol=1e-15)
    np.testing.assert_allclose(up[1], [(33, 0.2), (33, 0.4)], rtol=1e-15)
    np.testing.assert_array_equal(right.lines[0].get_xdata(), [33, 60])
    assert [t.get_text() for t in left.texts] == ["8", "32", "64"]
    assert [t.get_text() for t in right.texts] == ["32", "64"]


def test_sites_and_sizes_are_lines_of_their_own_and_rules_have_one_colour():
    rows = [
        row(rule=rule, site=site, n_features=size, l0=l0)
        for rule in ("a", "b")
        for site in ("x", "y")
        for size in (768, 3072)
        for l0 in (10.0, 20.0)
    ]
    figure = frontier_figure(rows)
    lines = figure.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [1] * 8
    assert [x.get_color() for x in lines] == [*COLOURS[:1] * 4, *COLOURS[1:2] * 4]
    assert [x.get_marker() for x in lines] == [*"oooossss"]
    assert texts(figure)[-8:][:2] == ["a, x, F = 768", "a, x, F = 3,072"]
    assert texts(frontier_figure(rows[:2]))[-1] == "a"


def test_knobs_stand_beside_points_only_where_there_is_room():
    rows = [row(spec=f"k={k}", knob=float(k), l0=k) for k in range(1, 14)]
    assert len(frontier_figure(rows[:12]).axes[0].texts) == 12
    assert len(frontier_figure(rows).axes[0].texts) == 0


# The ZF plot.


def test_the_bands_of_a_zf_plot_have_the_slopes_of_the_theorem():
    (axes,) = zf_figure({"a": evaluation([1, 2, 4], [1, 2, 4])}, 8).axes
    limit = axes.get_xlim()[1]
    assert axes.get_xlim() == axes.get_ylim() == (0, limit)
    widest, *narrower = axes.collections
    corners = widest.get_paths()[0].vertices
    assert {tuple(corner) for corner in corners} >= {(0, limit), (limit, limit)}
    # ||z||^2 = (1 + c) ||f||^2 below and (1 - c) ||f||^2 above, by hand.
    lowest = corners[corners[:, 0] == limit, 1].min() / limit
    assert lowest == pytest.approx(0.7071067811865476, rel=1e-15)
    hand = {0.5: (0.8164965809, 1.4142135624), 0.25: (0.8944271910, 1.1547005384)}
    for band, (low, high) in zip(narrower, hand.values(), strict=True):
        ends = band.get_paths()[0].vertices
        slopes = ends[ends[:, 0] == limit, 1] / limit
        assert slopes.min() == pytest.approx(low, rel=1e-9)  # ten digits by hand
        assert slopes.max() == pytest.approx(high, rel=1e-9)
    diagonal = axes.lines[0]
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())


def test_a_zf_plot_has_norms_in_place_and_says_what_lies_outside():
    z = np.append(np.linspace(1, 2, 397), [1000.0, 1.0, np.nan])
    f = np.append(np.linspace(3, 1, 397), [1.0, 1000.0, 1.0])
    # |4 - 1| / (7 * 1): the median of three, times 7.
    three = evaluation([2, 1, 1], [1, 1, 0], 8)
    sizes = {"many": 8, "mine k=3": 8}
    first, second = zf_figure({"many": evaluation(z, f), "mine k=3": three}, sizes).axes
    points = first.lines[1]
    assert len(points.get_xdata()) == 400
    drawn = set(zip(points.get_xdata(), points.get_ydata(), strict=True))
    assert {(1.0, 3.0), (2.0, 1.0)} <= drawn  # ||z|| goes to the right, ||f|| up
    assert 3 < first.get_xlim()[1] < 10
    assert first.get_xlabel().endswith("3 of 400 rows outside")
    assert second.get_title() == "mine k=3\nF = 8, median c = 3"
    places = {t.get_text().split()[-1]: t.get_position() for t in first.texts}
    assert places["much"][0] < places["much"][1]
    assert places["little"][0] > places["little"][1]


def test_a_zf_plot_draws_few_rows_from_everywhere():
    z = np.arange(1, 40001.0)
    (axes,) = zf_figure({"a": evaluation(z, z)}, 8).axes
    drawn = axes.lines[1].get_xdata()
    assert len(set(drawn)) == 1500
    assert (np.histogram(drawn, 8, (0, 40000))[0] > 100).all()
    assert len(set(drawn % 128)) == 128  # every position of a context of 128


@pytest.mark.parametrize("n_panels", [1, 2, 3, 4, 5])
def test_a_zf_plot_has_room_for_its_titles(n_panels):
    figure = zf_figure(
        {f"name{i}": evaluation([1, 2, 4], [1, 2, 4]) for i in range(n_panels)}, 8
    )
    figure.draw_without_rendering()
    for axes in figure.axes[:n_panels]:
        assert axes.title.get_window_extent().y1 <= figure.bbox.y1
        assert axes.get_tightbbox().y0 >= 0


def test_a_zf_plot_has_four_panels_a_row():
    panels = {f"a{i}": evaluation([1], [1]) for i in range(6)}
    axes = zf_figure(panels, 8).axes
    assert [a.get_subplotspec().colspan.start for a in axes[:6]] == [0, 1, 2, 3, 0, 1]
    assert [a.axison for a in axes] == [True] * 6 + [False] * 2


# Density.


def test_density_counts_each_feature_once_and_the_dead_in_the_legend():
    rng = np.random.default_rng(1)
    active = rng.integers(0, 1001, 64) / 1000
    active[:6] = [0, 0, 1.0, 0.1, 0.01, 0.002]
    figure = density_figure({"mine k=3": evaluation([1], [1], 64, active)})
    (axes,) = figure.axes
    shares, edges, _ = axes.patches[0].get_data()
    counts = dict.fromkeys(range(len(shares)), 0)
    lowest = 4 * math.log10(edges[0])
    for a in active[active > 0]:  # four bins to the decade, 1 in the last
        # A share on an edge may lie a rounding of the logarithm below it.
        place = math.floor(4 * math.log10(a) - lowest + 1e-9)
        counts[min(place, len(shares) - 1)] += 1
    np.testing.assert_array_equal(64 * shares, [*counts.values()])
    assert edges[-1] == 1
    dead = int((active == 0).sum())
    assert shares.sum() == pytest.approx((64 - dead) / 64, rel=1e-15)
    assert axes.get_xscale() == "log"
    assert texts(figure)[-1] == f"mine k=3 ({dead} dead)"


def test_features_that_are_always_active_are_in_the_last_bin():
    figure = density_figure({"a": evaluation([1], [1], 4, [1, 1, 1, 0])})
    shares, edges, _ = figure.axes[0].patches[0].get_data()
    np.testing.assert_array_equal(shares, [0, 0, 0, 0.75])
    np.testing.assert_array_equal(edges[[0, -1]], [0.1, 1])


def test_many_densities_say_the_range_of_the_dead():
    many = {
        f"mine {i}": evaluation([1], [1], 10, [0] * i + [1] * (10 - i))
        for i in range(9)
    }
    assert texts(density_figure(many))[-1] == "mine (0 to 8 dead)"


# All figures.


def test_a_rule_has_one_colour_in_all_figures():
    rows, history, evaluations = realistic(3, 1)
    expected = [colour.lower() for colour in COLOURS[:3]]
    panels = zf_figure(evaluations, 768).axes
    drawn = [
        [x.get_color() for x in curves_figure(history).axes[0].lines],
        [x.get_color() for x in frontier_figure(rows).axes[0].lines],
        [axes.lines[1].get_color() for axes in panels if axes.lines],
        [p.get_edgecolor() for p in density_figure(evaluations).axes[0].patches],
    ]
    for colours in drawn:
        assert [to_hex(colour) for colour in colours] == expected


def test_nothing_to_draw_is_said_in_the_figure():
    nothing = evaluation([np.nan], [1.0], 3, [0, 0, 0])
    nan = {"a": [{"step": 1, "nmse": np.nan, "l0": None}]}
    for figure, n_panels in [
        (curves_figure({}), 2),
        (curves_figure(nan), 2),
        (frontier_figure([]), 2),
        (frontier_figure([row(l0=np.nan)]), 2),
        (zf_figure({}, 8), 1),
        (zf_figure({"a": nothing}, 8), 1),
        (density_figure({}), 1),
        (density_figure({"a": nothing}), 1),
    ]:
        assert texts(figure).count("no data") == n_panels
        figure.draw_without_rendering()


def test_figures_are_small_and_the_same_data_give_the_same_bytes(tmp_path):
    rows, history, evaluations = realistic(4, 2)
    for i in range(2):
        curves(history, tmp_path / f"curves{i}.png")
        frontier(rows, tmp_path / f"frontier{i}.png")
        zf(evaluations, 768, tmp_path / f"zf{i}.png")
        density(evaluations, tmp_path / f"density{i}.png")
    for kind in ("curves", "frontier", "zf", "density"):
        first, second = ((tmp_path / f"{kind}{i}.png").read_bytes() for i in range(2))
        assert first == second
        assert len(first) < 80_000
        with Image.open(tmp_path / f"{kind}0.png") as picture:
            assert picture.format == "PNG"
            assert picture.width == 900
            assert kind == "zf" or picture.height == 540
            assert picture.info == {}  # neither date nor version
            colours = np.unique(np.asarray(picture.convert("RGB")), axis=None)
            assert len(colours) > 20  # something was drawn


def test_texts_that_would_lie_on_another_are_hidden():
    rows = [
        {"name": f"a-k{k}", "rule": "a", "spec": f"a(k={k})", "knob": k, "l0": l0}
        | {"site": "s", "seed": 0, "n_features": 9, "nmse": 0.5, "loss_recovered": 0.9}
        for k, l0 in ((1, 1.0), (2, 1.001), (3, 9.0))
    ]
    for axes in frontier_figure(rows).axes:
        seen = [text.get_text() for text in axes.texts if text.get_visible()]
        assert seen == ["1", "3"]
