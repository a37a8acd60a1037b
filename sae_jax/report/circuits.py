"""Heads scored by their codes as a figure: the scores, and how well they know."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from sae_jax.report import drawing

BARS = {
    "node_auc": "heads",
    "edge_auc": "pairs",
    "node_auc_shuffled": "heads,\nshuffled",
    "edge_auc_shuffled": "pairs,\nshuffled",
}


def circuits_figure(
    heads: Mapping[str, tuple[Float[np.ndarray, " H"], Float[np.ndarray, " H"]]],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Figure:
    """Of each model the score of heads against what they do, and areas by seed.

    Args:
      heads: by model, what is known of the heads, and their mean score.
      rows: by model, and perhaps others, one for each seed, with the scores in `BARS`.
    """
    figure, (left, right) = drawing.new_figure(1, 2, height=3.6)
    for name, (known, score) in heads.items():
        i = [*rows].index(name)  # one colour in both panels
        style: dict[str, Any] = {"marker": drawing.MARKERS[i], "linestyle": ""}
        left.plot(known, score, label=name, ms=5, color=drawing.COLOURS[i], **style)
    left.set(xlabel="induction by the attention pattern", ylabel="score by codes")
    for i, (name, found) in enumerate(rows.items()):
        for j, bar in enumerate(BARS):
            values = np.array([row[bar] for row in found], float)
            along = j + 0.2 * (i - (len(rows) - 1) / 2) + 0 * values
            style = {"marker": drawing.MARKERS[i], "linestyle": "", "ms": 4}
            label = name if j == 0 else None
            right.plot(along, values, label=label, color=drawing.COLOURS[i], **style)
    right.axhline(0.5, color="black", lw=0.8)
    right.set_xticks(range(len(BARS)), list(BARS.values()))
    right.set(ylim=(0, 1.05), ylabel="area under the ROC curve")
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False, loc="lower right")
        drawing.say_if_empty(axes)
    return figure
