"""Top-AFA beside TopK and BatchTopK, on the embedded language model, in minutes.

Trains three SAEs on the same activations of a small GPT-2 that comes with the package,
over the Python files that come with the interpreter; nothing is downloaded. Then
measures them on files that none of them saw. Top-AFA finds by itself how many features
a row needs, about 200 here; the two others are told that number, so that the three
compare at the same sparsity.

Command:  make demo, or python launch.py --experiment=demo
Hardware: 2 CPU cores, two minutes.
Leaves:   runs/demo/report.html, figures, results.csv, and the SAEs.
Expected: on the files of Python 3.11, NMSE 0.085 with 207 features for Top-AFA, 0.117
          and 0.113 with 200 for TopK and BatchTopK.
"""

from dataclasses import dataclass

from experiments._report import train_and_report
from experiments.frontier import Config as Frontier
from sae_jax.settings import Spec


@dataclass
class Config(Frontier):
    """What can be set from the command line."""

    out: str = "runs/demo"
    rules: tuple[Spec, ...] = (
        Spec("top_afa(coef=0.03125)"),
        Spec("topk(k=200)"),
        Spec("batch_topk(k=200)"),
    )
    factors: tuple[float, ...] = (1.0,)


def run(config: Config) -> None:
    """Trains them, or goes on training."""
    train_and_report(config, title="Demo: three rules on one layer")
