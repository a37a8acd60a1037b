"""How an SAE is trained: all choices that are not the SAE itself."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import optax
from jaxtyping import Array

from sae_jax import checks
from sae_jax.losses import AuxK
from sae_jax.model import SAE
from sae_jax.training import pieces
from sae_jax.training.knob import CONSTANT, Knob, Turn
from sae_jax.training.optim import Decay, DecoderNorm, adam, learning_rate
from sae_jax.training.step import Step, make_step


class Own(NamedTuple):
    """What one SAE of several may have to itself; None: as in the recipe, the SAE."""

    lr: Array | float | None = None
    turn: Turn | None = None


SHARED = Own()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Training: optimiser, auxiliary loss, schedules."""

    steps: Annotated[int, "training steps"] = 20_000
    lr: Annotated[float, "learning rate of Adam, after the warm-up"] = 3e-4
    warmup: Annotated[int, "steps in which the learning rate rises from 0"] = 0
    decay: Annotated[Decay, "what the learning rate does after the warm-up"] = (
        "constant"
    )
    b1: Annotated[float, "Adam's memory of gradients"] = 0.9
    b2: Annotated[float, "Adam's memory of squared gradients"] = 0.999
    clip: Annotated[float | None, "clip gradients to this global norm, or none"] = 1.0
    decoder_norm: Annotated[
        DecoderNorm,
        "when decoder rows return to norm 1: after the optimiser's step, before it "
        "(as the Top-AFA authors' code), or never (free)",
    ] = "after"
    use_aux: Annotated[
        Literal["rule", "always", "never"],
        "whether dead features get an auxiliary loss; rule: as the rule's literature",
    ] = "rule"
    aux: AuxK = AuxK()
    accumulate: Annotated[
        int,
        "gradients of so many pieces of a batch are taken one after another, to save "
        "memory; to rules that look over a batch, a piece is one",
    ] = 1
    knob: Knob = CONSTANT

    def __post_init__(self) -> None:
        faults = checks.field_faults("", self)
        if not faults and self.steps == 0:
            faults.append("steps=0 trains nothing; give at least 1.")
        if not faults and self.warmup > self.steps:
            faults.append(f"warmup={self.warmup} is longer than steps={self.steps}.")
        if not faults and max(self.b1, self.b2) >= 1:
            faults.append(f"b1={self.b1} and b2={self.b2} must be below 1.")
        if not faults:
            faults += filter(None, [pieces.number_fault(self.accumulate)])
        if self.clip == 0:
            faults.append("clip=0 learns nothing; none: no clipping.")
        checks.raise_all(faults)

    def faults(self, batch: int) -> Iterator[str]:
        """What does not go with batches of so many rows."""
        fault = pieces.fault(batch, self.accumulate)
        if fault:
            yield fault

    def optimiser(
        self, lr: Array | float | None = None
    ) -> optax.GradientTransformation:
        """The optimiser chain; with another learning rate, which may be traced."""
        lr = self.lr if lr is None else lr
        rate = learning_rate(lr, self.steps, warmup=self.warmup, decay=self.decay)
        return adam(rate, b1=self.b1, b2=self.b2, clip=self.clip)

    def make_step(
        self, sae: SAE, *, own: Own = SHARED, axis: str | None = None, jit: bool = True
    ) -> Step:
        """The training step of an SAE."""
        wanted = {"rule": sae.bound.rule.aux_k, "always": True, "never": False}
        return make_step(
            sae,
            self.optimiser(own.lr),
            aux=self.aux if wanted[self.use_aux] else None,
            decoder_norm=self.decoder_norm,
            knob=self.knob,
            turn=own.turn,
            accumulate=self.accumulate,
            axis=axis,
            jit=jit,
        )
