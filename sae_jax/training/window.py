"""Metrics gathered over a window of steps, on the device: no step is waited for.

Losses and the like are averaged; counts and settings (`dead`, `knob`) are those of the
last step; the first step whose loss or gradient was not finite is remembered.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax.training.step import Batch, Metrics, Step, TrainState

LAST = frozenset({"dead", "knob"})


@flax.struct.dataclass
class Window:
    """What was seen since the window began.

    Attributes:
      count: how many steps.
      values: sums of the averaged metrics, and the last value of the others.
      bad_step: the first step that was not finite, or -1.
    """

    count: Any
    values: Any
    bad_step: Any

    def add(self, metrics: Metrics) -> "Window":
        """The window with one more step in it."""
        metrics = dict(metrics)
        step, finite = metrics.pop("step"), metrics.pop("finite")
        first = (self.bad_step < 0) & ~finite
        return Window(
            count=self.count + 1,
            values={
                name: value if name in LAST else self.values[name] + value
                for name, value in metrics.items()
            },
            bad_step=jnp.where(first, step, self.bad_step),
        )

    def restarted(self) -> "Window":
        """A window without steps."""
        zeros = jax.tree.map(jnp.zeros_like, self)
        return zeros.replace(bad_step=zeros.bad_step - 1)

    def means(self) -> dict[str, float]:
        """The metrics of the window; waits for the device."""
        count, values = jax.device_get((self.count, self.values))
        return {
            name: float(value if name in LAST else value / count)
            for name, value in values.items()
        }


def empty(step: Step, state: TrainState, batch: Batch) -> Window:
    """A window without steps, for the metrics that `step` reports."""
    _, metrics = jax.eval_shape(step, state, batch)
    names = metrics.keys() - {"step", "finite"}
    return Window(
        count=jnp.zeros((), jnp.int32),
        values={name: jnp.zeros((), metrics[name].dtype) for name in sorted(names)},
        bad_step=jnp.full((), -1, jnp.int32),
    )


def gathered(step: Step) -> Callable[..., tuple[TrainState, Window]]:
    """`(state, window, batch) -> (state, window)`."""

    def gather(
        state: TrainState, window: Window, batch: Batch
    ) -> tuple[TrainState, Window]:
        state, metrics = step(state, batch)
        return state, window.add(metrics)

    return gather
