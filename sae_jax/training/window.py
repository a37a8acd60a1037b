"""Metrics gathered over a window of steps, on the device: no step is waited for.

Losses and the like are averaged; counts and settings (`dead`, `knob`) and the step in
which the SAE diverged, if it did, are those of the last step.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax.training.step import Batch, Metrics, Step, TrainState

Gathered = Callable[..., tuple[TrainState, "Window"]]
LAST = frozenset({"dead", "diverged", "knob"})


@flax.struct.dataclass
class Window:
    """What was seen since the window began.

    Attributes:
      count: how many steps.
      values: sums of the averaged metrics, and the last value of the others.
    """

    count: Any
    values: Any

    def add(self, metrics: Metrics) -> "Window":
        """The window with one more step in it."""
        return Window(
            count=self.count + 1,
            values={
                name: metrics[name] if name in LAST else value + metrics[name]
                for name, value in self.values.items()
            },
        )

    def restarted(self) -> "Window":
        """A window without steps."""
        return jax.tree.map(jnp.zeros_like, self)

    @property
    def diverged(self) -> int:
        """The step in which the SAE diverged, or -1; waits for the device."""
        return int(self.values["diverged"])

    def means(self) -> dict[str, float]:
        """The metrics of the window; waits for the device."""
        count, values = jax.device_get((self.count, self.values))
        return {
            name: float(value if name in LAST else value / count)
            for name, value in values.items()
            if name != "diverged"
        }


def empty(step: Step, state: TrainState, batch: Batch) -> Window:
    """A window without steps, for the metrics that `step` reports."""
    _, metrics = jax.eval_shape(step, state, batch)
    names = metrics.keys() - {"step", "finite"}
    return Window(
        count=jnp.zeros((), jnp.int32),
        values={name: jnp.zeros((), metrics[name].dtype) for name in sorted(names)},
    )


def gathered(step: Step) -> Gathered:
    """`(state, window, batch) -> (state, window)`."""

    def gather(
        state: TrainState, window: Window, batch: Batch
    ) -> tuple[TrainState, Window]:
        state, metrics = step(state, batch)
        return state, window.add(metrics)

    return gather
