"""TopK: a fixed number of active features per row."""

import math

from jaxtyping import Array

from sae_jax import select
from sae_jax.contract import (
    Inputs,
    Params,
    Rule,
    State,
    budget_faults,
    from_selection,
    register,
)
from sae_jax.counterpart import Counterpart


def topk(inputs: Inputs, *, k: int | Array = 32, k_max: float) -> select.Selection:
    """Keeps the k largest pre-activations of each row.

    Gao et al. 2024, arXiv:2406.04093: `codes = relu(pre)` on the k largest entries of
    `pre = (x - b_dec) @ W_enc.T + b_enc`, 0 elsewhere.

    Differs: none, but that a fractional k, as a schedule passes through, is rounded
    up. The Top-AFA authors' code leaves b_enc out (`encoder_bias=False`).
    """
    return select.rows(inputs.encoder, k, count_max=math.ceil(k_max))


def export(params: Params, state: State, *, k: int) -> Counterpart:
    """The k of now, rounded up as in encoding."""
    return Counterpart("largest", settings={"k": math.ceil(k)})


register(
    Rule(
        name="topk",
        paper="Gao et al. 2024 (arXiv:2406.04093)",
        decides="the k largest pre-activations of each row",
        encode=from_selection(topk),
        export=export,
        example={"k": 4},
        knob="k",
        budget="k",
        faults=budget_faults,
    )
)
