"""Rules compared at several sites: a table in the paper's form, tests, and figures.

The form is that of Lee et al. 2025 (arXiv:2503.24277). Rules whose knob fixes L0 stand
side by side, a line a knob; a rule that finds L0 by itself has it beside its error.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from sae_jax.evaluation.comparison import Contest, Setting, best
from sae_jax.quasi_orthogonality import description_length
from sae_jax.report import drawing
from sae_jax.report.drawing import COLOURS, DASHES, MARKERS, Lines
from sae_jax.report.figures import draw_settings
from sae_jax.report.table import WIDTH


def tables(settings: Sequence[Setting], *, fixed: Sequence[str], adaptive: str) -> str:
    """NMSE of all settings, mean ± standard deviation over seeds; `*` at the best.

    The best is that of its rule at its site, by mean. Below, the description length of
    a row's code at the best. A rule has one setting a knob and site.
    """
    winners = bests(settings)
    cells: dict[tuple[str, str, float], str] = {}
    bits: dict[tuple[str, str], str] = {}
    for one in settings:
        mark = "*" if one is winners[one.rule, one.site] else ""
        l0 = f"{one.l0.mean():.1f}, " if one.rule == adaptive else ""
        cell = f"{l0}{mean_and_spread(one.nmse)}{mark}"
        cells[one.rule, one.site, one.knob] = cell
        if mark:
            size = description_length(float(one.l0.mean()), one.n_features)
            bits[one.rule, one.site] = f"{size:,.0f}"
    sites = list(dict.fromkeys(one.site for one in settings))
    parts = []
    for rules, title in (
        (fixed, " | ".join(fixed)),
        ((adaptive,), f"{adaptive}: L0, NMSE"),
    ):
        knobs = sorted({one.knob for one in settings if one.rule in rules})
        columns = {}
        for site in sites:
            sides = []
            for rule in rules:
                side = [cells.get((rule, site, knob), "-") for knob in knobs]
                side.append(bits.get((rule, site), "-"))
                width = max(map(len, side))
                sides.append([text.ljust(width) for text in side])
            columns[site] = [" | ".join(line) for line in zip(*sides, strict=True)]
        labels = [*(f"{knob:g}" for knob in knobs), "bits"]
        parts.append(f"{title}\n{_aligned('knob', labels, columns)}")
    return "\n\n".join(parts)


def contests_table(contests: Sequence[Contest]) -> str:
    """Two lines a contest: both settings with their means, and what the test says."""
    heads: tuple[str, ...] = (
        "site",
        "best",
        "mean",
        "n",
        "effect",
        "t",
        "df",
        "p",
        "p Holm",
    )
    lines = [heads]
    for contest in contests:
        test = contest.test
        sides = zip(
            (contest.first, contest.second), test.means, test.counts, strict=True
        )
        left = [(label(one), short(mean), str(n)) for one, mean, n in sides]
        numbers = [_given(x, ".2f") for x in (test.effect, test.t, test.df)]
        numbers += [_given(p, ".2g") for p in (test.p, contest.p_holm)]
        lines.append((contest.first.site, *left[0], *numbers))
        lines.append(("", *left[1], *[""] * len(numbers)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(w) if i < 2 else text.rjust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def settings_rows(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """One row a setting, for CSV: means and standard deviations over its seeds."""
    winners = bests(settings)
    return [
        {
            "site": one.site,
            "rule": one.rule,
            "knob": one.knob,
            "n_features": one.n_features,
            "seeds": len(one.seeds),
            "l0_mean": float(one.l0.mean()),
            "l0_sd": spread(one.l0),
            "nmse_mean": float(one.nmse.mean()),
            "nmse_sd": spread(one.nmse),
            "bits": description_length(float(one.l0.mean()), one.n_features),
            "best": one is winners[one.rule, one.site],
        }
        for one in settings
    ]


def bests(settings: Sequence[Setting]) -> dict[tuple[str, str], Setting | None]:
    """The setting of the least mean NMSE, by rule and site; None if none is finite."""
    groups: dict[tuple[str, str], list[Setting]] = {}
    for one in settings:
        groups.setdefault((one.rule, one.site), []).append(one)
    return {
        key: best(group, lambda one: float(one.nmse.mean()))
        for key, group in groups.items()
    }


def frontiers_figure(rows: Lines) -> Figure:
    """NMSE and loss recovered against L0, a column of panels for each site.

    A point is the mean over seeds, bars go from the least to the largest.
    """
    sites = list(dict.fromkeys(row["site"] for row in rows))
    styles = _rule_styles(rows)
    figure, panels = drawing.new_figure(2, len(sites), 5.0)
    for j, site in enumerate(sites):
        here = [row for row in rows if row["site"] == site]
        for i, score in enumerate(("nmse", "loss_recovered")):
            axes = panels[i * len(sites) + j]
            for rule, style in styles.items():
                of_rule = [row for row in here if row["rule"] == rule]
                draw_settings(axes, of_rule, score, style, knobs=False)
            drawing.score_axis(axes, "x", "l0")
            drawing.score_axis(axes, "y", score)
            if axes.get_xscale() == "log" and len(sites) > 1:
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))  # room for few
            axes.set_xlabel(axes.get_xlabel() if i else "")
            axes.set_ylabel("" if j else axes.get_ylabel())
            drawing.say_if_empty(axes)
        panels[j].set_title(site, fontsize=9)
    handles = [Line2D([], [], label=rule, **style) for rule, style in styles.items()]
    drawing.legend_below(figure, handles, None)
    return figure


def beside_figure(own: Lines, other: Lines, *, names: tuple[str, str]) -> Figure:
    """Training error against the share of active features: two groups of runs.

    Both panels have the same axes, with L0 / F across, since dictionaries of other
    sizes are compared; markers of the second group are hollow. Rows hold `mse`.
    """
    figure, panels = drawing.new_figure(1, 2)
    panels[1].sharex(panels[0])
    panels[1].sharey(panels[0])
    styles = _rule_styles([*own, *other])
    sites: dict[Any, str] = {}  # by how their lines are drawn
    for axes, rows, face, name in zip(
        panels, (own, other), (None, "white"), names, strict=True
    ):
        shares = [
            {**row, "l0": row["l0"] / row["n_features"], "nmse": row["mse"]}
            for row in rows
        ]
        here = list(dict.fromkeys(row["site"] for row in rows))
        for (rule, site), members in drawing.grouped(shares, "rule", "site").items():
            dash = DASHES[here.index(site) % len(DASHES)]
            style = {**styles[rule], "linestyle": dash, "markerfacecolor": face}
            draw_settings(axes, members, "nmse", style, knobs=False)
        for site, dash in zip(here, DASHES * len(here), strict=False):
            sites[dash] = f"{sites[dash]}; {site}" if dash in sites else site
        sizes = ", ".join(f"{F:,}" for F in sorted({r["n_features"] for r in rows}))
        axes.set_title(f"{name}, F = {sizes}", fontsize=9)
    for axes in panels:
        drawing.score_axis(axes, "x", "l0")
        drawing.score_axis(axes, "y", "nmse")
        axes.set_xlabel("L0 / F, share of features active")
    panels[0].set_ylabel("squared error of treated rows, at the end of training")
    panels[1].set_ylabel("")
    handles = [Line2D([], [], label=rule, **style) for rule, style in styles.items()]
    handles += [
        Line2D([], [], color="0.3", linestyle=dash, label=label)
        for dash, label in sites.items()
    ]
    drawing.legend_below(figure, handles, None)
    return figure


def label(setting: Setting) -> str:
    """Rule and knob, and the seed where there is one alone."""
    seed = f" seed {setting.seeds[0]}" if len(setting.seeds) == 1 else ""
    return f"{setting.rule} {setting.knob:g}{seed}"


def mean_and_spread(values: Float[np.ndarray, " S"]) -> str:
    """Mean ± standard deviation; the mean alone where there is one value."""
    mean, sd = float(values.mean()), spread(values)
    if not math.isfinite(mean) or len(values) < 2:
        return short(mean)
    return f"{short(mean)}±{f'{sd:.0e}' if _small(mean) else f'{sd:.4f}'}".replace(
        "e-0", "e-"
    ).replace("±0.", "±.")


def spread(values: Float[np.ndarray, " S"]) -> float:
    """The sample's standard deviation; NaN of fewer than two values."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def short(value: float) -> str:
    """`.0749`, `9.53e-3`, or `nan`; as short as the paper has it."""
    if not math.isfinite(value):
        return format(value, "f")
    if _small(value):
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:.4f}".removeprefix("0")


def _small(value: float) -> bool:
    return 0 < value < 0.01


def _given(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _rule_styles(rows: Lines) -> dict[str, dict[str, Any]]:
    """Colour and marker of each rule, by the order in which they appear."""
    return {
        rule: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        for i, rule in enumerate(dict.fromkeys(row["rule"] for row in rows))
    }


def _aligned(head: str, labels: list[str], columns: Mapping[str, list[str]]) -> str:
    """Columns beside their labels, in as many blocks as the width asks for."""
    left = [head, *labels]
    first = max(map(len, left))
    blocks: list[list[str]] = []
    room = 0
    for title, cells in columns.items():
        column = [title, *cells]
        width = max(map(len, column)) + 2
        if not blocks or width > room:
            blocks.append([text.ljust(first) for text in left])
            room = WIDTH - first
        room -= width
        blocks[-1] = [
            f"{line}  {text.ljust(width - 2)}"
            for line, text in zip(blocks[-1], column, strict=True)
        ]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)
