"""What erasing features does to text of several kinds, as text and as a figure.

The definitions are those of `analysis.erasure`. Scores are named by the kind of text:
`concept`, `paraphrased` (the concept in other words) and `other`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_jax.report import drawing
from sae_jax.report.scores import Row, Score, number, scores_text

KINDS = {
    "concept": "the concept",
    "paraphrased": "the concept, paraphrased",
    "other": "other text",
}
OF_KIND = {
    "contexts": ("prompts of {}", "", ".0f"),
    "loss_clean": ("loss on {}", "nats", ".3f"),
    "loss_erased": ("  all of it edited", "nats", ".3f"),
    "loss_guarded": ("  edited where the gate is open", "nats", ".3f"),
    "kl_guarded": ("  divergence, gated", "nats", ".4f"),
    "edited": ("  gate open to", "%", ".1f"),
    "auroc": ("  told from other text, AUC", "", ".3f"),
    "auroc_by_chance": ("  shuffled labels, mean AUC", "", ".3f"),
    "auroc_by_chance_95": ("  shuffled labels, 95th percentile", "", ".3f"),
}


def _score(name: str, heading: str, unit: str, form: str) -> Score:
    def show(row: Row) -> str:
        value = row.get(name)
        return number(value if value is None or unit != "%" else 100 * value, form)

    return Score(heading, unit, "", show)


PARTS = {
    "features": _score("features", "features", "", ".0f"),
    "threshold": _score("threshold", "threshold of the gate", "", ".3g"),
    **{
        f"{kind}_{name}": _score(f"{kind}_{name}", heading.format(of), unit, form)
        for kind, of in KINDS.items()
        for name, (heading, unit, form) in OF_KIND.items()
    },
}


def effects_text(rows: Sequence[Row]) -> str:
    """The scores as aligned text, a column for every set of features."""
    return scores_text(rows, PARTS)


def effects_figure(
    rows: Sequence[Row], responses: Mapping[str, Float[np.ndarray, " N"]]
) -> Figure:
    """The rise in loss by kind of text, and the responses of prompts.

    Args:
      rows: one for each set of features; the gate drawn is that of the first.
      responses: those of the first, by kind of text.
    """
    figure, (left, right) = drawing.new_figure(1, 2)
    _draw_losses(left, rows)
    _draw_responses(right, responses, rows[0]["threshold"])
    return figure


def _draw_losses(axes: Axes, rows: Sequence[Row]) -> None:
    """Bars, in groups of one kind of text; those with the gate are paler."""
    width = 0.8 / (2 * len(rows))
    for i, row in enumerate(rows):
        for j, (how, label) in enumerate({"erased": "", "guarded": ", gated"}.items()):
            rise = [row[f"{k}_loss_{how}"] - row[f"{k}_loss_clean"] for k in KINDS]
            at = np.arange(len(KINDS)) - 0.4 + width * (2 * i + j + 0.5)
            colour = drawing.COLOURS[i]
            axes.bar(
                at,
                rise,
                width,
                color=drawing.lighter(colour, 0.6) if j else colour,
                label=f"{row['name']}{label}",
            )
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(
        np.arange(len(KINDS)), [of.replace(", ", ",\n") for of in KINDS.values()]
    )
    axes.set_ylabel("rise of the loss, nats")
    axes.legend(fontsize=7, frameon=False)


def _draw_responses(
    axes: Axes, responses: Mapping[str, Float[np.ndarray, " N"]], threshold: float
) -> None:
    """The share of prompts above each size."""
    for i, (kind, values) in enumerate(responses.items()):
        size = np.sort(values)
        share = 1 - np.arange(len(size)) / len(size)
        style = drawing.DASHES[i % len(drawing.DASHES)]
        axes.step(
            size,
            share,
            style,
            where="pre",
            label=KINDS[kind],
            color=drawing.COLOURS[i + 2],
        )
    axes.axvline(threshold, color="black", ls=":", lw=1.2, label="the gate")
    axes.set(xscale="log", ylim=(0, 1.02))
    axes.set(xlabel="response, mean squared change", ylabel="share of prompts above")
    axes.legend(fontsize=7, frameon=False)
