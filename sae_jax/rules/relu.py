"""ReLU with an L1 penalty, the first of the sparse autoencoders."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sae_jax.contract import Encoded, Inputs, Params, Penalty, Rule, State, register
from sae_jax.counterpart import Counterpart


def relu(
    inputs: Inputs,
    params: Params,
    state: State,
    *,
    coef: float | Array = 1e-3,
    decoder_weighted: bool = False,
) -> Encoded:
    """Every positive pre-activation stays on; the loss pays for their sum.

    `codes = relu(pre)`, loss term `coef * mean_rows(sum_j codes_j)`, or
    `... codes_j * ||d_j||` where `decoder_weighted` (Anthropic, April 2024 update),
    which allows a decoder without the unit-norm constraint.

    Differs: coefficients published for a loss summed over width are divided by D.
    """
    active = jax.nn.relu(inputs.pre)
    price = jnp.linalg.norm(inputs.weights.W_dec, axis=1) if decoder_weighted else 1.0
    l1 = (active * price).sum(1)
    return Encoded(active, state, {"l1": Penalty(coef, l1)})


def export(params: Params, state: State) -> Counterpart:
    """The penalty leaves no trace."""
    return Counterpart("positive")


register(
    Rule(
        name="relu",
        paper="Bricken et al. 2023, Cunningham et al. 2023 (arXiv:2309.08600)",
        decides="sign of the pre-activation; L1 penalty",
        encode=relu,
        export=export,
        example={"coef": 0.02},
        knob="coef",
        knob_raises_l0=False,
        aux_k=False,
    )
)
