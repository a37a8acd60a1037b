"""Sparsity against reconstruction: several rules, each over a range of its knob.

All SAEs see the same batches of activations. Every rule is trained with its knob (k, or
the coefficient of its penalty) times each of the factors, with every seed and learning
rate. Those that differ in nothing else are trained side by side, in one program.

Command:  python launch.py --experiment=frontier
Example:  python launch.py --experiment=frontier --rule_files=my_rule.py
          --rules="my_rule(a=3),topk(k=32)" --factors=0.5,1,2 --seeds=0,1
Leaves:   out/figures/frontier.png, results.csv, report.html, and the SAEs.
Hardware: 2 CPU cores, seven minutes for the default's twelve SAEs.
Expected: on the files of Python 3.11, NMSE from 0.39 (TopK, k = 8) to 0.10 (k = 256),
          and for Top-AFA from 0.11 to 0.07 with 172 to 257 features.
"""

from dataclasses import dataclass
from typing import Annotated

from experiments._report import train_and_report
from experiments._training import Config as Training
from experiments._training import Wanted
from sae_jax import registry, rules
from sae_jax.config import Data, Dictionary
from sae_jax.losses import AuxK
from sae_jax.run.loop import Every
from sae_jax.settings import Spec
from sae_jax.training.recipe import Recipe


@dataclass
class Config(Training):
    """What can be set from the command line."""

    out: str = "runs/frontier"
    rules: Annotated[
        tuple[Spec, ...], "the rules, each with the middle of its range"
    ] = (Spec("top_afa(coef=0.03125)"), Spec("topk(k=32)"), Spec("batch_topk(k=32)"))
    factors: Annotated[
        tuple[float, ...], "what the knob of each rule is multiplied with"
    ] = (0.25, 1.0, 4.0, 8.0)
    seeds: Annotated[tuple[int, ...], "seeds, by commas"] = (0,)
    lrs: Annotated[
        tuple[float, ...], "learning rates, each for all; none: that of the recipe"
    ] = ()
    site: Annotated[str, "what the SAEs read: place.layer"] = "resid_post.2"
    sae: Dictionary = Dictionary(expansion=8, treatment="scale")
    data: Data = Data(batch=512, buffer=16_384)
    train: Recipe = Recipe(
        steps=600, lr=1e-3, warmup=50, decay="linear", aux=AuxK(dead_after=100)
    )
    every: Every = Every(log=20, save=300)

    def wanted(self) -> list[Wanted]:
        """Every rule, times every factor, with every seed and learning rate."""
        return [
            Wanted(scaled(spec, factor), self.site, None, seed, lr)
            for spec in self.rules
            for factor in self.factors
            for seed in self.seeds
            for lr in self.lrs or (None,)
        ]


def scaled(spec: str, factor: float) -> str:
    """The same rule with its knob multiplied; whole numbers stay whole."""
    bound = rules.parse(spec)
    knob = bound.rule.knob
    value = bound.hp[knob] * factor
    if isinstance(bound.hp[knob], int):
        value = max(1, round(value))
    return registry.format_spec(bound.rule.name, {**bound.hp, knob: value})


def run(config: Config) -> None:
    """Trains them all, or goes on training."""
    train_and_report(config, title=f"Frontier on {config.site}")
