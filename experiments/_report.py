"""What an experiment leaves for its reader: a table, figures, and one page."""

from pathlib import Path

from experiments._training import Config, Result, run_training
from sae_jax import report
from sae_jax.run.folder import ENVIRONMENT
from sae_jax.run.log import read_lines
from sae_jax.run.stop import Stop
from sae_jax.settings import to_dict
from sae_jax.whole_files import write_whole

CAPTIONS = {
    "curves": "Training: normalised error of the batches, and active features per row.",
    "frontier": "Sparsity against reconstruction on held-out text: further left is "
    "sparser; lower error and more recovered loss are better.",
    "zf": "ZF plot (Lee et al. 2025): the norm of each held-out row against that of "
    "its code. If the dictionary's directions were orthogonal, points would lie on the "
    "diagonal; the bands are what quasi-orthogonality of eps allows. Below: too few or "
    "too weak features. Above: too many or too strong.",
    "density": "How often features fire on held-out text.",
}


def train_and_report(config: Config, *, title: str) -> None:
    """Trains, or goes on training; then `report_on`."""
    with Stop() as stop:
        report_on(config, run_training(config, stop), title=title)


def report_on(config: Config, result: Result, *, title: str) -> None:
    """Prints the table; writes figures and the page, and says where."""
    out, rows = Path(config.out).expanduser(), result.rows()
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    history = {
        name: [line for line in one.history if line["kind"] == "train"]
        for name, one in result.trained.items()
    }
    sizes = {row["name"]: row["n_features"] for row in rows}
    report.curves(history, figures / "curves.png")
    report.frontier(rows, figures / "frontier.png")
    report.zf(result.evaluations, sizes, figures / "zf.png")
    report.density(result.evaluations, figures / "density.png")
    write_whole(out / "results.csv", report.csv_text(rows))
    tokens = config.train.steps * config.data.batch
    held_out = len(next(iter(result.evaluations.values())).norm_z)
    report.write_page(
        out / "report.html",
        title=title,
        summary=(
            f"{len(rows)} SAEs, trained on the same {tokens:,} tokens and evaluated on "
            f"{held_out:,} held-out ones. Language model: {config.lm}. Text: "
            f"{config.dataset}."
        ),
        rows=rows,
        figures=[(figures / f"{name}.png", text) for name, text in CAPTIONS.items()],
        config=to_dict(config),
        about=read_lines(out / ENVIRONMENT)[-1],
    )
    print(f"\n{report.table(rows)}\n\nReport: {(out / 'report.html').resolve()}")
