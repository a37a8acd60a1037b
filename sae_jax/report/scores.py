"""Every score by name: how it is written, in what unit, and what it means to a reader.

`table` shows the few that one looks at first, an SAE a line. `scores_text` shows all, a
score a line, for the audit of a few SAEs. The definitions are those of `evaluation`.

A score that was not measured is shown as `-`, one that has no finite value as `nan` or
`inf`: an SAE that diverged is something else than one that nobody evaluated.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from sae_jax.evaluation.heldout import GAP, WITH_GRADIENTS

Row: TypeAlias = Mapping[str, Any]


class Score(NamedTuple):
    """One score.

    Attributes:
      heading: what stands above or before it.
      unit: "" for a plain number.
      meaning: one line that explains it.
      show: the text of its value for one SAE.
    """

    heading: str
    unit: str
    meaning: str
    show: Callable[[Row], str]


def number(value: Any, form: str) -> str:
    """A number in the given format; `-` where there is none."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else format(value, "f")


def scientific(value: Any) -> str:
    """A small number as `1.2e-5`, without the zero that Python puts before the 5."""
    mantissa, e, exponent = number(value, ".1e").partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _plain(name: str, form: str) -> Callable[[Row], str]:
    return lambda row: number(row.get(name), form)


def _percent(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        share = row.get(name)
        return number(None if share is None else 100 * share, ".1f")

    return show


def _features(name: str) -> Callable[[Row], str]:
    """A count of features, and their share of all."""

    def show(row: Row) -> str:
        count, n_features = row.get(name), row.get("n_features")
        text = number(count, ".0f")
        if count is None or not n_features or not math.isfinite(count):
            return text
        return f"{text} ({count / n_features:.1%})"

    return show


SCORES = {
    "l0": Score(
        "L0",
        "features",
        "Active features per row, mean over rows.",
        _plain("l0", ".1f"),
    ),
    "l1": Score(
        "L1",
        "",
        "Sum of the codes' sizes times the norms of their directions, mean over rows.",
        _plain("l1", ".4g"),
    ),
    "description_length": Score(
        "description length",
        "bits",
        "What a row's code takes to write: L0 (7 + log2 of the dictionary's size).",
        _plain("description_length", ",.0f"),
    ),
    "mse": Score("MSE", "", "Squared error per number of a row.", _plain("mse", ".4g")),
    "nmse": Score(
        "NMSE",
        "",
        "Squared error over the variance of all rows together: 0 is perfect, 1 is no "
        "better than the mean row.",
        _plain("nmse", ".4f"),
    ),
    "explained_variance": Score(
        "EV",
        "",
        "Explained variance of all rows, 1 - NMSE.",
        _plain("explained_variance", ".4f"),
    ),
    "explained_variance_per_row": Score(
        "EV/row",
        "",
        "Explained variance of each row, mean over rows: 1 is perfect. Every row "
        "counts alike, however long it is.",
        _plain("explained_variance_per_row", ".4f"),
    ),
    "cosine": Score(
        "cosine",
        "",
        "Between a row and its reconstruction, mean over rows.",
        _plain("cosine", ".4f"),
    ),
    "relative_reconstruction_bias": Score(
        "reconstruction bias",
        "",
        "Below 1, reconstructions are too short as a whole; above, too long.",
        _plain("relative_reconstruction_bias", ".4f"),
    ),
    "dead": Score(
        "dead",
        "features",
        "Features that were active on no evaluated row, and their share of all.",
        _features("dead"),
    ),
    "dense": Score(
        "dense",
        "features",
        "Features that were active on more than a tenth of the rows.",
        _features("dense"),
    ),
    "epsilon_lbo": Score(
        "eps-LBO",
        "median",
        "The least quasi-orthogonality that allows the norms of a row and of its code "
        "(Lee et al. 2025, arXiv:2503.24277): lower is better.",
        lambda row: scientific(row.get("epsilon_lbo")),
    ),
    "norm_ratio": Score(
        "norm ratio",
        "median",
        "Norm of the code over norm of the row: above 1 activates too much, below 1 "
        "too little.",
        _plain("norm_ratio", ".3f"),
    ),
    "norm_ratio_centred": Score(
        "norm ratio, centred",
        "median",
        "The same without the decoder bias on either side.",
        _plain("norm_ratio_centred", ".3f"),
    ),
    "over_activation": Score(
        "over-activating",
        "% of rows",
        "Rows whose code is longer than the row.",
        _percent("over_activation"),
    ),
    "under_activation": Score(
        "under-activating",
        "% of rows",
        "Rows whose code is shorter than the row.",
        _percent("under_activation"),
    ),
    "afa_error": Score(
        "AFA error",
        "",
        "How far the norm of the code is from that of the row, as a share of it, mean "
        "over rows.",
        _plain("afa_error", ".4f"),
    ),
    "coherence_maximum": Score(
        "coherence, maximum",
        "",
        "The largest |cosine| of two directions of the dictionary.",
        _plain("coherence_maximum", ".4f"),
    ),
    "coherence_mean": Score(
        "coherence, mean",
        "",
        "The mean |cosine| of two directions of the dictionary.",
        _plain("coherence_mean", ".4f"),
    ),
    "coherence_99": Score(
        "coherence, 99 % below",
        "",
        "99 of 100 pairs of directions have a smaller |cosine|.",
        _plain("coherence_99", ".4f"),
    ),
    "loss_clean": Score(
        "loss, clean",
        "nats",
        "The language model's loss per next token.",
        _plain("loss_clean", ".4f"),
    ),
    "loss_spliced": Score(
        "loss, spliced",
        "nats",
        "Its loss with reconstructions in place of the rows.",
        _plain("loss_spliced", ".4f"),
    ),
    "loss_zero": Score(
        "loss, zeros", "nats", "With zeros instead.", _plain("loss_zero", ".4f")
    ),
    "loss_mean": Score(
        "loss, mean row", "nats", "With the mean row.", _plain("loss_mean", ".4f")
    ),
    "loss_recovered": Score(
        "loss recovered",
        "%",
        "Splicing the reconstruction into the language model: 100 leaves its loss as "
        "it was, 0 is as bad as zeros in its place.",
        _percent("loss_recovered"),
    ),
    "loss_recovered_mean": Score(
        "loss recovered, mean",
        "%",
        "The same against the mean row in its place, which asks for more.",
        _percent("loss_recovered_mean"),
    ),
    "kl_spliced": Score(
        "KL",
        "nats",
        "Divergence of the predictions of the next token, from the clean model to the "
        "spliced one.",
        _plain("kl_spliced", ".4f"),
    ),
    "kl_zero": Score(
        "KL, zeros", "nats", "The same with zeros instead.", _plain("kl_zero", ".4f")
    ),
    "kl_mean": Score(
        "KL, mean row", "nats", "And with the mean row.", _plain("kl_mean", ".4f")
    ),
}


def _with_gradients(name: str, score: Score) -> Score:
    """A score once more, for codes that the gradient of the model's loss chose."""
    return score._replace(
        heading=f"{score.heading}, with gradients",
        meaning="The same where the rule sees the model's gradients, as in training.",
        show=lambda row: score.show({**row, name: row.get(name + WITH_GRADIENTS)}),
    )


SCORES |= {name + WITH_GRADIENTS: _with_gradients(name, SCORES[name]) for name in GAP}


def gap_text(rows: Sequence[Row]) -> str:
    """What SAEs that need gradients do with and without; empty if there are none."""
    names = [name for pair in GAP for name in (pair, pair + WITH_GRADIENTS)]
    rows = [row for row in rows if GAP[0] + WITH_GRADIENTS in row]
    return scores_text(rows, {name: SCORES[name] for name in names}) if rows else ""


def scores_text(rows: Sequence[Row], scores: Mapping[str, Score] = SCORES) -> str:
    """All scores as aligned text, a line each, and a column for every SAE."""
    shown = [
        s for n, s in scores.items() if any(row.get(n) is not None for row in rows)
    ]
    heads = [f"{s.heading}, {s.unit}" if s.unit else s.heading for s in shown]
    columns = [[row["name"], *(s.show(row) for s in shown)] for row in rows]
    widths = [max(map(len, column)) for column in columns]
    left = max(map(len, heads), default=0)
    lines = []
    for i, head in enumerate(["", *heads]):
        cells = [c[i].rjust(w) for c, w in zip(columns, widths, strict=True)]
        lines.append("  ".join([head.ljust(left), *cells]).rstrip())
    return "\n".join(lines)
