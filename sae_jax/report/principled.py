"""Dictionaries against known attributes, as text and as a figure.

The definitions are those of `analysis.principled`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sae_jax.report import drawing

Row = Mapping[str, Any]
MOST_PANELS = 3
COLUMNS = {
    "fvu": "FVU",
    "l0": "L0",
    "sufficiency": "sufficiency",
    "sufficiency_over_mean": "over mean",
    "necessity": "necessity",
    "necessity_distance": "distance",
}
TOLD = {
    "n_fired": "fired",
    "f1_median": "F1, median",
    "f1_median_by_chance": "by chance",
    "n_high": "F1 >= .8",
    "n_high_by_chance": "by chance",
    "keep_only_high": "only these: sufficiency",
    "without_high": "without: necessity",
}


def all_text(task: str, record: Row) -> dict[str, str]:
    """Tables under their headings."""
    rows = record["dictionaries"]
    saes = [row for row in rows if "f1_median" in row]
    texts = {
        f"The task {task}": _model(record["model"], record["shares"]),
        "Approximation": "Reconstructions in place of rows, and all but them; 1 at "
        "best.\nThe mean row has a logit difference of "
        f"{rows[0]['ld_mean']:.2f}, the clean one {rows[0]['ld_clean']:.2f}.\n"
        + _table(rows, COLUMNS),
        "Sparse control": _control(rows),
    }
    if saes:
        texts["Interpretability"] = (
            "F1 of features for the property that they mean, chosen on other prompts;\n"
            "by chance: with shuffled labels.\n" + _table(saes, TOLD)
        )
        texts["Interpretability"] += "\n\n" + _told(saes)
        texts["Over-splitting"] = _split(saes)
    if record["occlusion"]:
        texts["Occlusion"] = _occlusion(record["occlusion"])
    return texts


def _model(model: Row, shares: Mapping[str, float]) -> str:
    """What the model can do, and what the places decide."""
    lines = [
        f"The model's next token is right in {model['accuracy']:.1%} of new prompts, "
        f"its likeliest of the {model['n_answers']} answers in "
        f"{model['accuracy_among_answers']:.1%} (chance {1 / model['n_answers']:.1%}).",
        f"Logit difference of right and wrong {model['logit_difference']:.2f}, above 0 "
        f"in {model['right_over_wrong']:.1%} (chance 50 %).",
        "",
        _line(["attribute", "share of", "patched: new", "no edit:"]),
        _line(["", "variance", "answer, %", "agrees, %"]),
    ]
    for name, share in shares.items():
        follows, none = (
            model[f"{name}: {what}"] for what in ("follows the patch", "no edit")
        )
        lines.append(
            _line([name, f"{share:.4f}", f"{100 * follows:.1f}", f"{100 * none:.1f}"])
        )
    return "\n".join(lines)


def _control(rows: Sequence[Row]) -> str:
    """Agreement in per cent, and the weight that was taken away."""
    parts = [
        "How often an edit of k features makes the model predict what it predicts with "
        "the\ncounterfactual's own row, %; k = 0 is no edit. In brackets: the weight "
        "taken away, %.\nSecond line of SAEs: the k features of the highest F1 "
        "instead, out and in."
    ]
    for name in rows[0]["edits"]:
        ks = [edit["k"] for edit in rows[0]["edits"][name]]
        lines = [f"{name:20}" + "".join(f"{f'k={k}':>14}" for k in ks)]
        for row in rows:
            edits = row["edits"][name]
            cells = [
                f"{100 * e['agreement']:.1f} ({100 * e['weight']:3.0f})" for e in edits
            ]
            lines.append(f"{row['name']:20}" + "".join(f"{c:>14}" for c in cells))
            if any("by_f1" in e for e in edits):
                cells = [
                    f"{100 * e['by_f1']:.1f}      " if "by_f1" in e else ""
                    for e in edits
                ]
                lines.append(f"{'  by F1':20}" + "".join(f"{c:>14}" for c in cells))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _told(saes: Sequence[Row]) -> str:
    """The best F1 for a value, and the clearest features."""
    lines = ["The highest F1 of any feature for a value, mean over values (by chance):"]
    lines.append(f"{'':20}" + "".join(f"{name:>16}" for name in saes[0]["told"]))
    for row in saes:
        cells = [
            f"{row['told'][n]:.2f} ({row['told_by_chance'][n]:.2f})"
            for n in row["told"]
        ]
        lines.append(f"{row['name']:20}" + "".join(f"{cell:>16}" for cell in cells))
    for row in saes:
        lines += ["", f"{row['name']}: the features of the highest F1"]
        lines += [
            f"{one['f1']:5.2f}  fires in {one['fires']:5.1%}  {one['feature']:>5} at "
            f"{one['place']}  {one['means']}"
            for one in row["features"][:5]
        ]
    return "\n".join(lines)


def _split(saes: Sequence[Row]) -> str:
    """Features per value."""
    lines = [
        "Features that fire on a value almost alone (precision .9): how many, the "
        "share of its\nprompts in which the most frequent fires, and how many are "
        "needed for 90 % (-: all are too\nfew). Attributes of more than two values: "
        "the mean over them."
    ]
    for row in saes:
        lines += ["", row["name"]]
        for name, values in row["split"].items():
            each = list(values.items())
            if len(each) > 2:
                n = np.mean([one["n_precise"] for _, one in each])
                largest = np.mean([one["largest"] for _, one in each])
                covered = np.mean([one["needed"] > 0 for _, one in each])
                lines.append(
                    f"  {name:18} {n:5.1f} features, largest {largest:4.0%}, 90 % "
                    f"reached for {covered:.0%} of {len(each)} values"
                )
                continue
            for value, one in each:
                needed = one["needed"] if one["needed"] >= 0 else "-"
                lines.append(
                    f"  {name} {value!r:12} {one['n_precise']:5} features, largest "
                    f"{one['largest']:4.0%}, needed {needed}"
                )
    return "\n".join(lines)


def _occlusion(rows: Sequence[Row]) -> str:
    """F1 against the strength of the attribute."""
    name = rows[0]["attribute"]
    lines = [
        f"Of the attributes that move the rows (1 % of their variance), {name} does so "
        f"least. SAEs\ntrained on rows in which it is so many times as strong, and the "
        f"highest F1 of any feature\nfor a value there:",
        _line(["factor", "share", *rows[0]["told"]]),
    ]
    for row in rows:
        told = [f"{value:.2f}" for value in row["told"].values()]
        lines.append(_line([f"{row['factor']:g}", f"{row['share']:.4f}", *told]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "".join([f"{cells[0]:14}", *(f"{cell:>14}" for cell in cells[1:])]).rstrip()


def _table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A row for each dictionary."""
    widths = {n: max(len(head) + 2, 10) for n, head in columns.items()}
    lines = [f"{'':20}" + "".join(f"{h:>{widths[n]}}" for n, h in columns.items())]
    for row in rows:
        cells = (_number(row[n]).rjust(widths[n]) for n in columns)
        lines.append(f"{row['name']:20}" + "".join(cells))
    return "\n".join(lines)


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def control_figure(record: Row) -> Figure:
    """Edits of each attribute above; approximation, F1 and occlusion below."""
    rows = record["dictionaries"]
    names = list(rows[0]["edits"])[:MOST_PANELS]
    figure, panels = drawing.new_figure(2, MOST_PANELS, 6.2)
    colours = {row["name"]: drawing.COLOURS[i % 7] for i, row in enumerate(rows)}
    for axes, name in zip(panels, names, strict=False):
        _draw_edits(axes, rows, name, colours)
    for axes in panels[len(names) : MOST_PANELS]:
        axes.set_axis_off()
    below = panels[MOST_PANELS:]
    _draw_approximation(below[0], rows, colours)
    _draw_f1(below[1], [row for row in rows if "told" in row], colours)
    _draw_occlusion(below[2], record["occlusion"])
    for axes in panels[: len(names)] + below:
        drawing.say_if_empty(axes)
    handles = panels[0].get_legend_handles_labels()[0]
    drawing.legend_below(figure, handles, None)
    return figure


def _draw_edits(
    axes: Axes, rows: Sequence[Row], name: str, colours: Mapping[str, str]
) -> None:
    for i, row in enumerate(rows):
        edits = row["edits"][name][1:]
        axes.plot(
            range(len(edits)),
            [edit["agreement"] for edit in edits],
            color=colours[row["name"]],
            marker=drawing.MARKERS[i % len(drawing.MARKERS)],
            ms=4,
            lw=1.2,
            label=row["name"],
        )
    none = rows[0]["edits"][name][0]["agreement"]
    axes.axhline(none, color="0.5", lw=1.2, ls="--", label="no edit")
    axes.set_xticks(range(len(edits)), [str(edit["k"]) for edit in edits])
    axes.set(title=name, ylim=(-0.03, 1.03), xlabel="features exchanged, k")
    axes.title.set_fontsize(9)
    axes.set_ylabel("agreement")


def _draw_approximation(
    axes: Axes, rows: Sequence[Row], colours: Mapping[str, str]
) -> None:
    names = {"sufficiency": "sufficiency", "necessity": "necessity"}
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            at = j + 0.8 * (i + 0.5) / len(rows) - 0.4
            width = 0.75 / len(rows)
            axes.bar(at, row[name], width, color=colours[row["name"]])
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(names)), list(names.values()))


def _draw_f1(axes: Axes, saes: Sequence[Row], colours: Mapping[str, str]) -> None:
    """The best F1 for the values of each attribute; hollow: by chance."""
    for i, row in enumerate(saes):
        x = np.arange(len(row["told"])) + 0.6 * (i + 0.5) / len(saes) - 0.3
        style: Any = {"color": colours[row["name"]], "ls": "", "ms": 5, "marker": "o"}
        axes.plot(x, list(row["told"].values()), **style)
        axes.plot(x, list(row["told_by_chance"].values()), mfc="white", **style)
        axes.set_xticks(range(len(row["told"])), list(row["told"]))
    axes.set(ylim=(0, 1.03), ylabel="highest F1 for a value\n(hollow: labels shuffled)")


def _draw_occlusion(axes: Axes, rows: Sequence[Row]) -> None:
    if not rows:
        return
    factors = [row["factor"] for row in rows]
    for i, name in enumerate(rows[0]["told"]):
        told = [row["told"][name] for row in rows]
        style: Any = {"color": str(0.25 * i), "marker": drawing.MARKERS[i % 8], "ms": 4}
        axes.plot(factors, told, lw=1.2, label=name, **style)
    axes.set(xscale="log", ylim=(0, 1.03), ylabel="highest F1 for a value")
    axes.set_xticks(factors, [f"{f:g}" for f in factors])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"times as strong: {rows[0]['attribute']}")
    axes.legend(fontsize=7, frameon=False)
