"""Evaluates recorded norms: did the SAE of each layer activate too much or too little?

Reads the authors' files of Lee et al. 2025 (arXiv:2503.24277), or any table with the
columns layer, norm_z, norm_f and l_recon (the squared error): the norm of a row, that
of its code with the decoder's norms and bias, and how well it was reconstructed. Where
there is a column text, the page shows it at the points.

Command:  python launch.py --experiment=zf --csv=FILE --n_features=24576
Leaves:   out/report.html, zf.png, violins.png, layers.csv
Expected: of the paper's recording of GPT-2 small (24,576 features), best layer 1 and
          worst layer 9 by median epsilon-LBO, best 1 and worst 11 by NMSE.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from sae_jax.quasi_orthogonality import epsilon_lbo
from sae_jax.report import drawing, write_page
from sae_jax.report.browser import Points
from sae_jax.report.layers import Layer, layers_zf_figure, violins_figure
from sae_jax.run.folder import environment
from sae_jax.settings import to_dict
from sae_jax.whole_files import write_whole

COLUMNS = ("layer", "norm_z", "norm_f", "l_recon")


@dataclass
class Config:
    """What can be set from the command line."""

    csv: Annotated[str, "table with layer, norm_z, norm_f and l_recon"] = ""
    n_features: Annotated[int, "size of the dictionaries"] = 0
    out: Annotated[str, "folder to write to"] = "runs/zf"

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        if self.n_features < 2:
            yield f"n_features={self.n_features}; give the size of the dictionaries"
        if not Path(self.csv).expanduser().is_file():
            yield f"csv={self.csv!r} is not a file"


def run(config: Config) -> None:
    """Prints the medians of each layer, and draws both figures."""
    path = Path(config.csv).expanduser()
    layers, texts = read(path, config.n_features)
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    drawing.save(layers_zf_figure(layers), out / "zf.png")
    drawing.save(violins_figure(layers, "layer"), out / "violins.png")
    rows = medians(layers)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(out / "layers.csv", text.getvalue())
    found = said(rows)
    print(found)
    write_page(
        out / "report.html",
        title="Recorded norms",
        summary=f"{sum(row['rows'] for row in rows):,} rows of {path.name}, "
        f"dictionaries of {config.n_features:,} features.",
        rows=[],
        notes={"Medians of each layer": found},
        zf={
            f"layer {number}": Points(
                layer.norm_z,
                layer.norm_f,
                np.arange(len(layer.norm_z))[:, None],  # each text one token
                texts[number],
            )
            for number, layer in layers.items()
        },
        figures=[
            (out / "zf.png", "ZF plot of all layers (Lee et al. 2025)."),
            (out / "violins.png", "Distributions of epsilon-LBO and NMSE."),
        ],
        config=to_dict(config),
        about=environment(),
    )
    print(f"Report: {(out / 'report.html').resolve()}")


def said(rows: list[dict[str, float]]) -> str:
    """The medians as a table, and the best and worst layers."""
    lines = ["layer   rows   median eps-LBO   median NMSE   median norm ratio"]
    lines += [
        f"{row['layer']:5}  {row['rows']:5}   {row['epsilon_lbo']:14.3g}   "
        f"{row['nmse']:11.4g}   {row['norm_ratio']:17.3f}"
        for row in rows
    ]
    for score, name in (("epsilon_lbo", "eps-LBO"), ("nmse", "NMSE")):
        ranked = sorted(rows, key=lambda row, score=score: row[score])
        best, worst = ranked[0]["layer"], ranked[-1]["layer"]
        lines.append(f"By median {name}: best layer {best}, worst layer {worst}")
    return "\n".join(lines)


def read(path: Path, n_features: int) -> tuple[dict[int, Layer], dict[int, list[str]]]:
    """The rows of each layer, in the order of the layers, and their texts."""
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        missing = sorted(set(COLUMNS) - set(table.fieldnames or ()))
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}")
        try:
            lines, texts = [], []
            for row in table:
                lines.append([float(row[column]) for column in COLUMNS])
                texts.append(row.get("text") or "")
        except (TypeError, ValueError) as error:
            line = table.line_num
            raise ValueError(f"{path}, line {line}: {error}") from None
    if not lines:
        raise ValueError(f"{path} has no rows")
    number, z, f, error = np.array(lines).T
    norms = (jnp.asarray(norm, jnp.float32) for norm in (z, f))
    epsilon = np.asarray(epsilon_lbo(*norms, n_features))
    nmse = error / np.square(z)
    layers, text_of = {}, {}
    for layer in np.unique(number):
        here = np.flatnonzero(number == layer)
        layers[int(layer)] = Layer(*(column[here] for column in (z, f, epsilon, nmse)))
        text_of[int(layer)] = [texts[row] for row in here]
    return layers, text_of


def medians(layers: dict[int, Layer]) -> list[dict[str, float]]:
    """One row for each layer."""
    return [
        {
            "layer": number,
            "rows": len(layer.norm_z),
            "epsilon_lbo": float(np.median(layer.epsilon_lbo)),
            "nmse": float(np.median(layer.relative_error)),
            "norm_ratio": float(np.median(layer.norm_f / layer.norm_z)),
        }
        for number, layer in layers.items()
    ]
