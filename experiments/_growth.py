"""Growth of measured times with a size: exponents of power laws, and their figure.

A point has one value for each of AXES and two times, `ms` of a training step and
`floor_ms` of the encoder's product. A curve is the points of one rule along one axis,
all other sizes in the middle.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from experiments._bench_timing import FLOOR, where
from sae_jax.report import drawing

AXES = {
    "B": "rows in a batch, B",
    "F": "features, F",
    "k": "active features per row, k",
}
Points = Sequence[Mapping[str, Any]]


class Fit(NamedTuple):
    """A straight line through logarithms: its slope, and the slope's standard error."""

    slope: float
    error: float | None

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.2f}"
        return f"{self.slope:.2f}{error}"


def fit(sizes: Float[np.ndarray, " N"], times: Float[np.ndarray, " N"]) -> Fit:
    """The slope of log time against log size by least squares.

    With u and v the logarithms less their means, the slope is `u.v / u.u`, and its
    standard error `sqrt(r.r / (N - 2) / u.u)` with residuals `r = v - slope u`; none
    where two points determine the line. A bend is in the error only as scatter.
    """
    u, v = np.log(sizes), np.log(times)
    u, v = u - u.mean(), v - v.mean()
    slope = (u @ v) / (u @ u)
    r, free = v - slope * u, len(u) - 2
    return Fit(float(slope), float(np.sqrt(r @ r / free / (u @ u))) if free else None)


def along(points: Points, axis: str, middle: Mapping[str, int]) -> Points:
    """The points where all other sizes are in the middle, by the size that changes."""
    others = [name for name in AXES if name != axis]
    found = [
        p
        for p in points
        if p[axis] is not None
        and all(p[name] in (middle[name], None) for name in others)
    ]
    return sorted(found, key=lambda p: p[axis])


def column(points: Points, name: str) -> Float[np.ndarray, " N"]:
    """One value of each point."""
    return np.array([p[name] for p in points], dtype=float)


def growth(points: Points, axis: str, time: str) -> Fit:
    """How a time of these points grows along an axis."""
    return fit(column(points, axis), column(points, time))


def slopes(points: Points, middle: Mapping[str, int]) -> list[dict[str, Any]]:
    """The growth of each rule along each axis that has two sizes or more."""
    rows = []
    for (rule,), own in drawing.grouped(points, "rule").items():
        for axis in AXES:
            curve = along(own, axis, middle)
            if len(curve) < 2:
                continue
            ours, floor = growth(curve, axis, "ms"), growth(curve, axis, "floor_ms")
            rows.append(
                {
                    "rule": rule,
                    "axis": axis,
                    "points": len(curve),
                    "slope": ours.slope,
                    "slope_error": ours.error,
                    "floor_slope": floor.slope,
                    "floor_slope_error": floor.error,
                }
            )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The slopes as text."""
    lines = [f"{'rule':>18} {'axis':>4} {'points':>6} {'slope':>14} {FLOOR:>14}"]
    for row in rows:
        ours = str(Fit(row["slope"], row["slope_error"]))
        floor = str(Fit(row["floor_slope"], row["floor_slope_error"]))
        lines.append(
            f"{row['rule']:>18} {row['axis']:>4} {row['points']:>6} {ours:>14} "
            f"{floor:>14}"
        )
    return "\n".join(lines)


def draw(report: Mapping[str, Any], middle: Mapping[str, int], path: Path) -> None:
    """Writes `growth_figure`."""
    drawing.save(growth_figure(report, middle), path)


def growth_figure(report: Mapping[str, Any], middle: Mapping[str, int]) -> Figure:
    """One panel per axis, all with the same milliseconds."""
    points, machine = report["points"], report["machine"]
    figure, panels = drawing.new_figure(1, len(AXES), height=4.2)
    low, high = min(column(points, "floor_ms")), max(column(points, "ms_max"))
    for axes, axis in zip(panels, AXES, strict=True):
        panel(axes, axis, points, middle)
        axes.set_ylim(low / 1.3, high * 1.3)
    panels[0].set_ylabel("time, ms")
    others = ", ".join(f"{name}={value:,}" for name, value in middle.items())
    figure.suptitle(
        f"Training step against one size, log scales, with slope ± standard error\n"
        f"elsewhere {others}, D={points[0]['D']:,}; bars from least to most\n"
        f"{where(machine)}, jax {report['versions']['jax']}",
        fontsize=9,
    )
    return figure


def panel(axes: Axes, axis: str, points: Points, middle: Mapping[str, int]) -> None:
    """A line per rule with bars from least to most, and the product's, dashed."""
    colours = drawing.rule_colours(p["rule"] for p in points)
    for i, ((rule,), own) in enumerate(drawing.grouped(points, "rule").items()):
        curve = along(own, axis, middle)
        if curve:
            ms = column(curve, "ms")
            bars = (ms - column(curve, "ms_min"), column(curve, "ms_max") - ms)
            axes.errorbar(
                column(curve, axis),
                ms,
                bars,
                color=colours[rule],
                marker=drawing.MARKERS[i % len(drawing.MARKERS)],
                ms=4,
                lw=1.3,
                elinewidth=0.8,
                label=label(rule, curve, axis, "ms"),
            )
    # The product is the same for all rules: one line, the mean of what they found.
    curve = along(points, axis, middle)
    sizes = {
        size: column(g, "floor_ms")
        for (size,), g in drawing.grouped(curve, axis).items()
    }
    if not sizes:
        drawing.say_if_empty(axes)
        return
    axes.errorbar(  # as the others, which keeps the legend in order
        list(sizes),
        [statistics.geometric_mean(times) for times in sizes.values()],
        color="0.3",
        ls="--",
        lw=1.3,
        label=label(FLOOR, curve, axis, "floor_ms"),
    )
    axes.set(xscale="log", yscale="log", xlabel=AXES[axis])
    axes.set_xticks(list(sizes), [f"{size:g}" for size in sizes], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=7, frameon=False)


def label(name: str, curve: Points, axis: str, time: str) -> str:
    """An entry of the legend; with the slope, where there are two sizes."""
    several = len({p[axis] for p in curve}) > 1
    return f"{name}  {growth(curve, axis, time)}" if several else name
