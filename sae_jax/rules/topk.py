"""TopK: a fixed number of active features per row."""

import math

from jaxtyping import Array

from sae_jax import select
from sae_jax.contract import Inputs, Rule, budget_faults, from_selection, register


def topk(inputs: Inputs, *, k: int | Array = 32, k_max: float) -> select.Selection:
    """Keeps the k largest pre-activations of each row.

    Gao et al. 2024, arXiv:2406.04093: `codes = relu(pre)` on the k largest entries of
    `pre = (x - b_dec) @ W_enc.T + b_enc`, 0 elsewhere.

    Differs: none, but that a fractional k, as a schedule passes through, is rounded
    up. The Top-AFA authors' code leaves b_enc out (`encoder_bias=False`).
    """
    return select.rows(inputs.encoder, k, count_max=math.ceil(k_max))


register(
    Rule(
        name="topk",
        paper="Gao et al. 2024 (arXiv:2406.04093)",
        decides="the k largest pre-activations of each row",
        encode=from_selection(topk),
        example={"k": 4},
        knob="k",
        budget="k",
        faults=budget_faults,
    )
)
