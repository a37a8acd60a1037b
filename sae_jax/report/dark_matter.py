"""The linear and nonlinear error of SAEs, as text and as a figure.

The definitions are those of `analysis.dark_matter` and `analysis.width_scaling`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from sae_jax.analysis.dark_matter import DarkMatter
from sae_jax.analysis.width_scaling import Law
from sae_jax.report import drawing
from sae_jax.report.scores import Row, Score, number, scores_text

MOST_POINTS = 1500
CLIPPED = 0.995  # a few rows would squash the rest


def _score(name: str, heading: str, unit: str, meaning: str) -> Score:
    def show(row: Row) -> str:
        value = row.get(name)
        if unit != "%":
            return number(value, ".4f")
        return number(None if value is None else 100 * value, ".1f")

    return Score(heading, unit, meaning, show)


MEANINGS = {
    "fvu": ("FVU", "", "Fraction of variance unexplained by the SAE."),
    "fvu_nonlinear": (
        "FVU, nonlinear error",
        "",
        "What is left of it with the linear part of the error put back.",
    ),
    "linear_share": (
        "linear share of error",
        "%",
        "Of the squared error, what the linear part explains.",
    ),
    "error_vector_r2": (
        "R2 of error from row",
        "",
        "Of the error's coordinates, predicted linearly from the row.",
    ),
    "error_vector_r2_by_chance": (
        "R2 of error from shuffled rows",
        "",
        "The same from rows that are not its own.",
    ),
    "error_norm_r2": (
        "R2 of error's size from row",
        "",
        "Of the error's squared norm.",
    ),
    "error_norm_r2_by_chance": (
        "R2 of error's size from shuffled rows",
        "",
        "The same from rows that are not its own.",
    ),
    "loss_clean": ("loss, clean", "nats", "With the rows as they are."),
    "loss_with_nonlinear": (
        "loss, linear error missing",
        "nats",
        "With the reconstruction and the nonlinear error.",
    ),
    "loss_with_linear": (
        "loss, nonlinear error missing",
        "nats",
        "With the reconstruction and the linear error.",
    ),
    "loss_spliced": (
        "loss, all error missing",
        "nats",
        "With the reconstruction alone.",
    ),
    "linear_share_of_loss": (
        "linear share of loss",
        "%",
        "Of the rise in loss, what the linear error brings back.",
    ),
    "kl_with_nonlinear": (
        "KL, linear error missing",
        "nats",
        "Divergence from the clean model.",
    ),
    "kl_with_linear": (
        "KL, nonlinear error missing",
        "nats",
        "Divergence from the clean model.",
    ),
    "kl_spliced": (
        "KL, all error missing",
        "nats",
        "Divergence from the clean model.",
    ),
    "linear_share_of_kl": (
        "linear share of KL",
        "%",
        "Of the divergence, what the linear error brings back.",
    ),
    "pursuit_fvu": (
        "FVU, gradient pursuit",
        "",
        "Other codes of the same dictionary and the same L0.",
    ),
    "pursuit_fvu_nonlinear": (
        "FVU, nonlinear error, pursuit",
        "",
        "With the linear part of pursuit's own error put back.",
    ),
    "pursuit_loss_spliced": (
        "loss, all error missing, pursuit",
        "nats",
        "With the reconstruction of pursuit alone.",
    ),
}
PARTS = {name: _score(name, *said) for name, said in MEANINGS.items()}


def parts_text(rows: Sequence[Row]) -> str:
    """The scores as aligned text, a column for every SAE."""
    return scores_text(rows, PARTS)


def parts_figure(
    rows: Sequence[Mapping[str, Any]],
    laws: Mapping[str, Law],
    shown: Mapping[str, DarkMatter],
) -> Figure:
    """Error parts against width, and the predicted against the true size of errors.

    Args:
      rows: one for each SAE, with `n_features`, `fvu` and `fvu_nonlinear`, perhaps
        `pursuit_fvu_nonlinear`.
      laws: by the name of a score, the law that fits it.
      shown: the SAEs whose rows are drawn, by name.
    """
    figure, (left, right) = drawing.new_figure(1, 2)
    _draw_widths(left, sorted(rows, key=lambda row: row["n_features"]), laws)
    _draw_norms(right, shown)
    for axes in (left, right):
        drawing.say_if_empty(axes)
    return figure


LINES = {
    "fvu": "whole error",
    "fvu_nonlinear": "nonlinear error",
    "linear": "linear error",
    "pursuit_fvu_nonlinear": "nonlinear error, pursuit",
}


def _draw_widths(
    axes: Axes, rows: Sequence[Mapping[str, Any]], laws: Mapping[str, Law]
) -> None:
    """FVU and its parts over the width, a point for each SAE; laws are dashed."""
    rows = [{**row, "linear": row["fvu"] - row["fvu_nonlinear"]} for row in rows]
    widths = np.array([row["n_features"] for row in rows], float)
    for i, (name, label) in enumerate(LINES.items()):
        style: Any = {"color": drawing.COLOURS[i], "marker": drawing.MARKERS[i]}
        y = np.array([row.get(name, np.nan) for row in rows], float)
        if not np.isfinite(y).any():
            continue
        if name in laws:
            law, colour = laws[name], drawing.COLOURS[i]
            along = np.geomspace(widths.min(), widths.max(), 100)
            axes.plot(along, law(along), "--", color=colour, lw=1.2)
            label = f"{label}: {law.c:.3f} + {law.a:.3g} W^-{law.m:.2f}"
            style["linestyle"] = ""
        axes.plot(widths, y, label=label, ms=5, lw=1.2, **style)
    axes.set(xscale="log", ylabel="fraction of variance", xlabel="features, W")
    axes.set_ylim(bottom=0)
    if len(set(widths)) <= 6:
        axes.set_xticks(sorted(set(widths)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.lines:
        axes.legend(fontsize=7, frameon=False)


def _draw_norms(axes: Axes, shown: Mapping[str, DarkMatter]) -> None:
    """A point for each scored row; on the diagonal the prediction is right."""
    limit = 0.0
    for i, (name, one) in enumerate(shown.items()):
        true, predicted = one.squared_error, one.predicted
        if not np.isfinite([true, predicted]).all():
            continue
        lot = np.random.default_rng(0).permutation(len(true))[:MOST_POINTS]
        axes.plot(
            predicted[lot],
            true[lot],
            ".",
            ms=2.5,
            mew=0,
            alpha=0.6,
            color=drawing.COLOURS[i % len(drawing.COLOURS)],
            label=f"{name}, R2 {one.scores['error_norm_r2']:.2f}",
        )
        limit = max(limit, *(float(np.quantile(v, CLIPPED)) for v in (true, predicted)))
    axes.set(xlabel="‖e‖², predicted from the row", ylabel="‖e‖², error of the row")
    if limit:
        axes.plot([0, limit], [0, limit], color="black", lw=1)
        axes.set(xlim=(0, limit), ylim=(0, limit))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.legend(fontsize=7, frameon=False, loc="upper left", markerscale=3)
