"""Schedules on a rule's knob, for every rule alike.

The knob is the hyperparameter that moves sparsity: k of TopK, the coefficient of ReLU
or Top-AFA. Its value in a step is `value * ramp(step) * control`:

* the ramp goes in a straight line from `start` to 1 within `steps`. A start of 0 is a
  sparsity warm-up of a coefficient, a start above 1 an annealing of k;
* control, if a `target_l0` is given, moves by up to `rate` per step (in proportion to
  how far L0 is off), in whichever direction the rule's record says brings L0 closer.
"""

import dataclasses
import math
from typing import Annotated, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import checks
from sae_jax.binding import bind
from sae_jax.model import SAE


class Turn(NamedTuple):
    """Where a knob stands before its schedule moves it, and how far it may go."""

    value: Float[Array, ""] | float
    top: Float[Array, ""] | float


@dataclasses.dataclass(frozen=True)
class Knob:
    """How the rule's knob moves during training."""

    start: Annotated[float, "factor on the knob in step 0"] = 1.0
    steps: Annotated[int, "length of the ramp from start to 1; 0: no ramp"] = 0
    target_l0: Annotated[
        float | None, "mean number of active features to steer for, or none"
    ] = None
    # Chosen, untested.
    rate: Annotated[float, "largest relative change that control makes in a step"] = (
        0.01
    )
    range: Annotated[
        float,
        "control keeps the knob within this factor of its value, both ways (a budget "
        "stays below twice the target)",
    ] = 100.0

    def __post_init__(self) -> None:
        faults = checks.field_faults("Knob ", self)
        if self.start != 1 and self.steps == 0:
            faults.append(f"Knob start={self.start} needs steps, the ramp's length.")
        if self.target_l0 == 0:
            faults.append("Knob target_l0=0 asks for empty codes; None: no target.")
        if self.range < 1:
            faults.append(f"Knob range={self.range} must be at least 1.")
        checks.raise_all(faults)

    @property
    def moves(self) -> bool:
        """Whether the knob is anything other than a constant."""
        return self.steps > 0 or self.target_l0 is not None

    def prepare(self, sae: SAE) -> SAE:
        """The same SAE, its rule told the largest value that the knob may take."""
        rule, value = sae.bound.rule, sae.bound.hp[sae.bound.rule.knob]
        if not self.moves:
            return sae
        if self.target_l0 is not None and rule.knob_raises_l0 is None:
            raise ValueError(
                f"Nothing can steer {rule.name} towards target_l0={self.target_l0}: "
                f"which way {rule.knob} moves its sparsity depends on the data."
            )
        if self.target_l0 is not None and value == 0:
            raise ValueError(
                f"Nothing can steer {rule.name} from {rule.knob}=0, since control "
                f"multiplies it; start from a small value."
            )
        if rule.knob not in rule.traced:
            raise ValueError(
                f"{rule.name}'s knob {rule.knob} cannot be scheduled, since it may not "
                f"be traced; if the rule can bear that, annotate {rule.knob} as "
                f"float | Array or int | Array."
            )
        ceiling = value * max(1.0, self.start)
        if self.target_l0 is not None:
            # A budget needs little more than the target; a coefficient may go far.
            budget = rule.budget == rule.knob
            top = 2 * self.target_l0 if budget else value * self.range
            ceiling = max(ceiling, top)
        return sae.up_to(ceiling)

    def value(
        self,
        sae: SAE,
        step: Array,
        control: Float[Array, ""],
        turn: Turn | None = None,
    ) -> Float[Array, ""] | None:
        """The knob in this step, or None where it never moves."""
        if turn is None and not self.moves:
            return None
        turn = turn or turn_of(sae)
        ramp = jnp.float32(1)
        if self.steps:
            done = jnp.minimum(step / self.steps, 1)
            ramp = self.start + (1 - self.start) * done
        value = turn.value * ramp * control
        return jnp.minimum(value, turn.top).astype(jnp.float32)

    def reached(self, sae: SAE, step: Array, control: Float[Array, ""]) -> SAE:
        """The SAE as trained so far: its knob is where the schedule has brought it.

        Evaluation and export go through this one; `sae` itself still says what the
        run began with.
        """
        value = self.value(self.prepare(sae), step, control)
        if value is None:
            return sae
        now = float(value)
        hp = sae.bound.hp
        if isinstance(hp[sae.bound.rule.knob], int):
            now = max(1, math.ceil(now - 1e-3))
        bound = bind(sae.bound.rule, {**hp, sae.bound.rule.knob: now})
        return dataclasses.replace(sae, rule=bound)

    def steer(
        self,
        sae: SAE,
        control: Float[Array, ""],
        l0: Float[Array, ""],
        turn: Turn | None = None,
    ) -> Float[Array, ""]:
        """Control for the next step, after seeing this step's L0."""
        if self.target_l0 is None:
            return control
        direction = 1 if sae.bound.rule.knob_raises_l0 else -1
        off = jnp.clip((self.target_l0 - l0) / self.target_l0, -1, 1)
        control = control * jnp.exp(direction * self.rate * off)
        turn = turn or turn_of(sae)
        # No winding up past the ceiling.
        most = jnp.minimum(self.range, turn.top / turn.value)
        return jnp.clip(control, 1 / self.range, most).astype(jnp.float32)


def turn_of(sae: SAE) -> Turn:
    """Where the knob of a prepared SAE stands."""
    return Turn(sae.bound.hp[sae.bound.rule.knob], sae.bound.top)


CONSTANT = Knob()
