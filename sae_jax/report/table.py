"""The table of results: one row per trained SAE, its columns and what they mean.

A score that was not measured is shown as `-`, one that has no finite value as `nan` or
`inf`: an SAE that diverged is something else than one that nobody evaluated.
"""

import csv
import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Row: TypeAlias = Mapping[str, Any]

WIDTH = 100  # characters of a terminal
NARROWEST_NAME = 12


class Column(NamedTuple):
    """One column of the table.

    Attributes:
      heading: what stands above it.
      unit: what stands below the heading, "" for a plain number.
      meaning: one line that explains it.
      show: the text of one SAE's cell.
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


def _recovered(row: Row) -> str:
    share = row.get("loss_recovered")
    return number(None if share is None else 100 * share, ".1f")


def _dead(row: Row) -> str:
    dead, n_features = row.get("dead"), row.get("n_features")
    count = number(dead, ".0f")
    if dead is None or not n_features or not math.isfinite(dead):
        return count
    return f"{count} ({dead / n_features:.1%})"


COLUMNS = (
    Column(
        "L0",
        "features",
        "Active features per row, mean over rows.",
        lambda row: number(row.get("l0"), ".1f"),
    ),
    Column(
        "NMSE",
        "",
        "Squared error over the variance of all rows together: 0 is perfect, "
        "1 is no better than the mean row.",
        lambda row: number(row.get("nmse"), ".4f"),
    ),
    Column(
        "EV/row",
        "",
        "Explained variance of each row, mean over rows: 1 is perfect. Every row "
        "counts alike, however long it is.",
        lambda row: number(row.get("explained_variance"), ".4f"),
    ),
    Column(
        "loss recovered",
        "%",
        "Splicing the reconstruction into the language model: 100 leaves its loss as "
        "it was, 0 is as bad as zeros in its place.",
        _recovered,
    ),
    Column(
        "dead",
        "features",
        "Features that were active on no evaluated row, and their share of all.",
        _dead,
    ),
    Column(
        "eps-LBO",
        "median",
        "The least quasi-orthogonality that allows the norms of a row and of its code "
        "(Lee et al. 2025, arXiv:2503.24277): lower is better.",
        lambda row: scientific(row.get("epsilon_lbo")),
    ),
    Column(
        "norm ratio",
        "median",
        "Norm of the code over norm of the row: above 1 activates too much, below 1 "
        "too little.",
        lambda row: number(row.get("norm_ratio"), ".3f"),
    ),
)


def table(rows: Sequence[Row]) -> str:
    """The results as aligned text for a terminal; long names go on in a second line."""
    head = [[column.heading, column.unit] for column in COLUMNS]
    cells = [[column.show(row) for row in rows] for column in COLUMNS]
    widths = [
        max(map(len, [*above, *below]))
        for above, below in zip(head, cells, strict=True)
    ]
    left = WIDTH - sum(width + 2 for width in widths)
    name_width = max([len("name"), *(len(str(row["name"])) for row in rows)])
    name_width = min(name_width, max(left, NARROWEST_NAME))

    def line(name: str, texts: Sequence[str]) -> str:
        right = (t.rjust(w) for t, w in zip(texts, widths, strict=True))
        return "  ".join([name.ljust(name_width), *right]).rstrip()

    lines = [
        line("name", [heading for heading, _ in head]),
        line("", [unit for _, unit in head]),
        "-" * (name_width + sum(width + 2 for width in widths)),
    ]
    for i, row in enumerate(rows):
        first, *more = textwrap.wrap(str(row["name"]), name_width) or [""]
        lines.append(line(first, [column[i] for column in cells]))
        lines += ["  " + part for part in more]
    return "\n".join(lines)


def csv_text(rows: Sequence[Row]) -> str:
    """All fields of all rows as comma-separated values, in full precision.

    A field that a row lacks, or that is None, is empty.
    """
    fields = list(dict.fromkeys(field for row in rows for field in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
