"""Figures of many SAEs at once: the ZF plot of all layers, and half violins."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from sae_jax.evaluation.measures import Evaluation
from sae_jax.report import drawing
from sae_jax.report.figures import (
    MOST_POINTS,
    draw_bands,
    legend_of_bands,
    norm_limit,
)

PALETTE = matplotlib.colormaps["viridis"]
CLIPPED = 0.99  # the authors' quantile: a few rows would squash the rest
SHORT = 4  # characters of a name that fits below its violin


class Layer(NamedTuple):
    """What was recorded of one layer, a value a row."""

    norm_z: Float[np.ndarray, " R"]
    norm_f: Float[np.ndarray, " R"]
    epsilon_lbo: Float[np.ndarray, " R"]
    relative_error: Float[np.ndarray, " R"]


def violins(evaluations: Mapping[str, Evaluation], each: str, path: Path) -> None:
    """Writes `violins_figure`."""
    drawing.save(violins_figure(evaluations, each), path)


def layers_zf_figure(layers: Mapping[int, Layer]) -> Figure:
    """The ZF plot of Lee et al. 2025 (arXiv:2503.24277), rows coloured by layer."""
    figure, (axes,) = drawing.new_figure(1, 1, 6.0)
    numbers = sorted(layers)
    colour = Normalize(numbers[0], max(numbers[-1], numbers[0] + 1))
    both = np.concatenate([np.stack(layers[n][:2]) for n in numbers], axis=1)
    limit = norm_limit(*both[:, np.isfinite(both).all(0)])
    draw_bands(axes, limit)
    for number in numbers:
        z, f = layers[number][:2]
        lot = np.random.default_rng(0).permutation(len(z))[: MOST_POINTS // 2]
        shade = PALETTE(colour(number))
        axes.plot(z[lot], f[lot], ".", ms=2.5, color=shade, alpha=0.6, mew=0)
    axes.set_xlabel("‖z‖, norm of the row")
    axes.set_ylabel("‖f‖, norm of its code")
    figure.colorbar(ScalarMappable(colour, PALETTE), ax=axes, label="layer", shrink=0.7)
    legend_of_bands(figure)
    return figure


def violins_figure(
    found: Mapping[int, Layer] | Mapping[str, Evaluation], each: str
) -> Figure:
    """Distributions of eps-LBO (left half) and of the error (right), for `each` one.

    Both are those of rows: the error of a row is divided by its own squared norm, as in
    the authors' figures, which call it normalised MSE.
    """
    shown = {str(name): one for name, one in found.items()}
    longest = max(map(len, shown), default=0)
    room = 0.05 * longest if longest > SHORT else 0
    figure, (left,) = drawing.new_figure(1, 1, drawing.HEIGHT + room)
    right = left.twinx()
    right.tick_params(labelsize=8)
    right.spines["top"].set_visible(False)
    halves: list[tuple[Axes, Literal["low", "high"], str, str]] = [
        (left, "low", "epsilon_lbo", "ε-LBO"),
        (right, "high", "relative_error", "squared error over squared norm"),
    ]
    for (axes, side, score, label), colour in zip(
        halves, drawing.COLOURS, strict=False
    ):
        for number, one in enumerate(shown.values()):
            values = getattr(one, score)
            values = values[np.isfinite(values)]
            if not len(values):
                continue
            median = np.median(values)
            values = values[values <= np.quantile(values, CLIPPED)]
            parts: Any = axes.violinplot(
                [values], [number], widths=0.9, side=side, showextrema=False
            )
            parts["bodies"][0].set(facecolor=colour, alpha=0.6)
            start = number - 0.3 if side == "low" else number
            axes.hlines(median, start, start + 0.3, color=colour, lw=1.5)
        axes.set_ylabel(
            f"{label}\n(rows up to the 99th percentile)", color=colour, fontsize=9
        )
        axes.set_ylim(bottom=0)
        axes.grid(visible=False)
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:.1e}"))
    left.set_xlabel(f"{each}; left half ε-LBO, right half error, bars at the medians")
    left.set_xticks(range(len(shown)), list(shown))
    if longest > SHORT:
        left.tick_params("x", labelrotation=30)
        for tick in left.get_xticklabels():
            tick.set_horizontalalignment("right")
    drawing.say_if_empty(left)
    return figure
