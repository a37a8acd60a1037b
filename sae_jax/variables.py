"""The arrays that an SAE is made of, and those that come out of it."""

from typing import NamedTuple

from jaxtyping import Array, Float

from sae_jax import products
from sae_jax.codes import Codes
from sae_jax.contract import Params, Penalty, State, Weights
from sae_jax.treatment import Undo


class Variables(NamedTuple):
    """All arrays of an SAE.

    Attributes:
      params: what gradients update; `W_enc [F, D_in]`, `b_enc [F]`, `W_dec [F, D_out]`,
        `b_dec [D_out]`, and whatever the rule learns besides.
      state: the rule's memory, which no gradient updates.
      constants: estimated once from data (the scale of the `scale` treatment).
    """

    params: Params
    state: State
    constants: dict[str, Array]


class Output(NamedTuple):
    """What `SAE.apply` gives: `x_hat [B, D_out]` and the codes behind it."""

    x_hat: Float[Array, "B D_out"]
    codes: Codes


class Forward(NamedTuple):
    """Everything that one pass computes, in the treated space; the loss reads it."""

    x_hats: list[Float[Array, "B D_out"]]
    coefficients: list[float]
    codes: Codes
    state: State
    penalties: dict[str, Penalty]
    encoder: products.Encoder
    weights: Weights
    target: Float[Array, "B D_out"] | None
    undo: Undo
