"""Neuron groups beside an SAE as a figure: what is planted, and steering."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from sae_jax.report import drawing

PLANTED = {
    "snmf": "SNMF",
    "snmf_all": "SNMF, all\nneurons",
    "sae": "SAE",
    "shuffled": "SNMF,\nshuffled",
}


def groups_figure(
    planted: Sequence[Mapping[str, Any]],
    steering: Mapping[str, Sequence[Mapping[str, float]]],
    k: int,
) -> Figure:
    """Planted groups found, a point for each seed; success of steering by amount.

    Args:
      planted: one for each seed: by method, `found` of `k`.
      steering: by method, one for each amount: `amount` and `both`.
      k: groups that were planted.
    """
    figure, (left, right) = drawing.new_figure(1, 2, height=3.6)
    _draw_planted(left, planted, k)
    _draw_steering(right, steering)
    for axes in (left, right):
        drawing.say_if_empty(axes)
    return figure


def _draw_planted(axes: Axes, planted: Sequence[Mapping[str, Any]], k: int) -> None:
    for i, name in enumerate(PLANTED):
        found = np.array([seed[name]["found"] for seed in planted])
        if not len(found):
            return
        # Seeds side by side: many find the same number.
        along = i + np.linspace(-0.25, 0.25, len(found) + 2)[1:-1]
        axes.plot(along, found, "o", ms=4, color=drawing.COLOURS[i])
        axes.hlines(found.mean(), i - 0.3, i + 0.3, color=drawing.COLOURS[i], lw=1.5)
    axes.set_xticks(range(len(PLANTED)), list(PLANTED.values()))
    axes.set(ylim=(-0.4, k + 0.4), ylabel=f"groups found, of {k} planted")


def _draw_steering(
    axes: Axes, steering: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    for i, (name, rows) in enumerate(steering.items()):
        style: dict[str, Any] = {
            "marker": drawing.MARKERS[i % len(drawing.MARKERS)],
            "ms": 4,
            "lw": 1.2,
        }
        axes.plot(
            [row["amount"] for row in rows],
            [row["both"] for row in rows],
            label=name,
            color=drawing.COLOURS[i % len(drawing.COLOURS)],
            linestyle="--" if "," in name else "-",
            **style,
        )
    if not steering:
        return
    axes.set(xscale="log", xlabel="amount, in mean norms of the site's rows")
    axes.set_ylabel("concept and fluency, harmonic mean")
    axes.set_ylim(bottom=0)
    amounts = sorted({row["amount"] for rows in steering.values() for row in rows})
    axes.set_xticks(amounts)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=7, frameon=False)
