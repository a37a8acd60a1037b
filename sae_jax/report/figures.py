"""The figures of a training run: curves, frontier, ZF plot, and firing density.

Each has a function that builds it and one that writes it as a small PNG.
"""

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from sae_jax.evaluation.measures import Evaluation, density_histogram
from sae_jax.report import drawing
from sae_jax.report.drawing import COLOURS, DASHES, MARKERS, Lines

BANDS = (0.25, 0.5, 1.0)  # of the ZF plot, as eps (F - 1)
MOST_KNOBS = 12  # above, the frontier's points stand without their knobs
MOST_POINTS = 1500  # in a panel of the ZF plot


def curves(history: Mapping[str, Lines], path: Path) -> None:
    """Writes `curves_figure`."""
    drawing.save(curves_figure(history), path)


def frontier(rows: Lines, path: Path) -> None:
    """Writes `frontier_figure`."""
    drawing.save(frontier_figure(rows), path)


def zf(
    evaluations: Mapping[str, Evaluation],
    n_features: Mapping[str, int] | int,
    path: Path,
) -> None:
    """Writes `zf_figure`."""
    drawing.save(zf_figure(evaluations, n_features), path)


def density(evaluations: Mapping[str, Evaluation], path: Path) -> None:
    """Writes `density_figure`."""
    drawing.save(density_figure(evaluations), path)


def curves_figure(history: Mapping[str, Lines]) -> Figure:
    """NMSE and L0 (log axes) against the training step, one line per SAE."""
    figure, panels = drawing.new_figure(1, 2)
    styles = drawing.line_styles(history)
    for axes, score in zip(panels, ("nmse", "l0"), strict=True):
        for name, lines in history.items():
            values = drawing.values(lines, score)
            if np.isfinite(values).any():
                steps = [line["step"] for line in lines]
                marker = "o" if len(lines) == 1 else ""
                axes.plot(steps, values, marker=marker, **styles[name])
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        drawing.score_axis(axes, "y", score)
        drawing.say_if_empty(axes)
    drawing.legend_of_saes(figure, styles, lambda names: "")
    return figure


def frontier_figure(rows: Lines) -> Figure:
    """NMSE (log) and loss recovered against L0 (log): what sparsity costs.

    A point is the mean over the seeds of one setting, its bars go from the least to the
    largest. A line joins the settings of one rule, site, dictionary size and learning
    rate.
    """
    figure, panels = drawing.new_figure(1, 2)
    same_line = ("rule", "site", "n_features", "lr")
    lines = drawing.grouped(rows, *same_line)
    few = len(drawing.grouped(rows, *same_line, "spec", "knob")) <= MOST_KNOBS
    rules = list(dict.fromkeys(rule for rule, *_ in lines))
    places = list(dict.fromkeys(tuple(place) for _, *place in lines))
    handles = []
    for (rule, *place), members in lines.items():
        i, j = rules.index(rule), places.index(tuple(place))
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[j % len(DASHES)],
        }
        label = [rule]
        for k, form in enumerate(("{}", "F = {:,}", "learning rate {:g}")):
            if place[k] is not None and len({other[k] for other in places}) > 1:
                label.append(form.format(place[k]))
        handles.append(Line2D([], [], label=", ".join(map(str, label)), **style))
        for axes, score in zip(panels, ("nmse", "loss_recovered"), strict=True):
            draw_settings(axes, members, score, style, knobs=few)
    for axes, score in zip(panels, ("nmse", "loss_recovered"), strict=True):
        drawing.score_axis(axes, "x", "l0")
        drawing.score_axis(axes, "y", score)
        axes.margins(0.1)
        drawing.say_if_empty(axes)
    title = "beside the points, where there is room: the knob of the rule"
    drawing.legend_below(figure, handles, title if few else None)
    drawing.hide_overlaps(figure)
    return figure


def draw_settings(
    axes: Axes, rows: Lines, score: str, style: Mapping[str, Any], *, knobs: bool
) -> None:
    """Draws one line of the frontier, and beside its points the knob if so wished."""
    points = []
    for (_, knob), seeds in drawing.grouped(rows, "spec", "knob").items():
        both = np.stack([drawing.values(seeds, "l0"), drawing.values(seeds, score)])
        both = both[:, np.isfinite(both).all(0)]
        if both.size:
            points.append((both.mean(1), both.min(1), both.max(1), knob))
    if not points:
        return
    points.sort(key=lambda point: point[0][0])
    mean, low, high = (np.stack([p[i] for p in points], axis=1) for i in range(3))
    # The mean of equal numbers can lie a rounding outside of them.
    x_bars, y_bars = np.maximum(np.stack([mean - low, high - mean], axis=1), 0)
    x, y = mean
    axes.errorbar(x, y, y_bars, x_bars, ms=5, lw=1.3, elinewidth=1, **style)
    for at, _, _, knob in points:
        if knobs and knob is not None:
            axes.annotate(
                f"{knob:.3g}", at, (5, 4), textcoords="offset points", fontsize=7
            )


def zf_figure(
    evaluations: Mapping[str, Evaluation], n_features: Mapping[str, int] | int
) -> Figure:
    """The ZF plot of Lee et al. 2025 (arXiv:2503.24277): ||f|| against ||z||.

    One point per row, one panel per SAE. A decoder that is eps-quasi-orthogonal allows
    codes in a band around the diagonal, which from c = 1 on has no upper end:

        ||z|| / sqrt(1 + c)  <=  ||f||  <=  ||z|| / sqrt(1 - c),    c = eps (F - 1)

    Differs: the bands are added, and at most 1,500 rows are drawn.
    """
    n_columns = min(4, max(1, len(evaluations)))
    n_rows = max(1, math.ceil(len(evaluations) / n_columns))
    side = min(drawing.WIDTH / n_columns, drawing.HEIGHT - 1.3)
    figure, panels = drawing.new_figure(n_rows, n_columns, n_rows * (side + 0.6) + 0.9)
    colours = drawing.rule_colours(evaluations)
    for axes, (name, evaluation) in zip(panels, evaluations.items(), strict=False):
        F = n_features[name] if isinstance(n_features, Mapping) else n_features
        c = np.median(evaluation.epsilon_lbo) * (F - 1)
        title = textwrap.fill(name, 100 // n_columns)
        axes.set_title(f"{title}\nF = {F:,}, median c = {c:.2g}", fontsize=8)
        _draw_norms(axes, evaluation, colours[name])
    for axes in panels[::n_columns]:
        axes.set_ylabel("‖f‖")
    for axes in panels[len(evaluations) or 1 :]:
        axes.set_axis_off()
    for axes in panels[: len(evaluations) or 1]:
        drawing.say_if_empty(axes)
    legend_of_bands(figure)
    return figure


def legend_of_bands(figure: Figure) -> None:
    """What the diagonal and the bands of a ZF plot are."""
    diagonal = Line2D([], [], color="black", lw=1, label="‖f‖ = ‖z‖")
    bands = [Patch(color=_shade(c), label=f"c ≤ {c:g}") for c in BANDS]
    drawing.legend_below(
        figure,
        [diagonal, *bands],
        "‖z‖: norm of a row, ‖f‖: norm of its code; "
        "shaded: what ε allows, with c = ε (F - 1)",
    )


def _draw_norms(axes: Axes, evaluation: Evaluation, colour: str) -> None:
    """Draws the bands, the diagonal and the rows of one SAE."""
    z, f = evaluation.norm_z, evaluation.norm_f
    finite = np.isfinite(z) & np.isfinite(f)
    if not finite.any():
        return
    limit = norm_limit(z[finite], f[finite])
    draw_bands(axes, limit)
    # By lot: every n-th row might always be the same position of a context.
    lot = np.random.default_rng(0).permutation(len(z))[:MOST_POINTS]
    axes.plot(z[lot], f[lot], ".", ms=2.5, color=colour, alpha=0.6, mew=0)
    outside = len(z) - np.count_nonzero(finite & (z <= limit) & (f <= limit))
    axes.set_xlabel(f"‖z‖\n{outside:,} of {len(z):,} rows outside", fontsize=8)


def norm_limit(z: Float[np.ndarray, " R"], f: Float[np.ndarray, " R"]) -> float:
    """Where both axes of a ZF plot end: behind nearly all rows.

    The longest rows of a language model are tens of times longer than the others.
    """
    return 1.05 * max(float(np.quantile(norms, 0.995)) for norms in (z, f)) or 1.0


def draw_bands(axes: Axes, limit: float) -> None:
    """The diagonal of a ZF plot, and what eps allows around it (`norm_interval`)."""
    ends = np.array([0.0, limit])
    for c in reversed(BANDS):
        low = ends / np.sqrt(1 + c)
        high = ends / np.sqrt(1 - c) if c < 1 else np.full(2, limit)
        axes.fill_between(ends, low, high, color=_shade(c), lw=0)
    axes.plot(ends, ends, color="black", lw=1)
    axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    inside = axes.transAxes
    axes.text(0.04, 0.85, "activates\ntoo much", transform=inside, fontsize=7)
    axes.text(
        0.96, 0.04, "activates\ntoo little", ha="right", transform=inside, fontsize=7
    )


def _shade(c: float) -> tuple[float, float, float]:
    return drawing.lighter("black", 0.66 + 0.26 * c)


def density_figure(evaluations: Mapping[str, Evaluation]) -> Figure:
    """How many features are active how often: a histogram over log10 of the share.

    Features that no row activates have no place on the axis; the legend counts them.
    """
    figure, (axes,) = drawing.new_figure(1, 1)
    styles = drawing.line_styles(evaluations)
    edges, counts, dead = density_histogram([e.density for e in evaluations.values()])
    of = dict(zip(evaluations, zip(counts, dead, strict=True), strict=True))
    for name, (binned, _) in of.items():
        shares = binned / len(evaluations[name].density)
        if binned.any():
            axes.stairs(shares, 10**edges, **styles[name])
    axes.set(
        xscale="log",
        xlabel="share of rows on which a feature is active",
        ylabel="share of all features",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    drawing.say_if_empty(axes)

    def note(names: list[str]) -> str:
        low, high = min(of[n][1] for n in names), max(of[n][1] for n in names)
        return f" ({low} dead)" if low == high else f" ({low} to {high} dead)"

    drawing.legend_of_saes(figure, styles, note)
    return figure
