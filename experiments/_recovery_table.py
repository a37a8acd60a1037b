"""The tables of `synthetic`: means over seeds ± standard deviations."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sae_jax import rules
from sae_jax.report.drawing import grouped

Rows = Sequence[Mapping[str, Any]]

OFF = "*"
NOTE = f"{OFF} of a seed or more, L0 is not that of the truth: compare with care."


class Column(NamedTuple):
    """One score: its heading in two lines, and how a value is written."""

    score: str
    heading: tuple[str, str]
    show: Callable[[float], str]


def share(value: float) -> str:
    """.97 for 0.97."""
    return f"{value:.2f}".replace("0.", ".", 1)


def number(value: float) -> str:
    """Two decimals below 10, one above."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def percent(value: float) -> str:
    """4.7 for 0.047."""
    return f"{100 * value:.1f}"


COLUMNS = (
    Column("l0", ("L0", "features"), number),
    Column("matched_cosine", ("matched", "cosine"), share),
    Column("mmcs", ("best", "cosine"), share),
    Column("frr80", ("found", "> .8"), share),
    Column("frr90", ("found", "> .9"), share),
    Column("precision", ("preci-", "sion"), share),
    Column("recall", ("recall", ""), share),
    Column("f1", ("F1", ""), share),
    Column("l0_correlation", ("L0", "corr."), share),
    Column("nmse", ("NMSE", ""), share),
    Column("dead", ("dead", "%"), percent),
)


def table(rows: Rows) -> str:
    """A part for each world, a line for each rule."""
    names = labels(rows)
    n_seeds = len({row["seed"] for row in rows})
    width = max(len("rule"), *(len(name) + len(OFF) for name in names.values()))
    parts = []
    for (world,), of_world in grouped(rows, "world").items():
        true = mean(of_world, "true_l0")
        heads = [["rule", ""], *(list(column.heading) for column in COLUMNS)]
        lines = [
            [names[given] + (OFF if off(own) else ""), *cells(own)]
            for (given,), own in grouped(of_world, "given").items()
        ]
        columns = [*zip(*(list(zip(*heads, strict=True)) + lines), strict=True)]
        widths = [max(map(len, column)) for column in columns]
        widths[0] = width
        parts += [f"World {world}, true L0 {number(true)}, seeds: {n_seeds}", ""]
        for line in zip(*columns, strict=True):
            texts = [
                text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True)
            ]
            parts.append(" ".join([line[0].ljust(width), *texts]).rstrip())
        parts.append("")
    return "\n".join([*parts, NOTE])


def markdown(rows: Rows) -> str:
    """Rules by worlds, each cell `matched cosine / F1 / L0`."""
    names, worlds = labels(rows), list(grouped(rows, "world"))
    heads = [
        f"{world} ({number(mean(own, 'true_l0'))})"
        for (world,), own in grouped(rows, "world").items()
    ]
    lines = [
        f"| rule | {' | '.join(heads)} |",
        f"|---|{'---|' * len(worlds)}",
    ]
    for (given,), of_rule in grouped(rows, "given").items():
        by_world = grouped(of_rule, "world")
        texts = [brief(by_world.get(world, ())) for world in worlds]
        lines.append(f"| `{names[given]}` | {' | '.join(texts)} |")
    return "\n".join(lines)


def brief(rows: Rows) -> str:
    """One cell of the Markdown table; the star as HTML takes it."""
    if not rows:
        return ""
    star = "\\" + OFF if off(rows) else ""
    cosine, f1 = share(mean(rows, "matched_cosine")), share(mean(rows, "f1"))
    return f"{cosine} / {f1} / {number(mean(rows, 'l0'))}{star}"


def cells(rows: Rows) -> list[str]:
    """The scores of the seeds of one rule in one world."""
    texts = []
    for score, _, show in COLUMNS:
        found = values(rows, score)
        if not found:
            texts.append("-")
            continue
        text = show(statistics.fmean(found))
        if len(found) > 1:
            text += f"±{show(statistics.stdev(found))}"
        texts.append(text)
    return texts


def values(rows: Rows, score: str) -> list[float]:
    """A score of each row, where it has one."""
    return [row[score] for row in rows if row[score] is not None]


def mean(rows: Rows, score: str) -> float:
    """The mean over rows."""
    return statistics.fmean(values(rows, score))


def off(rows: Rows) -> bool:
    """Whether the L0 of a seed is not that of the truth."""
    return not all(row["matched"] for row in rows)


def labels(rows: Rows) -> dict[str, str]:
    """What a rule is called: its name alone where that tells it from the others."""
    given = list(dict.fromkeys(row["given"] for row in rows))
    names = [rules.parse(spec).rule.name for spec in given]
    return {
        spec: name if names.count(name) == 1 else spec
        for spec, name in zip(given, names, strict=True)
    }
