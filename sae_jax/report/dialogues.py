"""How well SAEs reconstruct dialogues, by the way of their training data.

The definitions are those of `evaluation.by_context`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from sae_jax.report import drawing
from sae_jax.report.scores import Row, Score, number, scores_text


def _score(name: str, heading: str, unit: str, form: str, meaning: str) -> Score:
    def show(row: Row) -> str:
        value = row.get(name)
        return number(value if value is None or unit != "%" else 100 * value, form)

    return Score(heading, unit, meaning, show)


MEANINGS = {
    "l0": ("L0", "features", ".1f", "Active features of a token."),
    "mse": ("MSE, all tokens", "", ".4g", "Mean in each dialogue, then over them."),
    "mse_special": ("MSE, special tokens", "", ".4g", "The same of special tokens."),
    "log2_mse": ("log2 MSE, all tokens", "", ".3f", "As the paper's tables."),
    "log2_mse_special": ("log2 MSE, special tokens", "", ".3f", "As its headline."),
    "nmse": ("NMSE", "", ".4f", "Of all tokens alike."),
    "loss_recovered": ("loss recovered", "%", ".1f", "Of the model, on dialogues."),
    "kl_spliced": ("KL, spliced", "nats", ".4f", "From the clean model."),
}
PARTS = {name: _score(name, *said) for name, said in MEANINGS.items()}


def dialogues_text(rows: Sequence[Row]) -> str:
    """The scores as aligned text, a column for every SAE."""
    return scores_text(rows, PARTS)


def dialogues_figure(rows: Sequence[Row], ways: Mapping[str, str]) -> Figure:
    """log2 MSE of all and of special tokens, a point for every SAE.

    Args:
      rows: one for each SAE, named by what it is, a hyphen, and its `way`.
      ways: what a reader calls each way.
    """
    figure, panels = drawing.new_figure(1, 2)
    names = list(dict.fromkeys(_without_way(row) for row in rows))
    titles = {"log2_mse": "all tokens", "log2_mse_special": "special tokens"}
    for axes, (score, title) in zip(panels, titles.items(), strict=True):
        for i, (way, label) in enumerate(ways.items()):
            of = {_without_way(r): r[score] for r in rows if r["way"] == way}
            axes.plot(
                np.arange(len(names)),
                [of.get(name, np.nan) for name in names],
                drawing.MARKERS[i],
                color=drawing.COLOURS[i],
                label=label,
            )
        axes.set_xticks(np.arange(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.margins(y=0.1)
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("log2 of MSE, by dialogue")
    panels[1].legend(fontsize=7, frameon=False)
    return figure


def _without_way(row: Row) -> str:
    return row["name"].removesuffix(f"-{row['way']}")
