"""The table of results: one row per trained SAE, its columns and what they mean.

The scores that one looks at first; `scores` has all.
"""

import csv
import io
import textwrap
from collections.abc import Sequence

from sae_jax.report.scores import SCORES, Row

WIDTH = 100  # characters of a terminal
NARROWEST_NAME = 12
FIRST = "l0 nmse kl_spliced loss_recovered dead epsilon_lbo norm_ratio".split()
COLUMNS = [SCORES[name] for name in FIRST]


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
