"""The figure of `synthetic`: rules by worlds, as maps of three scores."""

from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm, Normalize

from experiments._recovery_table import (
    NOTE,
    OFF,
    Rows,
    labels,
    mean,
    number,
    off,
    share,
)
from sae_jax.report import drawing

LINE, HEAD = 0.27, 1.6  # inches
PANELS = (
    ("matched_cosine", "matched cosine", share),
    ("f1", "F1 of firing", share),
    ("l0", "L0, features per row", number),
)


def draw(rows: Rows, path: Path) -> None:
    """Writes it."""
    names, worlds = labels(rows), [w for (w,) in drawing.grouped(rows, "world")]
    specs = list(names)
    found = drawing.grouped(rows, "given", "world")
    height = HEAD + LINE * len(specs)
    figure, panels = drawing.new_figure(1, len(PANELS), height=height)
    for axes, (score, title, show) in zip(panels, PANELS, strict=True):
        at = np.full((len(specs), len(worlds)), np.nan)
        for i, spec in enumerate(specs):
            for j, world in enumerate(worlds):
                if own := found.get((spec, world)):
                    at[i, j] = mean(own, score)
        true = mean(rows, "true_l0")
        norm = LogNorm(true / 8, true * 8) if score == "l0" else Normalize(0, 1)
        colours = "RdBu_r" if score == "l0" else "viridis"
        image = axes.imshow(at, cmap=colours, norm=norm, aspect="auto")
        for i, j in np.argwhere(np.isfinite(at)):
            star = OFF if score == "l0" and off(found[specs[i], worlds[j]]) else ""
            axes.text(
                j,
                i,
                show(at[i, j]) + star,
                ha="center",
                va="center",
                fontsize=7,
                color=readable(image.cmap(norm(at[i, j]))),
            )
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(worlds)), worlds, rotation=45, ha="right")
        axes.set_yticks(range(len(specs)), list(names.values()))
        if axes is not panels[0]:
            axes.set_yticklabels([])
    seeds = len({row["seed"] for row in rows})
    cells = {(row["given"], row["world"]) for row in rows}
    few = "up to " if len(rows) < seeds * len(cells) else ""
    figure.suptitle(
        f"Planted features: what each rule finds, true L0 {number(true)} "
        f"(means of {few}{seeds} seed{'s' * (seeds > 1)})",
        fontsize=10,
    )
    figure.supxlabel(NOTE, fontsize=7)
    drawing.save(figure, path)


def readable(colour: tuple[float, ...]) -> str:
    """Black on light colours, white on dark ones."""
    red, green, blue = colour[:3]
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
