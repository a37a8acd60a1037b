"""What the figures share: panels, colours, axes of scores, legends, and the file.

One rule has one colour in all figures, by the order in which rules first appear; the
name of an SAE begins with that of its rule.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)
from matplotlib.transforms import Bbox
from PIL import Image

Lines: TypeAlias = Sequence[Mapping[str, Any]]

# Okabe and Ito 2008, told apart by the colour-blind; without their yellow, which thin
# lines on white do not show.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000".split()
MARKERS = "os^Dv<>PX"
DASHES = ("-", "--", "-.", ":")
LABELS = {
    "l0": "L0, features per row",
    "nmse": "NMSE",
    "loss_recovered": "loss recovered",
}
ON_LOG_AXES = ("l0", "nmse")
MOST_LINES = 8  # above, a legend names rules instead of SAEs
WIDTH, HEIGHT, DPI = 7.5, 4.5, 120  # inches, dots per inch
LEGEND_WIDTH = 130  # characters


def new_figure(
    n_rows: int, n_columns: int, height: float = HEIGHT
) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, row by row."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for axes in panels:
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", lw=0.7)
        axes.set_axisbelow(True)
    return figure, panels


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG of 256 colours, a third of the size of one of all.

    No date or version goes into it: the same figure gives the same bytes.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(
        path, format="PNG", optimize=True
    )


def score_axis(axes: Axes, side: Literal["x", "y"], score: str) -> None:
    """Names and scales the axis of a score, once everything is drawn."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[side]
    axis.set_label_text(LABELS[score])
    if score not in ON_LOG_AXES:
        axis.set_major_formatter(PercentFormatter(1.0))
        return
    axes.set(**{f"{side}scale": "log"})
    low, high = axis.get_view_interval()
    narrow, wide = high < 5 * low, high > 1000 * low
    log_ticks = LogLocator(subs=(1,) if wide else (1, 2, 5))
    axis.set_major_locator(MaxNLocator(5) if narrow else log_ticks)
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def say_if_empty(axes: Axes) -> None:
    """Says in a panel that there was nothing to draw.

    No error: the report of a run that failed is needed most of all.
    """
    if not axes.has_data():
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")


def values(lines: Lines, score: str) -> Float[np.ndarray, " N"]:
    """A score of each line; NaN, which is not drawn, where it has no place."""
    found = np.array([line.get(score) for line in lines], dtype=float)
    shown = np.isfinite(found) & ((found > 0) | (score not in ON_LOG_AXES))
    return np.where(shown, found, np.nan)


def grouped(lines: Lines, *fields: str) -> dict[tuple[Any, ...], Lines]:
    """The lines that share these fields, by what they share, in order."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault(tuple(line.get(field) for field in fields), []).append(line)
    return {**groups}


def by_rule(names: Iterable[str]) -> dict[str, list[str]]:
    """The SAEs of each rule, by the word that their names begin with."""
    rules: dict[str, list[str]] = {}
    for name in names:
        rules.setdefault(re.split(r"\W", name, maxsplit=1)[0], []).append(name)
    return rules


def rule_colours(names: Iterable[str]) -> dict[str, str]:
    """The colour of each SAE's rule, by rule."""
    groups = enumerate(by_rule(names).values())
    return {name: COLOURS[i % len(COLOURS)] for i, group in groups for name in group}


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How the line of each SAE is drawn; few share their rule's colour as tints."""
    colours = rule_colours(names)
    few = len(colours) <= MOST_LINES
    return {
        name: {
            "color": lighter(colours[name], 0.6 * few * j / len(group)),
            "linestyle": DASHES[few * j % len(DASHES)],
            "linewidth": 1.4 if few else 0.8,
        }
        for group in by_rule(colours).values()
        for j, name in enumerate(group)
    }


def lighter(colour: str, white: float) -> tuple[float, float, float]:
    """A colour mixed with a share of white."""
    red, green, blue = (part + (1 - part) * white for part in to_rgb(colour))
    return red, green, blue


def legend_of_saes(
    figure: Figure, styles: Mapping[str, Any], note: Callable[[list[str]], str]
) -> None:
    """One entry per SAE, or per rule where they are many, with a note on its SAEs."""
    few = len(styles) <= MOST_LINES
    groups = {name: [name] for name in styles} if few else by_rule(styles)
    handles = [
        Line2D([], [], label=label + note(names), **styles[names[0]])
        for label, names in groups.items()
    ]
    legend_below(figure, handles, None)


def legend_below(figure: Figure, handles: Sequence[Any], title: str | None) -> None:
    """A legend below the panels, in as many columns as have room."""
    if not handles:
        return
    longest = max(len(handle.get_label()) for handle in handles)
    room = LEGEND_WIDTH // (longest + 10)
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, min(len(handles), 4, room)),
        fontsize=8,
        title=title,
        title_fontsize=8,
        frameon=False,
    )
    for line in legend.get_lines():
        line.set_linewidth(1.6)


def hide_overlaps(figure: Figure) -> None:
    """Hides each text in a panel that would lie on one drawn before it."""
    figure.draw_without_rendering()  # places everything
    for axes in figure.axes:
        kept: list[Bbox] = []
        for text in axes.texts:
            box = text.get_window_extent()
            if any(box.overlaps(other) for other in kept):
                text.set_visible(False)
            else:
                kept.append(box)
