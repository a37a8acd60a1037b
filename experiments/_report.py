"""What an experiment leaves for its reader: a table, figures, and one page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments._features import features
from experiments._training import Config, Result, run_training
from sae_jax import report
from sae_jax.evaluation import Evaluation, Evaluator
from sae_jax.run.folder import ENVIRONMENT
from sae_jax.run.log import read_lines
from sae_jax.run.stop import Stop
from sae_jax.settings import to_dict
from sae_jax.trained import TrainedSAE
from sae_jax.whole_files import write_whole

CURVES = "Training: normalised error of the batches, and active features per row."
FRONTIER = (
    "Sparsity against reconstruction on held-out text: further left is sparser; lower "
    "error and more recovered loss are better."
)
ZF = (
    "ZF plot (Lee et al. 2025): the norm of each held-out row against that of its "
    "code. If the dictionary's directions were orthogonal, points would lie on the "
    "diagonal; the bands are what quasi-orthogonality of eps allows. Below: too few or "
    "too weak features. Above: too many or too strong."
)
VIOLINS = (
    "How far the norms of held-out rows and of their codes are apart (epsilon-LBO), "
    "and the squared error of the rows over their squared norms."
)
LABELS = "Labels of features, held against text that they were not made from"
DENSITY = "How often features fire on held-out text."
GAP = "With and without gradients of the model"

MOST_DRAWN = 16  # SAEs with a ZF plot and a violin; of more, one of each rule
NO_NOTES: Mapping[str, str] = {}


class Figure(NamedTuple):
    """A picture and what it shows."""

    file: Path
    caption: str


def train_and_report(config: Config, *, title: str) -> None:
    """Trains, or goes on training; then `report_on`."""
    with Stop() as stop:
        report_on(config, run_training(config, stop), title=title)


def report_on(
    config: Config,
    result: Result,
    *,
    title: str,
    figures: Sequence[Figure] = (),
    notes: Mapping[str, str] = NO_NOTES,
) -> None:
    """Reports on the SAEs of a training run; `figures` and `notes` are shown first."""
    out = Path(config.out).expanduser()
    rows = rows_of(result.trained, result.evaluations)
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    report.curves(training_lines(result), folder / "curves.png")
    report.frontier(rows, folder / "frontier.png")
    print(f"\n{report.table(rows)}\n", flush=True)
    tokens = config.train.steps * config.data.batch
    held_out = int(result.evaluator.heldout.use.sum())
    diverged = [
        f"{row['name']} in step {row['diverged_in_step']}"
        for row in rows
        if row["diverged_in_step"] is not None
    ]
    diverged = [f"Diverged: {', '.join(diverged)}."] if diverged else []
    print(*(f"{said}\n" for said in diverged), end="", flush=True)
    if gap := report.gap_text(rows):
        print(f"{gap}\n", flush=True)
        notes = {**notes, GAP: gap}
    write_report(
        out,
        rows,
        result.trained,
        result.evaluations,
        result.evaluator,
        result.tokenizer,
        browse=one_of_each_rule(rows)[: config.report.browse],
        n_steered=config.report.steer,
        title=title,
        summary=(
            f"{len(rows)} SAEs, trained on the same {tokens:,} tokens and evaluated on "
            f"{held_out:,} held-out ones. Language model: {config.lm}. Text: "
            f"{config.dataset}. {' '.join(diverged)}"
        ),
        figures=[
            *figures,
            Figure(folder / "curves.png", CURVES),
            Figure(folder / "frontier.png", FRONTIER),
        ],
        notes=notes,
        settings=to_dict(config),
        environment=read_lines(out / ENVIRONMENT)[-1],
    )


def write_report(
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    saes: Mapping[str, TrainedSAE],
    evaluations: Mapping[str, Evaluation],
    evaluator: Evaluator,
    tokenizer: Any,
    *,
    browse: Sequence[str],
    n_steered: int,
    title: str,
    summary: str,
    figures: Sequence[Figure],
    notes: Mapping[str, str],
    settings: dict[str, Any],
    environment: dict[str, Any],
) -> None:
    """Writes results, figures and the page, in which some can be browsed."""
    folder = out / "figures"
    folder.mkdir(exist_ok=True, parents=True)
    drawn = list(saes) if len(saes) <= MOST_DRAWN else one_of_each_rule(rows)
    pictured = {name: evaluations[name] for name in drawn}
    sizes = {name: saes[name].sae.n_features for name in drawn}
    report.zf(pictured, sizes, folder / "zf.png")
    report.violins(pictured, "SAE", folder / "violins.png")
    report.density(evaluations, folder / "density.png")
    write_whole(out / "results.csv", report.csv_text(rows))
    print(f"Looking into the features of {', '.join(browse) or 'none'} ...", flush=True)
    shown = features(
        {name: saes[name] for name in browse},
        evaluator,
        tokenizer,
        n_steered=n_steered,
    )
    report.write_page(
        out / "report.html",
        title=title,
        summary=summary,
        rows=rows,
        figures=[
            *figures,
            Figure(folder / "zf.png", ZF),
            Figure(folder / "violins.png", VIOLINS),
            Figure(folder / "density.png", DENSITY),
        ],
        notes={**notes, LABELS: labels} if (labels := shown.labelled()) else notes,
        config=settings,
        about=environment,
        **shown._asdict(),
    )
    print(f"Report: {(out / 'report.html').resolve()}")


def training_lines(result: Result) -> dict[str, list[dict[str, Any]]]:
    """What was logged in training, by SAE; that of one that diverged ends with NaN."""
    none = dict.fromkeys(("l0", "nmse", "loss_mse"), math.nan)
    return {
        name: [
            {**line, **none} if line["kind"] == "diverged" else line
            for line in one.history
            if line["kind"] in ("train", "diverged")
        ]
        for name, one in result.trained.items()
    }


def rows_of(
    saes: Mapping[str, TrainedSAE], evaluations: Mapping[str, Evaluation]
) -> list[dict[str, Any]]:
    """One row for each SAE."""
    return [row(name, one, evaluations[name].scores) for name, one in saes.items()]


def row(name: str, one: TrainedSAE, scores: Mapping[str, float]) -> dict[str, Any]:
    """What tables and figures take of one SAE; one that diverged has no scores."""
    bound, diverged = one.sae.bound, one.about.get("diverged_in_step")
    if diverged is not None:
        scores = dict.fromkeys(scores, math.nan)
    return {
        "name": name,
        "rule": bound.rule.name,
        "spec": bound.spec,
        "knob": bound.hp[bound.rule.knob],
        "site": one.about["site"],
        "seed": one.about.get("seed"),
        "n_features": one.sae.n_features,
        "lr": one.about.get("lr"),
        "diverged_in_step": diverged,
        **scores,
    }


def one_of_each_rule(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The SAE of every rule that activates most nearly as it should.

    By epsilon-LBO. By error it would mostly be the one of the most active features.
    """
    whole = [one for one in rows if math.isfinite(one["nmse"])]
    rules = dict.fromkeys(one["rule"] for one in whole)
    groups = ([one for one in whole if one["rule"] == rule] for rule in rules)
    return [min(group, key=lambda one: one["epsilon_lbo"])["name"] for group in groups]
