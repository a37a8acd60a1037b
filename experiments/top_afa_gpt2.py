"""The paper's experiment: Top-AFA against TopK and BatchTopK on GPT-2 small.

Lee et al. 2025 (arXiv:2503.24277): the residual stream before layers 6, 7 and 8,
OpenWebText, dictionaries of 16 features per dimension, 20,001 steps of 4,096 rows that
are standardised one by one; TopK and BatchTopK with k from 32 to 8192, Top-AFA with
coefficients from 1/128 to 1/16. Settings follow the authors' code, its order of
normalisation and its auxiliary loss included. All SAEs are trained on one pass.

On a smaller dictionary of F features k is multiplied by F / 12288, so that the share of
active features stays. The coefficient is multiplied by 768 / D: it stands before a
squared norm, which grows with the width D, beside an error averaged over D.

Differs from the paper: a tenth of the documents is held out for evaluation, the encoder
starts as the transpose of a decoder with rows of norm 1 instead of Kaiming-uniform.

Command:  python launch.py --experiment=top_afa_gpt2 --out=/data/top_afa
          (needs the Hugging Face hub, or --lm=DIR --dataset=DIR)
Offline:  python launch.py --experiment=top_afa_gpt2 --lm=embedded --dataset=embedded
          --sites=resid_pre.2 --config.train.steps=1000 --config.data.batch=512
          --config.data.buffer=16384 --ks=128,512 --coefs=1/64,1/32
          (six SAEs, under four minutes on 2 CPU cores)
Leaves:   out/report.html, comparison.txt (tables, tests, what holds of the paper's
          claims), comparison.csv, results.csv, figures, and the SAEs.
Hardware: not run at full size yet. By --dry_run its 69 SAEs take 16 GB with their
          optimisers, and activations 14 GB; on less, take one site at a time.
Expected: L0 of Top-AFA rises with the coefficient, and its best run is near the best of
          all k (the paper's tables). Offline: NMSE 0.34 and 0.28 for TopK with 32 and
          128 features, 0.20 and 0.19 for Top-AFA, which takes 188 and 206.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from experiments._comparison import compare
from experiments._report import Figure, report_on, rows_of, training_lines
from experiments._training import Config as Training
from experiments._training import Wanted, run_training
from sae_jax.config import Data, Dictionary
from sae_jax.losses import AuxK
from sae_jax.run.loop import Every
from sae_jax.run.stop import Stop
from sae_jax.training.recipe import Recipe

WIDTH, FEATURES = 768, 12_288  # of the paper's runs
FILES = "frontier_gpt2_layer*.csv"
COMPARISON = "One site each; means over seeds, bars from the least to the largest."
PAPER = "This run beside the points that the paper's authors recorded."


@dataclass
class Config(Training):
    """What can be set from the command line."""

    out: str = "runs/top_afa_gpt2"
    lm: str = "gpt2"
    dataset: str = "Skylion007/openwebtext"
    use_bos: bool = True
    sites: Annotated[tuple[str, ...], "what the SAEs read, by commas"] = (
        "resid_pre.6",
        "resid_pre.7",
        "resid_pre.8",
    )
    ks: Annotated[tuple[int, ...], "the paper's k, at 12,288 features"] = (
        *(32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    )
    coefs: Annotated[tuple[float, ...], "the paper's coefficients, at width 768"] = (
        *(1 / 128, 1 / 64, 1 / 32, 1 / 24, 1 / 16),
    )
    seeds: Annotated[tuple[int, ...], "each decides a start"] = (49,)
    sae: Dictionary = Dictionary(treatment="standardise")
    data: Data = Data(batch=4096, buffer=524_288, contexts_per_pass=64)
    train: Recipe = Recipe(
        steps=20_001,
        b2=0.99,
        clip=None,
        decoder_norm="before",
        aux=AuxK(dead_after=5, detach=False),
    )
    every: Every = Every(log=100, evaluate=5000)
    paper: Annotated[
        str, "folder of the authors' frontier_gpt2_layer*.csv, to draw beside"
    ] = ""
    last: Annotated[int, "logged lines at the end that the paper's test takes"] = 100
    beside: ClassVar[tuple[str, ...]] = (*Training.beside, "paper", "last")

    def wanted(self) -> list[Wanted]:
        """Both budgets with every k, Top-AFA with every coefficient, per site, seed."""
        found = []
        for site in self.sites:
            width = (self.outline() or self.open_lm()).width(site)
            n_features = self.sae.n_features or self.sae.expansion * width
            share, wide = min(1, n_features / FEATURES), WIDTH / width
            ks = dict.fromkeys(max(1, round(k * share)) for k in self.ks)
            specs = [f"{rule}(k={k})" for k in ks for rule in ("topk", "batch_topk")]
            specs += [f"top_afa(coef={coef * wide})" for coef in self.coefs]
            found += [
                Wanted(spec, site, None, seed) for spec in specs for seed in self.seeds
            ]
        return found

    def read_sites(self) -> tuple[str, ...]:
        """All sites that are read."""
        return self.sites

    def conflicts(self) -> list[str]:
        """What is asked for once nothing else is wrong."""
        missing = self.paper and not list(Path(self.paper).expanduser().glob(FILES))
        fault = [f"paper={self.paper!r} holds no {FILES}"] if missing else []
        return fault + super().conflicts()


def run(config: Config) -> None:
    """Trains them all, or goes on training; compares, and reports."""
    out = Path(config.out).expanduser()
    paper = Path(config.paper).expanduser() if config.paper else None
    with Stop() as stop:
        result = run_training(config, stop)
        text = compare(
            rows_of(result.trained, result.evaluations),
            training_lines(result),
            out,
            n_lines=config.last,
            paper=paper,
        )
        print(f"\n{text}\n", flush=True)
        figures = [Figure(out / "figures" / "comparison.png", COMPARISON)]
        if paper:
            figures.append(Figure(out / "figures" / "paper.png", PAPER))
        report_on(
            config,
            result,
            title="Top-AFA, TopK and BatchTopK",
            figures=figures,
            notes={"The comparison": text},
        )
