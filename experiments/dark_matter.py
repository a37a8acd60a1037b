"""The part of an SAE's error that is linear in what it reads, over several widths.

After Engels, Riggs, Tegmark 2024 (arXiv:2410.14670): how much of the error vector and
of its norm a linear map of the row predicts, what the two parts cost the language
model, how both fall with the width of the dictionary, whether a token's error at one
width follows from smaller ones, and whether gradient pursuit, an encoder that searches,
does better with the same dictionary.

Command:  python launch.py --experiment=dark_matter
Example:  python launch.py --experiment=dark_matter --saes=runs/a,runs/b
          --config.evaluation.contexts=2400
Leaves:   out/dark_matter.json, dark_matter.txt, figures/dark_matter.png, report.html;
          of SAEs that it trains all that training leaves
Hardware: 2 CPU cores, 6.5 minutes of processor time for the default's five SAEs, report
          included (on a machine that was busy with other work)
Expected: on the files of Python 3.11, FVU from 0.33 (192 features) to 0.27 (3,072), of
          which the nonlinear part is 0.16 to 0.18: it does not fall with the width.
Note:     the law of widths is meant at one sparsity: train with a rule whose L0 is set,
          or give SAEs of one L0. The paper's size is 150,000 tokens to fit and as many
          to score: 2,400 contexts of 128.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from experiments import audit
from experiments._dark_matter import errors_of
from experiments._finished import Finished, opened
from experiments._left import leave_found, leave_page
from experiments._report import Figure, report_on, rows_of
from experiments._training import Config as Training
from experiments._training import Result, Wanted, run_training
from experiments._widths import laws_of, predictions, said_of_widths
from sae_jax.analysis.least_squares import LEAST
from sae_jax.config import Data, Dictionary, Evaluating, ModelConfig, TextConfig
from sae_jax.losses import AuxK
from sae_jax.report import drawing
from sae_jax.report.dark_matter import parts_figure
from sae_jax.run.loop import Every
from sae_jax.run.stop import Stop
from sae_jax.settings import Spec
from sae_jax.training.recipe import Recipe

SITE = "resid_post.2"
TITLE = "Linear and nonlinear error"
CAPTION = (
    "Left: the fraction of variance that SAEs leave unexplained, and the parts of it "
    "that are linear in the row and are not, over the number of features; dashed: the "
    "law that fits. Right: the squared error of held-out rows against what a linear "
    "map of the row predicts for it, narrowest and widest SAE."
)


@dataclass
class Config(Training):
    """What can be set from the command line."""

    beside = (*Training.beside, "saes", "pursuit", "intercept")

    out: str = "runs/dark_matter"
    saes: Annotated[
        tuple[str, ...],
        "folders of finished SAEs of one site and several widths, by commas; none: "
        "such are trained",
    ] = ()
    site: Annotated[
        str,
        f"what they read; empty: finished ones what they were trained on, new ones "
        f"{SITE}",
    ] = ""
    rule: Annotated[Spec, "the rule of new ones"] = Spec("topk(k=32)")
    widths: Annotated[tuple[int, ...], "numbers of features of new ones, by commas"] = (
        192,
        384,
        768,
        1536,
        3072,
    )
    pursuit: Annotated[bool, "gradient pursuit as well"] = True
    intercept: Annotated[
        bool, "whether means are taken away first; the paper does not"
    ] = False
    sae: Dictionary = Dictionary(treatment="scale")
    data: Data = Data(batch=512, buffer=16_384)
    train: Recipe = Recipe(
        steps=600, lr=1e-3, warmup=50, decay="linear", aux=AuxK(dead_after=100)
    )
    every: Every = Every(log=20, save=300)
    evaluation: Evaluating = Evaluating(contexts=192)

    def wanted(self) -> list[Wanted]:
        """One SAE of each width."""
        site = self.site or SITE
        return [Wanted(self.rule, site, n_features=width) for width in self.widths]

    def finished(self) -> Finished:
        """The settings of finished ones."""
        shared = [f.name for part in (ModelConfig, TextConfig) for f in fields(part)]
        finished = Finished(**{name: getattr(self, name) for name in shared})
        return replace(
            finished,
            sae=self.saes,
            rule_files=self.rule_files,
            site=self.site,
            out=self.out,
            dataset=self.evaluation.dataset or self.dataset,
            part=self.evaluation.part,
            contexts=self.evaluation.contexts,
            contexts_per_pass=self.data.contexts_per_pass,
        )

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        if not self.saes:
            yield from super().faults()
            yield from self.too_few()
            return
        finished = self.finished()
        faults = list(finished.faults())
        yield from faults
        if not faults:
            found = opened(self.saes)
            sites = {str(finished.sites(one)[0]) for one in found.values()}
            if len(sites) > 1:
                yield f"saes read {', '.join(sorted(sites))}; give those of one site"

    def too_few(self) -> Iterator[str]:
        """Whether the tokens are too few to fit anything on."""
        try:
            lm = self.outline()
            width = lm.width(self.site or SITE) if lm else 0
        except (ValueError, OSError):
            return  # said elsewhere
        n = self.evaluation.contexts // 2 * self.context
        if n < LEAST * width:
            yield (
                f"evaluation.contexts={self.evaluation.contexts} are {n:,} tokens to "
                f"fit a map of {width} numbers on; {LEAST * width:,} are needed"
            )

    def conflicts(self) -> list[str]:
        """What is asked for once nothing else is wrong."""
        return [] if self.saes else super().conflicts()

    def estimates(self) -> dict[str, str]:
        """What a dry run says of size."""
        return {} if self.saes else super().estimates()


def run(config: Config) -> None:
    """Trains what is to be trained, splits the errors, and reports."""
    if config.saes:
        analyse(config, audit.measure(config.finished()))
        return
    with Stop() as stop:
        analyse(config, run_training(config, stop))


def analyse(config: Config, result: Result) -> None:
    """Splits the errors of measured SAEs, and writes what was found."""
    out = Path(config.out).expanduser()
    (out / "figures").mkdir(parents=True, exist_ok=True)
    rows = rows_of(result.trained, result.evaluations)
    whole = [row["name"] for row in rows if np.isfinite(row["nmse"])]
    print(f"Splitting the errors of {', '.join(whole) or 'none'} ...", flush=True)
    errors = errors_of(
        {name: result.trained[name] for name in whole},
        result.evaluator,
        pursuit=config.pursuit,
        intercept=config.intercept,
    )
    of = {row["name"]: row for row in rows}
    points = sorted(
        (
            {"n_features": of[row["name"]]["n_features"], "l0": of[row["name"]]["l0"]}
            | row
            for row in errors.rows
        ),
        key=lambda row: row["n_features"],
    )
    laws, no_law = laws_of(points)
    tokens = predictions(points, errors)
    widths = said_of_widths(points, laws, no_law, tokens)
    text = f"{errors.text()}\n\n{widths}"
    record = {
        "saes": points,
        "laws": {name: law._asdict() for name, law in laws.items()},
        "no_law": no_law,
        "tokens": {name: one._asdict() for name, one in tokens.items()},
    }
    leave_found("dark_matter", config, text, record)
    picture = out / "figures" / "dark_matter.png"
    ends = dict.fromkeys(row["name"] for row in points[:1] + points[-1:])
    shown = {name: errors.found[name] for name in ends}
    drawing.save(parts_figure(points, laws, shown), picture)
    figures = [Figure(picture, CAPTION)]
    notes = {TITLE: errors.text(), "Over widths": widths}
    if not config.saes:
        report_on(config, result, title=TITLE, figures=figures, notes=notes)
        return
    title = f"{TITLE} of {', '.join(result.trained)}"
    leave_page(config, title=title, rows=rows, figures=figures, notes=notes)
