"""Rules with one budget for the whole batch, and how they encode single rows later.

In training the budget is spread over the rows of the batch. Afterwards a running
threshold, the smallest value that the batch selection tends to keep, stands in for it,
so that a row's codes do not depend on its neighbours.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

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
    scores = inputs.pre
    n_valid: Array | int = scores.shape[0]
    if inputs.mask is not None:
        scores = jnp.where(inputs.mask[:, None], scores, -jnp.inf)
        n_valid = inputs.mask.sum()
    least = jnp.minimum(n_valid, 1)
    count = jnp.maximum(jnp.floor(_whole(k * n_valid)), least)
    count_max = max(int(_whole(k_max * scores.shape[0])), 1)
    chosen = select.batch(scores, count, count_max=count_max)
    active = select.keep(inputs.encoder, chosen)
    return Encoded(active, threshold_update(state, active, threshold_decay), {})


def threshold_init(key: Array, params: Params) -> tuple[Params, State]:
    """A threshold that has seen nothing, which lets every positive value through."""
    zero = jnp.zeros((), params["b_enc"].dtype)
    return params, {"threshold_sum": zero, "threshold_weight": zero}


def threshold_update(state: State, active: codes.Codes, decay: float) -> State:
    """Averages the smallest positive code of each batch over recent batches.

    Exponential moving average with decay `decay`, divided by the weight that it has
    gathered so far, so that early values are not biased towards the start at 0.
    """
    dtype = state["threshold_sum"].dtype
    values = jax.lax.stop_gradient(codes.entries(active)).astype(dtype)
    smallest = jnp.where(values > 0, values, jnp.inf).min()
    seen = jnp.isfinite(smallest)
    total = decay * state["threshold_sum"] + (1 - decay) * jnp.where(seen, smallest, 0)
    weight = decay * state["threshold_weight"] + (1 - decay)
    return {
        "threshold_sum": jnp.where(seen, total, state["threshold_sum"]),
        "threshold_weight": jnp.where(seen, weight, state["threshold_weight"]),
    }


def threshold(state: State) -> Array:
    """The running threshold; 0 where no batch was seen."""
    weight = state["threshold_weight"]
    return state["threshold_sum"] / jnp.where(weight > 0, weight, 1)


def threshold_codes(inputs: Inputs, state: State) -> codes.Codes:
    """`pre` where it exceeds the running threshold: each row on its own."""
    return jnp.where(inputs.pre > threshold(state), jax.nn.relu(inputs.pre), 0)


def export(params: Params, state: State) -> Counterpart:
    """One threshold for all features, as for single rows after training."""
    shared = jnp.full_like(params["b_enc"], threshold(state))
    return Counterpart("above", {"threshold": shared})
