"""What a comparison with Top-AFA leaves: tables, tests, claims, and two figures.

In the run's folder: comparison.txt, comparison.csv, figures/comparison.png, and
figures/paper.png where the files of Lee et al. 2025 (arXiv:2503.24277) are given.
"""

import csv
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _claims as claims
from experiments._claims import OTHERS, TOP_AFA
from sae_jax.evaluation import comparison
from sae_jax.report import comparison as report
from sae_jax.report import csv_text, drawing
from sae_jax.report.comparison import label
from sae_jax.report.table import WIDTH
from sae_jax.whole_files import write_whole

NAME = re.compile(
    r"blocks\.(\d+)\.hook_resid_pre_(\d+)_(topk|batchtopk|topafa)_(\d+)_[\d.]+"
)
RULES = {"topk": "topk", "batchtopk": "batch_topk", "topafa": TOP_AFA}

ON_STEPS = """
The paper's test. Each side is one run, the best by its last value; its sample are its
last logged values, each a mean over the steps since the line before. Values of one run
are autocorrelated and no independent samples: p says whether two curves lie apart where
they end, and nothing of another start. The best are chosen among many runs, by a value
that is part of what is tested.
"""
ON_SEEDS = """
A sample is the held-out NMSE of the seeds of one setting. All seeds share the same
batches in the same order; a seed decides the SAE's start only, so the spread is smaller
than that of repetitions with other data. The settings are the best of many by training
error, not by the error that is tested; but the seeds that choose are those that are
tested, and p takes the settings as fixed beforehand. Not paired: pairs would share the
start alone, and cost half the degrees of freedom.
"""
ON_BOTH = """
Welch's t-test, two-sided. effect: difference of the means over the root of the mean
variance. p Holm: corrected for the number of sites, not for that of the settings. No p:
fewer than two values on a side, none of them varies, or one is not finite.
"""


def compare(
    rows: Sequence[Mapping[str, Any]],
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    out: Path,
    *,
    n_lines: int,
    paper: Path | None = None,
) -> str:
    """Writes tables, tests, claims and figures of a run; gives the text.

    Args:
      rows: one for each SAE, with its held-out scores.
      history: the lines logged in training, by the name of the SAE.
      out: the run's folder.
      n_lines: how many of the last lines the paper's test takes.
      paper: folder with the authors' `frontier_gpt2_layer*.csv`.
    """
    points = read_paper(paper) if paper else []
    finals = last_values(rows, history, n_lines)
    settings = comparison.settings(rows)
    by_steps = claims.between_runs(rows, finals)
    by_seeds = claims.between_seeds(settings, finals)
    diverged = [
        f"{label(one)} at {one.site}"
        for one in settings
        if not np.isfinite([*one.l0, *one.nmse]).all()
    ]
    taken = max(map(len, finals.values()))
    parts = [
        "Held-out NMSE, mean ± standard deviation over seeds; *: the best of its rule",
        report.tables(settings, fixed=OTHERS, adaptive=TOP_AFA),
        f"Training error of one run each: last logged values ({taken})",
        report.contests_table(by_steps),
        _filled(ON_STEPS),
        "Held-out NMSE, over seeds",
        report.contests_table(by_seeds),
        _filled(ON_SEEDS),
        _filled(ON_BOTH),
        "What the paper says, and what is seen here",
        _filled(
            "Left out, since an SAE of theirs has no finite score: "
            f"{', '.join(diverged) or 'none'}."
        ),
        *map(_sentences, claims.claims(settings, by_steps, by_seeds, finals)),
    ]
    text = "\n\n".join(parts)
    write_whole(out / "comparison.txt", f"{text}\n")
    write_whole(out / "comparison.csv", csv_text(report.settings_rows(settings)))
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    drawing.save(report.frontiers_figure(rows), figures / "comparison.png")
    if points:
        names = "this run", "Lee et al. 2025: GPT-2 small"
        figure = report.beside_figure(at_the_end(rows, history), points, names=names)
        drawing.save(figure, figures / "paper.png")
    return text


def last_values(
    rows: Sequence[Mapping[str, Any]],
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    n_lines: int,
) -> dict[str, np.ndarray]:
    """The training error of each SAE's last logged lines; fewer if there are fewer."""
    if n_lines < 1:
        raise ValueError(f"n_lines={n_lines}; a comparison needs 1 line, its test 2.")
    return {
        row["name"]: np.array(
            [line["loss_mse"] for line in history[row["name"]][-n_lines:]], float
        )
        for row in rows
    }


def at_the_end(
    rows: Sequence[Mapping[str, Any]],
    history: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """The rows with L0 and training error of the last line, as the paper has them."""
    last = {name: lines[-1] for name, lines in history.items()}
    return [
        {**row, "l0": last[row["name"]]["l0"], "mse": last[row["name"]]["loss_mse"]}
        for row in rows
    ]


def read_paper(folder: Path) -> list[dict[str, Any]]:
    """The authors' points: rule, knob, layer; L0 and error of the last step."""
    rows = []
    for path in sorted(folder.expanduser().glob("frontier_gpt2_layer*.csv")):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                found = NAME.fullmatch(line["Name"])
                if found is None:
                    raise ValueError(
                        f"{path}: {line['Name']!r} is no name of a run; needed are "
                        f"those of the authors, blocks.6.hook_resid_pre_..."
                    )
                layer, n_features, rule, k = found.groups()
                rows.append(
                    {
                        "name": line["Name"],
                        "rule": RULES[rule],
                        "knob": float(k) or float(line["afa_coeff"]),
                        "site": f"layer {layer}",
                        "seed": 49,
                        "n_features": int(n_features),
                        "l0": float(line["l0_norm"]),
                        "mse": float(line["l2_loss"]),
                    }
                )
    if not rows:
        raise ValueError(f"{folder} has no frontier_gpt2_layer*.csv with runs in it.")
    return rows


def _filled(prose: str) -> str:
    return textwrap.fill(prose.strip(), WIDTH)


def _sentences(claim: claims.Claim) -> str:
    lines = textwrap.wrap(f"{claim.verdict.upper()}: {claim.says}", WIDTH)
    for sentence in claim.seen:
        lines += textwrap.wrap(
            sentence, WIDTH, initial_indent="  ", subsequent_indent="    "
        )
    return "\n".join(lines)
