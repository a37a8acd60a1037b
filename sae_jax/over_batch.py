"""Rules with one budget for the whole batch, and how they encode single rows later.

In training the budget is spread over the rows of the batch. Afterwards a running
threshold, the smallest value that the batch selection tends to keep, stands in for it,
so that a row's codes do not depend on its neighbours. There is one for all features, or
one for each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import codes, select
from sae_jax.contract import Encoded, Inputs, Params, State
from sae_jax.counterpart import Counterpart


def _whole(budget: Array | float) -> Any:
    """Moves a budget up by a rounding error.

    k * B is a whole number for most k that people write, such as 2.1 at B = 100; in
    floating point it may come out just below.
    """
    slack = 1e-6 * budget
    if isinstance(budget, Array):
        return budget + jnp.minimum(slack, 0.01)
    return budget + min(slack, 0.01)


def encode(
    inputs: Inputs,
    params: Params,
    state: State,
    *,
    train: bool,
    k: float | Array = 32.0,
    k_max: float,
    threshold_decay: float = 0.99,
) -> Encoded:
    """The k * B largest values of the batch, or those above the running threshold.

    The budget is rounded down where k is fractional, to one feature at least. Masked
    rows take no share of it.
    """
    if not train:
        return Encoded(threshold_codes(inputs, state), state, {})
    scores, n_valid = valid_scores(inputs)
    least = jnp.minimum(n_valid, 1)
    count = jnp.maximum(jnp.floor(_whole(k * n_valid)), least)
    count_max = max(int(_whole(k_max * scores.shape[0])), 1)
    chosen = select.batch(scores, count, count_max=count_max)
    active = select.keep(inputs.encoder, chosen)
    return Encoded(
        active, threshold_update(state, codes.smallest(active), threshold_decay), {}
    )


def valid_scores(inputs: Inputs) -> tuple[Float[Array, "B F"], Array | int]:
    """The pre-activations, below all others in rows that are masked; valid rows."""
    if inputs.mask is None:
        return inputs.pre, inputs.pre.shape[0]
    scores = jnp.where(inputs.mask[:, None], inputs.pre, -jnp.inf)
    return scores, inputs.mask.sum()


def threshold_init(
    key: Array, params: Params, *, of_each: bool = False
) -> tuple[Params, State]:
    """A threshold that has seen nothing, which lets every positive value through.

    One for all features, or `of_each`.
    """
    zero = jnp.zeros_like(params["b_enc"] if of_each else params["b_enc"][0])
    return params, {"threshold_sum": zero, "threshold_weight": zero}


def threshold_update(state: State, smallest: Float[Array, "*F"], decay: float) -> State:
    """Averages the smallest positive code of each batch over recent batches.

    Exponential moving average with decay `decay`, divided by the weight that it has
    gathered so far, so that early values are not biased towards the start at 0. A batch
    without a positive code, where the smallest is infinite, leaves it alone.
    """
    dtype = state["threshold_sum"].dtype
    smallest = jax.lax.stop_gradient(smallest).astype(dtype)
    seen = jnp.isfinite(smallest)
    total = decay * state["threshold_sum"] + (1 - decay) * jnp.where(seen, smallest, 0)
    weight = decay * state["threshold_weight"] + (1 - decay)
    return {
        "threshold_sum": jnp.where(seen, total, state["threshold_sum"]),
        "threshold_weight": jnp.where(seen, weight, state["threshold_weight"]),
    }


def threshold(state: State) -> Float[Array, "*F"]:
    """The running threshold; 0 where no batch was seen."""
    weight = state["threshold_weight"]
    return state["threshold_sum"] / jnp.where(weight > 0, weight, 1)


def threshold_codes(inputs: Inputs, state: State) -> codes.Codes:
    """`pre` where it exceeds the running threshold: each row on its own."""
    above = inputs.pre > threshold(state)
    return jnp.where(above, jax.nn.relu(inputs.pre), 0)


def export(params: Params, state: State) -> Counterpart:
    """The threshold of each feature, as for single rows after training."""
    of_each = jnp.full_like(params["b_enc"], threshold(state))
    return Counterpart("above", {"threshold": of_each})
