"""The figure of `bench`: steps in units of the encoder's product, size by size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from experiments._bench_timing import OURS, where
from sae_jax.report import drawing

LABELS = {
    OURS: "sae_jax",
    "saelens": "SAELens",
    "sparsify": "sparsify",
    "dense_top_afa": "PyTorch, by sorting",
}
COLOURS = dict(zip(LABELS, drawing.COLOURS, strict=False))
BAR = 0.27  # of the room that a configuration has
Rows = Sequence[Mapping[str, Any]]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """One panel per size, one group of bars per rule and budget."""
    sizes = drawing.grouped(report["rows"], "B", "D", "F")
    figure, panels = drawing.new_figure(len(sizes), 1, height=1.2 + 2.3 * len(sizes))
    for axes, ((B, D, F), rows) in zip(panels, sizes.items(), strict=True):
        panel(axes, rows)
        axes.set_title(f"B={B:,}  D={D:,}  F={F:,}", fontsize=9)
    machine, versions = report["machine"], report["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
    figure.suptitle(
        f"Training step over the encoder's product alone, "
        f"{report['settings']['dtype']}, log scale; lower is better\n"
        f"{where(machine)}\n{libraries}",
        fontsize=9,
    )
    there = {OURS} | {row["peer"] for row in report["rows"]}
    handles = [
        Patch(color=COLOURS[name], label=label)
        for name, label in LABELS.items()
        if name in there
    ]
    drawing.legend_below(figure, handles, None)
    drawing.save(figure, path)


def panel(axes: Axes, rows: Rows) -> None:
    """The bars of one size."""
    cases = drawing.grouped(rows, "rule", "k")
    for i, group in enumerate(cases.values()):
        bars = heights(group)
        for j, (name, height) in enumerate(bars.items()):
            x = i + (j - (len(bars) - 1) / 2) * BAR
            axes.bar(x, height, 0.9 * BAR, color=COLOURS[name])
            axes.annotate(
                f"{height:.2g}" if height < 10 else f"{height:.0f}",
                (x, height),
                (0, 1),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=6,
            )
    axes.axhline(1, color="0.3", lw=0.8, ls="--")
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("step / encoder matmul")
    axes.grid(axis="x", visible=False)
    names = [rule if k is None else f"{rule}\nk={k:g}" for rule, k in cases]
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_xlim(-0.6, len(names) - 0.4)


def heights(group: Rows) -> dict[str, float]:
    """Each system's time over that of the encoder's product.

    A peer's is ours over the ratio to it: medians of ratios, so good to their noise.
    """
    ours = group[0]["ratio_to_encoder_matmul"]
    theirs = {row["peer"]: ours / row["ratio_to_peer"] for row in group if row["peer"]}
    return {OURS: ours, **theirs}
